"""Matrices as 8-bit integers with one scale for each output: W[d,k] ~ q[d,k] s[k].

    s[k] = max_d |W[d,k]| / 127,   q = round(W / s), in -127 .. 127: off by at most s / 2.

Symmetric, so that x W = (x q) s needs no sum of x; one scale for an output, so that it meets the
sum once, at its end. Weights of an output are about normal: their largest is some 4 standard
deviations, and q is off by 1 % of one. Arrays that are not in memory are read once for the scales,
and again when the integers are needed, by blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Values
from pcc.ir.noise import Noise
from pcc.ir.recipe import Recipe, named
from pcc.ir.types import INT8

LEVELS = 127  # the largest integer, of either sign
BLOCK = 256  # outputs, or rows, that are made at once


def scales(rows: Values) -> Values:
    """Return s[k] = max_d |rows[k,d]| / 127 as f32. Errors: E107 (an infinite weight)."""
    top = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)
    if not np.isfinite(top).all():
        raise PccError("E107", "an infinite weight has no 8-bit form", hint="compile without int8")
    step: Values = top / np.float32(LEVELS)
    return step


def integers(rows: Values, scale: Values) -> Values:
    """Return round(rows[k,d] / scale[k]) as i8; zeros where the scale is zero."""
    step = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(rows / step[:, None]), -LEVELS, LEVELS).astype(np.int8)


def by_rows(array: Array) -> tuple[Array, Array]:
    """Return (q, s) of `array` f32, an output for each index of all axes but the last."""
    kept, width = array.shape[:-1], array.shape[-1]
    count = array.size // width
    if array.recipe is not None and array.recipe.noise is not None:
        return _of_noise(array, kept)
    read = _rows_of(array, width)
    starts = range(0, count, BLOCK)
    scale = np.concatenate([scales(read(i, min(i + BLOCK, count))) for i in starts])

    def part(start: int, stop: int) -> Values:
        first, last = start // width, -(-stop // width)
        made = integers(read(first, last), scale[first:last]).reshape(-1)
        return made[start - first * width : stop - first * width]

    identity = named("int8 by rows", array.recipe.identity) if array.recipe is not None else ""
    return _made(array, Recipe(identity, part)), Array.of(scale.reshape(kept))


def _rows_of(array: Array, width: int) -> Callable[[int, int], Values]:
    recipe = array.recipe
    if recipe is None or recipe.whole is not None:  # of a turned array any part costs as much
        flat = array.value.reshape(-1, width)
        return lambda i, j: flat[i:j]
    return lambda i, j: recipe.part(i * width, j * width).reshape(-1, width)


def by_columns(array: Array) -> tuple[Array, Array]:
    """Return (q, s) of `array [D,K]` f32, an output for each column."""
    recipe = array.recipe
    if recipe is not None and recipe.noise is not None:
        return _of_noise(array, array.shape[1:])
    if recipe is not None and recipe.columns is not None:
        made, scale = recipe.columns()
        return _made(array, made), Array.of(scale)
    values = array.value
    scale = scales(values.T)
    out = np.empty(values.shape, np.int8)
    for i in range(0, len(values), BLOCK):
        out[i : i + BLOCK] = integers(values[i : i + BLOCK].T, scale).T
    return Array.adopt(out), Array.of(scale)


def _made(array: Array, recipe: Recipe) -> Array:
    """Return the integers: now, if `array` is in memory."""
    if array.recipe is not None:
        return Array.lazy(INT8, array.shape, recipe)
    return Array.adopt(recipe.part(0, array.size).reshape(array.shape))


def _of_noise(array: Array, kept: tuple[int, ...]) -> tuple[Array, Array]:
    """Return random numbers with the scale of the block that they are runs of, for every output."""
    assert array.recipe is not None
    assert array.recipe.noise is not None
    noise = Noise(*array.recipe.noise)
    q = Array.lazy(INT8, array.shape, noise.recipe(INT8))
    return q, Array.of(np.full(kept, noise.step, np.float32))
