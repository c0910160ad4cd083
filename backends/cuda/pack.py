"""The order in which the products read their weights: as the tensor cores take them.

Strips of 32 columns, blocks of 32 rows, zeros beyond the matrix. A thread g * 4 + c of a warp
(g < 8, c < 4) reads 16 bytes at a time, a warp 512 in a row: for each strip and block, step j < 2
and tile t < 2, the eight values

    W[32 block + 8 c + 4 j + 2 p + e, 32 strip + 4 g + 2 t + h]   at p * 4 + h * 2 + e.

They are the thread's part of the first operand of `mma.m16n8k16` with 16 columns of W as its rows;
which row of W stands for which k is free as long as both operands agree, and so chosen that a
thread reads 8 neighbours of x. The order does not depend on the number of rows of x.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STRIP = 32  # columns of W that a warp works on at a time
BLOCK = 32  # rows of W in one copy of a warp: with the strip, 2 KiB


def strips_of(n: int) -> int:
    """Return how many strips n columns take."""
    return -(-n // STRIP)


def blocks_of(k: int) -> int:
    """Return how many blocks k rows take."""
    return -(-k // BLOCK)


def packed_size(k: int, n: int) -> int:
    """Return the number of values of a packed matrix [k,n]."""
    return strips_of(n) * blocks_of(k) * STRIP * BLOCK


def pack_linear(w: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return `w [K,N]` in the order above, 1-D, in its dtype; float32 in the order of `_rows`."""
    k, n = w.shape
    strips, blocks = strips_of(n), blocks_of(k)
    out = np.zeros(strips * blocks * STRIP * BLOCK, w.dtype)
    each = out.reshape(strips, blocks, -1)
    for strip in range(strips):
        part = np.zeros((blocks * BLOCK, STRIP), w.dtype)
        columns = w[:, strip * STRIP : (strip + 1) * STRIP]
        part[:k, : columns.shape[1]] = columns
        each[strip] = (_rows if w.dtype.itemsize == 4 else _fragments)(part, blocks)
    return out


def _fragments(part: NDArray[np.generic], blocks: int) -> NDArray[np.generic]:
    """Return one strip [32 blocks, 32] as [blocks, 1024]: axes (j, t, g, c, p, h, e)."""
    # A look-up in a flat block copies a value at a time; a transpose would walk eight short axes.
    return np.take(part.reshape(blocks, -1), _ORDER, axis=1, mode="clip")


def _order() -> NDArray[np.int64]:
    """Return which value of a block [32,32] comes at each place."""
    # c j p e | g t h
    axes = np.arange(BLOCK * STRIP).reshape(4, 2, 2, 2, 8, 2, 2)
    return axes.transpose(1, 5, 4, 0, 2, 6, 3).reshape(-1)


_ORDER = _order()


def _rows(part: NDArray[np.generic], blocks: int) -> NDArray[np.generic]:
    """Return one strip row by row: the order of float32, whose products use no tensor cores."""
    return part.reshape(blocks, -1)


def unpack_linear(packed: NDArray[np.generic], k: int, n: int) -> NDArray[np.generic]:
    """Return the matrix [k,n] that `pack_linear` packed."""
    strips, blocks = strips_of(n), blocks_of(k)
    if packed.dtype.itemsize == 4:
        parts = packed.reshape(strips, blocks * BLOCK, STRIP)
    else:  # strip block j t g c p h e -> block c j p e g t h
        axes = packed.reshape(strips, blocks, 2, 2, 8, 4, 2, 2, 2)
        parts = axes.transpose(0, 1, 5, 2, 6, 8, 4, 3, 7).reshape(strips, blocks * BLOCK, STRIP)
    return parts.transpose(1, 0, 2).reshape(blocks * BLOCK, strips * STRIP)[:k, :n]


def interleave(w: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return `w [.., 2 I]`, gates then ups, as gate 0, up 0, gate 1, ...: for epilogue "gated"."""
    inner = w.shape[-1] // 2
    pairs = np.stack([w[..., :inner], w[..., inner:]], axis=-1)
    return pairs.reshape(w.shape)
