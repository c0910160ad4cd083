"""Rows of integers with a scale: w[.., k] ~ s[..] q[.., k], |q| < 2^(bits-1), bits from 2 to 8.

A tensor T stored so is `T` and `T.scale` (T's shape without its last axis, floating point):
coded  `T` U8 and `T.streams` hold q as an entropy code (`pcc.frontends.coded`): what is written.
int8   `T` holds q, dtype I8.
packed `T` holds u = q + 2^(bits-1) in `bits` bits each, the highest bit first, one after another:
       dtype U8, last axis K bits / 8 bytes; `T.bits` is a scalar U8. K bits is a multiple of 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pcc.errors import PccError

Array = np.ndarray[Any, Any]
SCALE, BITS = ".scale", ".bits"
_CHUNK = 1 << 16  # rows that are unpacked at once


def quantise(value: Array, bits: int = 8) -> tuple[Array, Array]:
    """Return q i8 and fp16 scales: the largest entry of a row becomes 2^(bits-1) - 1."""
    x = np.asarray(value, np.float32)
    top = np.float32(2 ** (bits - 1) - 1)
    scale = (np.abs(x).max(axis=-1) / top).astype(np.float16)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    return np.clip(np.rint(x / safe), -top, top).astype(np.int8), scale


def packed_width(stored: int, bits: int) -> int:
    """Return K of `stored` bytes, 0 where they hold no whole number of integers."""
    return stored * 8 // bits if 2 <= bits <= 8 and stored * 8 % bits == 0 else 0


def unpack(stored: Array, bits: int) -> Array:
    """Return u8[.., K bits / 8] as i8[.., K]."""
    width = packed_width(stored.shape[-1], bits)
    flat = stored.reshape(-1, stored.shape[-1])
    out = np.empty((len(flat), width), np.int8)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    for at in range(0, len(flat), _CHUNK):
        each = np.unpackbits(flat[at : at + _CHUNK], axis=-1).reshape(-1, width, bits)
        u = (each * weights).sum(-1, dtype=np.int16)
        out[at : at + _CHUNK] = u - (1 << (bits - 1))
    return out.reshape(*stored.shape[:-1], width)


def bits_of(stored: Array, bits: Array | None, at: str) -> int:
    """Return how many bits a number of packed rows takes. Errors: F113 (none that fits them)."""
    size = 0 if bits is None or bits.size != 1 or bits.dtype != np.uint8 else int(bits.item())
    if not stored.ndim or not packed_width(stored.shape[-1], size):
        what = f"rows {list(stored.shape)} of bytes hold no integers of {size} bits"
        raise PccError("F113", what, at=f"{at}{BITS}", hint="bits: a scalar U8 from 2 to 8")
    return size


def integers(stored: Array, bits: Array | None, at: str) -> Array:
    """Return q i8[.., K] of int8 or packed rows. Errors: F113 (bits that do not fit the rows)."""
    return unpack(stored, bits_of(stored, bits, at)) if stored.dtype == np.uint8 else stored


def expect_scale(shape: tuple[int, ...], scale: Array, at: str) -> None:
    """Check the scales of rows of this shape. Errors: F113."""
    if not shape or scale.shape != shape[:-1] or scale.dtype.kind != "f":
        what = f"scales {scale.dtype} {scale.shape} for rows {shape}"
        raise PccError("F113", what, at=f"{at}{SCALE}")


def restore(rows: Array, scale: Array, at: str) -> Array:
    """Return s q as float32. Errors: F113 (scales that do not fit the rows)."""
    expect_scale(rows.shape, scale, at)
    with np.errstate(over="ignore", invalid="ignore"):
        made = rows.astype(np.float32)
        made *= np.asarray(scale, np.float32)[..., None]  # in place: it may be most of the memory
        return made
