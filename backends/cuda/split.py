"""How a product is divided over a GPU: slabs of K beside groups of columns.

A warp streams the packed blocks of one slab of one strip, then of its next strip. The block of
threads holds the slab's part of x in shared memory, so x is read from L2 once per slab and not
once per strip. Sums of a strip over its slabs meet in scratch: the last to arrive adds them in
order, so the result does not depend on who is last.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.pack import BLOCK, block_of, blocks_of, strips_of

WARPS = 8
STAGES = 6  # copies in flight per warp at most: 12 KiB, 96 KiB per block of threads
TILE = 64  # rows of x that one block of threads holds at most; more rows read W again
PIECE = 2 * BLOCK * 32  # bytes of one copy
SLAB = {1: 64 << 10, 2: 64 << 10, 4: 96 << 10, 8: 120 << 10}  # most bytes of x, by tiles of 8 rows
SHORTEST = 4  # blocks in a slab: fewer would fetch less than one filling of the ring


@dataclass(frozen=True)
class Split:
    """`tiles` of 8 rows in each of `parts` groups of rows; `slabs` of K; `columns` of blocks."""

    tiles: int
    parts: int
    slabs: int
    columns: int
    slab_blocks: int
    blocks: int
    depth: int  # rows of W in a block
    gpu: Gpu

    @property
    def stages(self) -> int:
        """Copies in flight per warp."""
        return stages_of(self.gpu)

    @property
    def pitch(self) -> int:
        """Bytes between rows of x in shared memory: 64 mod 128, so that no two rows collide."""
        row = self.slab_blocks * self.depth * 2
        return row + (64 if row % 128 == 0 else 0)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: rings, x, scales of the rows, barriers."""
        used = ring_bytes(self.stages) + self.tiles * 8 * (self.pitch + 4) + 8
        return max(self.gpu.alone, used)


def stages_of(gpu: Gpu, warps: int = WARPS) -> int:
    """Return how many copies of a warp are in flight: half of a block's memory at most."""
    return min(STAGES, gpu.block_shared // 2 // (warps * PIECE))


def ring_bytes(stages: int) -> int:
    """Return the bytes of the rings of a block, with their barriers."""
    return WARPS * stages * (PIECE + 8)


def slab_bytes(gpu: Gpu, tiles: int) -> int:
    """Return the bytes of x in a slab at most: what rings, scales and barriers leave."""
    return min(SLAB[tiles], gpu.block_shared - ring_bytes(stages_of(gpu)) - tiles * 8 * 4 - 8)


def split(
    rows: int, k: int, n: int, gpu: Gpu, slabs: int | None = None, dtype: str = "f16"
) -> Split:
    """Return the division of x [rows,k] W [k,n] over the multiprocessors of `gpu`.

    `dtype` of the packed W: "u8" for integers, of which a block has twice as many rows.
    """
    parts = -(-rows // TILE)
    tiles = next(t for t in (1, 2, 4, 8) if 8 * t >= min(rows, TILE))
    blocks, strips, depth = blocks_of(k, dtype), strips_of(n), block_of(dtype)
    if slabs is None:
        room = slab_bytes(gpu, tiles) - 64 * 8 * tiles  # rows are up to 64 bytes further apart
        least = -(-blocks // (room // (2 * depth * 8 * tiles)))
        most = max(least, blocks // SHORTEST)
        by_cost = ((_cost(s, rows, blocks, strips, gpu, depth), s) for s in range(least, most + 1))
        slabs = min(by_cost)[1]
    columns = max(1, min(gpu.processors // slabs, -(-strips // WARPS)))
    return Split(tiles, parts, slabs, columns, -(-blocks // slabs), blocks, depth, gpu)


def _cost(slabs: int, rows: int, blocks: int, strips: int, gpu: Gpu, depth: int) -> float:
    """Return a model of the time in microseconds, fitted to an H100 at 1 to 16 rows.

    (From sm_90 on such products are `narrow` ones now, and this serves more rows.)

    Of another GPU it knows the multiprocessors and the rate of a copy; the rest is the H100's.

    Weights at a rate that falls where warps or multiprocessors idle, at the end too; sums through
    L2; a start for each strip of a warp; the slab's part of x, before anything else can begin.
    A block has as many bytes in every dtype, `depth` rows of W and as many numbers of x.
    """
    sms = gpu.processors
    columns = max(1, min(sms // slabs, -(-strips // WARPS)))
    each = columns * WARPS  # strips at a time
    rounds = -(-strips // each)
    even = strips / each / rounds if rounds > 1 else 1.0
    busy = min(1.0, min(strips, each) * slabs / (0.48 * sms * WARPS))
    busy *= (0.8 + 0.2 * min(1.0, columns * slabs / sms)) * (0.5 + 0.5 * even)
    waves = max(1.0, columns * slabs / sms)
    weights = blocks * strips * PIECE / (gpu.copy_rate * 1e6) * waves / busy
    sums = 0.0 if slabs == 1 else slabs * (strips * rows * 256 / 2.0e6 + 0.1)
    return (
        weights
        + sums
        + 0.7 * rounds
        + 0.006 * max(8, min(rows, TILE)) * blocks * depth / BLOCK / slabs
    )
