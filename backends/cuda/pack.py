"""The order in which the products read their weights: as the tensor cores take them.

Strips of 32 columns, blocks of 32 rows, zeros beyond the matrix. A thread g * 4 + c of a warp
(g < 8, c < 4) reads 16 bytes at a time, a warp 512 in a row: for each strip and block, step j < 2
and tile t < 2, the eight values

    W[32 block + 8 c + 4 j + 2 p + e, 32 strip + 4 g + 2 t + h]   at p * 4 + h * 2 + e.

They are the thread's part of the first operand of `mma.m16n8k16` with 16 columns of W as its rows;
which row of W stands for which k is free as long as both operands agree, and so chosen that a
thread reads 8 neighbours of x. The order does not depend on the number of rows of x.

Integers of 8 bits lie as q + 128, in blocks of 64 rows, so that a block has as many bytes: for each
strip and block, half b < 2 of its rows and step j < 2, the sixteen values

    W[64 block + 32 b + 8 c + 4 j + 2 p + e, 32 strip + 4 g + 2 t + h]
                                                            at t * 8 + p * 4 + e * 2 + h.

So a 32-bit word is two registers of the first operand: bytes 0 and 2 are one, 1 and 3 another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STRIP = 32  # columns of W that a warp works on at a time
BLOCK = 32  # rows of W in one copy of a warp: with the strip, 2 KiB of halves
BLOCK8 = 64  # the same, of integers
ZERO = 128  # what stands for the integer 0


def strips_of(n: int) -> int:
    """Return how many strips n columns take."""
    return -(-n // STRIP)


def block_of(dtype: str) -> int:
    """Return the rows of a block of packed "u8", else of floats."""
    return BLOCK8 if dtype == "u8" else BLOCK


def blocks_of(k: int, dtype: str = "f16") -> int:
    """Return how many blocks k rows take."""
    return -(-k // block_of(dtype))


def packed_size(k: int, n: int, dtype: str = "f16") -> int:
    """Return the number of values of a packed matrix [k,n]; dtype "u8": of integers."""
    return strips_of(n) * blocks_of(k, dtype) * STRIP * block_of(dtype)


def pack_linear(w: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return `w [K,N]` in the order above, 1-D, in its dtype; float32 in the order of `_rows`.

    Integers, i8, come out as u8.
    """
    if w.dtype == np.int8:
        return _pack_integers(w)
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


def _pack_integers(w: NDArray[np.generic]) -> NDArray[np.uint8]:
    k, n = w.shape
    strips, blocks = strips_of(n), blocks_of(k, "u8")
    out = np.empty((strips, blocks, BLOCK8 * STRIP), np.uint8)
    for strip in range(strips):
        part = np.full((blocks * BLOCK8, STRIP), ZERO, np.uint8)
        columns = w[:, strip * STRIP : (strip + 1) * STRIP].view(np.uint8)
        part[:k, : columns.shape[1]] = columns ^ np.uint8(ZERO)  # q + 128 modulo 256
        out[strip] = np.take(part.reshape(blocks, -1), _ORDER8, axis=1, mode="clip")
    return out.reshape(-1)


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


def _order8() -> NDArray[np.int64]:
    """Return the same for a block [64,32] of integers: axes (b, j, g, c, t, p, e, h)."""
    # b c j p e | g t h
    axes = np.arange(BLOCK8 * STRIP).reshape(2, 4, 2, 2, 2, 8, 2, 2)
    return axes.transpose(0, 2, 5, 1, 6, 3, 4, 7).reshape(-1)


_ORDER8 = _order8()


def _rows(part: NDArray[np.generic], blocks: int) -> NDArray[np.generic]:
    """Return one strip row by row: the order of float32, whose products use no tensor cores."""
    return part.reshape(blocks, -1)


def unpack_linear(packed: NDArray[np.generic], k: int, n: int) -> NDArray[np.generic]:
    """Return the matrix [k,n] that `pack_linear` packed, of integers as i8."""
    strips, blocks = strips_of(n), blocks_of(k)
    parts: NDArray[np.generic]
    if packed.dtype == np.uint8:
        blocks = 2 * blocks_of(k, "u8")  # strip block b j g c t p e h -> block b c j p e g t h
        q = (packed.view(np.uint8) ^ np.uint8(ZERO)).view(np.int8)
        order = q.reshape(strips, blocks // 2, 2, 2, 8, 4, 2, 2, 2, 2)
        order = order.transpose(0, 1, 2, 5, 3, 7, 8, 4, 6, 9)
        parts = order.reshape(strips, blocks * BLOCK, STRIP)
    elif packed.dtype.itemsize == 4:
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
