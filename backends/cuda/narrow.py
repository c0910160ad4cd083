"""How a product of up to 16 rows is divided from sm_90 on: K over all warps of a cluster.

A cluster streams one strip of 32 columns after another, all of its warps at once, each its part of
K. So a warp needs one part of x, which stays in its registers, and the sums of a strip meet in
shared memory (`kernels/narrow.cuh`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.pack import BLOCK, block_of, blocks_of, strips_of
from pcc.backends.cuda.split import PIECE, WARPS, stages_of

ROWS = 16  # of x at most
CLUSTER = 2  # blocks; multiprocessors come in pairs, so that no GPU has some that are left over
REGISTERS = {False: 176, True: 96}  # of a thread, for x; where x is rounded here, it takes others
LEAST_STAGES = 3


@dataclass(frozen=True)
class Narrow:
    """`columns` clusters of `cluster` blocks; `tiles` of 8 rows of x.

    `stages`: copies in flight of a warp; `parts`: of 32 rows of W, of a warp in a strip; `gains`:
    whether x is normalised, so that gains lie in shared memory.
    """

    tiles: int
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
        used = -(-(WARPS * self.stages * (PIECE + 8) + 16) // 128) * 128
        used += 2 * WARPS * sums + (2 * self.cluster * sums if self.cluster > 1 else 0)
        used += self.tiles * 8 * 4 + (WARPS * self.parts * BLOCK * 4 if self.gains else 0)
        return max(self.gpu.alone, used)


def room(rows: int, gpu: Gpu) -> int:
    """Return the bytes of shared memory of a product of halves of so many rows; 0 of too many."""
    if rows > ROWS:
        return 0
    return Narrow(-(-rows // 8), CLUSTER, 1, stages_of(gpu), 0, False, gpu).shared


def narrow(
    rows: int, k: int, n: int, gpu: Gpu, dtype: str, source: str, cluster: int | None = None
) -> Narrow | None:
    """Return the division of x [rows,k] W [k,n], or None where there is none.

    There is none for more rows, GPUs without clusters, K that is short, no multiple of 8, or so
    long that registers do not hold x. `dtype`, `source`: as `library.linear` has them. One row, of
    which little is to be read, needs no cluster where registers hold it.
    """
    if rows > ROWS or not gpu.overlaps or k % 8:
        return None
    blocks, tiles, wide = blocks_of(k, dtype), -(-rows // 8), source != "half"
    for c in (1, CLUSTER) if rows == 1 else (CLUSTER, 1):
        parts = -(-blocks // (WARPS * c)) * (block_of(dtype) // BLOCK)
        if cluster not in (None, c) or blocks < WARPS * c or 4 * tiles * parts > REGISTERS[wide]:
            continue
        columns = min(gpu.processors // c, strips_of(n))
        for stages in range(stages_of(gpu), LEAST_STAGES - 1, -1):
            how = Narrow(tiles, c, columns, stages, parts, source == "norm", gpu)
            if columns and how.shared <= gpu.block_shared:
                return how
    return None
