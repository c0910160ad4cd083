"""How a product is divided over a GPU: slabs of K beside groups of columns.

A warp streams the packed blocks of one slab of one strip, then of its next strip. The block of
threads holds the slab's part of x in shared memory, so x is read from L2 once per slab and not
once per strip. Sums of a strip over its slabs meet in scratch: the last to arrive adds them in
order, so the result does not depend on who is last.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.pack import BLOCK, block_of, blocks_of, strips_of

WARPS = 8
STAGES = 6  # copies in flight per warp: 12 KiB, 96 KiB per block of threads
TILE = 64  # rows of x that one block of threads holds at most; more rows read W again
PIECE = 2 * BLOCK * 32  # bytes of one copy
SLAB = {1: 64 << 10, 2: 64 << 10, 4: 96 << 10, 8: 120 << 10}  # bytes of x, by tiles of 8 rows
ALONE = 116 << 10  # so much that no two blocks share a multiprocessor while others are without
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

    @property
    def pitch(self) -> int:
        """Bytes between rows of x in shared memory: 64 mod 128, so that no two rows collide."""
        row = self.slab_blocks * self.depth * 2
        return row + (64 if row % 128 == 0 else 0)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: rings, x, scales of the rows, barriers."""
        ring = WARPS * STAGES * (PIECE + 8)
        return max(ALONE, ring + self.tiles * 8 * (self.pitch + 4) + 8)


def split(
    rows: int, k: int, n: int, sms: int, slabs: int | None = None, dtype: str = "f16"
) -> Split:
    """Return the division of x [rows,k] W [k,n] over `sms` multiprocessors.

    `dtype` of the packed W: "u8" for integers, of which a block has twice as many rows.
    """
    parts = -(-rows // TILE)
    tiles = next(t for t in (1, 2, 4, 8) if 8 * t >= min(rows, TILE))
    blocks, strips, depth = blocks_of(k, dtype), strips_of(n), block_of(dtype)
    if slabs is None:
        least = -(-blocks // ((SLAB[tiles] - 64 * 8 * tiles) // (2 * depth * 8 * tiles)))
        most = max(least, blocks // SHORTEST)
        by_cost = ((_cost(s, rows, blocks, strips, sms, depth), s) for s in range(least, most + 1))
        slabs = min(by_cost)[1]
    columns = max(1, min(sms // slabs, -(-strips // WARPS)))
    return Split(tiles, parts, slabs, columns, -(-blocks // slabs), blocks, depth)


def _cost(slabs: int, rows: int, blocks: int, strips: int, sms: int, depth: int) -> float:
    """Return a model of the time in microseconds, fitted to an H100 at 1 to 16 rows.

    Weights at a rate that falls where warps or multiprocessors idle, at the end too; sums through
    L2; a start for each strip of a warp; the slab's part of x, before anything else can begin.
    A block has as many bytes in every dtype, `depth` rows of W and as many numbers of x.
    """
    columns = max(1, min(sms // slabs, -(-strips // WARPS)))
    each = columns * WARPS  # strips at a time
    rounds = -(-strips // each)
    even = strips / each / rounds if rounds > 1 else 1.0
    busy = min(1.0, min(strips, each) * slabs / (0.48 * sms * WARPS))
    busy *= (0.8 + 0.2 * min(1.0, columns * slabs / sms)) * (0.5 + 0.5 * even)
    waves = max(1.0, columns * slabs / sms)
    weights = blocks * strips * PIECE / 3.0e6 * waves / busy
    sums = 0.0 if slabs == 1 else slabs * (strips * rows * 256 / 2.0e6 + 0.1)
    return (
        weights
        + sums
        + 0.7 * rounds
        + 0.006 * max(8, min(rows, TILE)) * blocks * depth / BLOCK / slabs
    )
