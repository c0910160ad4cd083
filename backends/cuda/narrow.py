"""How a product of up to 16 rows is divided from sm_90 on: K over all warps of a cluster.

A cluster streams one strip of 32 columns after another, all of its warps at once, each its part of
K. So a warp needs one part of x, which stays in its registers, and the sums of a strip meet in
shared memory (`kernels/narrow.cuh`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.pack import BLOCK, block_of, blocks_of, strips_of
from pcc.backends.cuda.split import PIECE, WARPS, stages_of

ROWS = 16  # of x at most
CLUSTER = 2  # blocks; multiprocessors come in pairs, so that no GPU has some that are left over
# Of integers a block has twice as many warps as of halves, where registers hold x: widening them
# takes more than half of the time of their bytes. One block is then faster than a cluster of two.
MORE = 16
# Registers of a thread for x, by warps, and by whether x is rounded here, which takes others.
REGISTERS = {(WARPS, False): 176, (WARPS, True): 96, (MORE, False): 64, (MORE, True): 40}
LEAST_STAGES = 3


@dataclass(frozen=True)
class Narrow:
    """`columns` clusters of `cluster` blocks of `warps`; `tiles` of 8 rows of x.

    `stages`: copies in flight of a warp; `parts`: of 32 rows of W, of a warp in a strip; `gains`:
    whether x is normalised, so that gains lie in shared memory.
    """

    tiles: int
    warps: int
    cluster: int
    columns: int
    stages: int
    parts: int
    gains: bool
    gpu: Gpu

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory, as `Narrow` of the kernel places them."""
        sums = 2 * self.tiles * 512  # of a strip
        used = -(-(self.warps * self.stages * (PIECE + 8) + 16) // 128) * 128
        used += 2 * self.warps * sums + (2 * self.cluster * sums if self.cluster > 1 else 0)
        used += self.tiles * 8 * 4 + (self.warps * self.parts * BLOCK * 4 if self.gains else 0)
        return max(self.gpu.alone, used)


def room(rows: int, gpu: Gpu) -> int:
    """Return the bytes of shared memory of a product of halves of so many rows; 0 of too many."""
    if rows > ROWS:
        return 0
    return Narrow(-(-rows // 8), WARPS, CLUSTER, 1, stages_of(gpu), 0, False, gpu).shared


def narrow(
    rows: int, k: int, n: int, gpu: Gpu, dtype: str, source: str,
    warps: int | None = None, cluster: int | None = None,
) -> Narrow | None:  # fmt: skip
    """Return the division of x [rows,k] W [k,n], or None where there is none.

    There is none for more rows, GPUs without clusters, K that is short, no multiple of 8, or so
    long that registers do not hold x. `dtype`, `source`: as `library.linear` has them; `warps`,
    `cluster`: as asked.
    """
    if rows > ROWS or not gpu.overlaps or k % 8:
        return None
    small = 2 * strips_of(n) <= gpu.processors
    for w, c in _divisions(rows, integers=dtype == "u8", small=small):
        if warps in (None, w) and cluster in (None, c):
            how = _divided(rows, k, n, gpu, dtype, source, w, c)
            if how is not None:
                return how
    return None


def _divisions(rows: int, *, integers: bool, small: bool) -> Iterator[tuple[int, int]]:
    """Yield warps and blocks of a cluster, the fastest first as measured on an H200.

    One row, of which little is to be read, needs no cluster either. `small`: of so few columns that
    clusters leave no multiprocessor idle that single blocks would use.
    """
    if integers:
        yield from ((MORE, c) for c in ((CLUSTER, 1) if small else (1, CLUSTER)))
    yield from ((WARPS, c) for c in ((1, CLUSTER) if rows == 1 else (CLUSTER, 1)))


def _divided(
    rows: int, k: int, n: int, gpu: Gpu, dtype: str, source: str, warps: int, cluster: int
) -> Narrow | None:
    """Return this division, with as many copies in flight as there is room for; None of too few."""
    blocks, tiles = blocks_of(k, dtype), -(-rows // 8)
    parts = -(-blocks // (warps * cluster)) * (block_of(dtype) // BLOCK)
    registers = REGISTERS[warps, source != "half"]
    columns = min(gpu.processors // cluster, strips_of(n))
    if blocks < warps * cluster or 4 * tiles * parts > registers or not columns:
        return None
    for stages in range(stages_of(gpu, warps), LEAST_STAGES - 1, -1):
        how = Narrow(tiles, warps, cluster, columns, stages, parts, source == "norm", gpu)
        if how.shared <= gpu.block_shared:
            return how
    return None
