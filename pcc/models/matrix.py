"""Stored matrices that are read when they are needed, by blocks of rows.

A model of 6.5 billion numbers is compiled in the memory of its largest matrix: what the IR holds is
an array with a recipe (`pcc.ir.recipe`), and each reader makes the numbers anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array, dtype_of, finite_cast
from pcc.ir.quantise import integers, scales
from pcc.ir.recipe import Recipe, named

Values: TypeAlias = np.ndarray[Any, Any]
BLOCK = 256  # rows that are read and rounded at once
LANES = 16  # rows that are turned at once: four times as fast as 256


@dataclass(frozen=True)
class Matrix:
    """A matrix `[K, D]` of finite numbers somewhere else.

    `rows(start, stop)` reads some of them, as floats of any width. `identity`: of two matrices
    equal only if their numbers are. `at`: what errors call it.
    """

    identity: str
    shape: tuple[int, int]
    rows: Callable[[int, int], Values]
    at: str = ""

    def __len__(self) -> int:
        return self.shape[0]

    def cut(self, start: int, stop: int) -> Matrix:
        """Return rows `start..stop-1` as a matrix of their own."""
        return replace(
            self,
            identity=named("cut", self.identity, start, stop),
            shape=(stop - start, self.shape[1]),
            rows=lambda i, j: self.rows(start + i, start + j),
        )

    def blocks(self) -> Iterator[Values]:
        """Yield all rows, `BLOCK` at a time."""
        for i in range(0, len(self), BLOCK):
            yield self.rows(i, min(i + BLOCK, len(self)))

    def array(self, dtype: str, shape: tuple[int, ...]) -> Array:
        """Return the numbers in row-major order as a trained array of another shape."""
        return Array.lazy(dtype, shape, self.in_order(dtype))

    def beside(self, others: Sequence[Matrix], dtype: str) -> Array:
        """Return `[D, sum K]`: this matrix and `others` turned, side by side."""
        shape = (self.shape[1], len(self) + sum(map(len, others)))
        return Array.lazy(dtype, shape, self.turned(others, dtype))

    def in_order(self, dtype: str) -> Recipe:
        """Return the recipe of the numbers, row by row."""
        width = self.shape[1]

        def read(start: int, stop: int) -> Values:
            first, last = start // width, -(-stop // width)
            flat = finite_cast(self.rows(first, last), dtype, self.at).reshape(-1)
            return flat[start - first * width : stop - first * width]

        return Recipe(named("in order", self.identity, dtype), read, cast=self.in_order)

    def turned(self, others: Sequence[Matrix], dtype: str) -> Recipe:
        """Return the recipe of `[D, sum K]`."""
        all_of = (self, *others)
        shape = (self.shape[1], sum(map(len, all_of)))

        def whole() -> Values:
            out, at = np.empty(shape, dtype_of(dtype)), 0
            for m in all_of:
                for block in m.blocks():
                    block = finite_cast(block, dtype, m.at)
                    for i in range(0, len(block), LANES):
                        lanes = block[i : i + LANES]
                        out[:, at + i : at + i + len(lanes)] = lanes.T
                    at += len(block)
            return out

        def read(start: int, stop: int) -> Values:
            return whole().reshape(-1)[start:stop]

        identity = named("turned", *(m.identity for m in all_of), dtype)
        return Recipe(identity, read, whole, cast=lambda kind: self.turned(others, kind),
                      columns=lambda: _in_integers(all_of))  # fmt: skip


def _in_integers(all_of: Sequence[Matrix]) -> tuple[Recipe, Values]:
    """Return the recipe of [D, sum K] as 8-bit integers, and the scale of each column."""
    scale = np.concatenate([_scales(m) for m in all_of])
    shape = (all_of[0].shape[1], len(scale))

    def whole() -> Values:
        out, at = np.empty(shape, np.int8), 0
        for m in all_of:
            for block in m.blocks():
                out[:, at : at + len(block)] = integers(block, scale[at : at + len(block)]).T
                at += len(block)
        return out

    def read(start: int, stop: int) -> Values:
        return whole().reshape(-1)[start:stop]

    return Recipe(named("int8 turned", *(m.identity for m in all_of)), read, whole), scale


def _scales(m: Matrix) -> Values:
    try:
        return np.concatenate([scales(block) for block in m.blocks()])
    except PccError as e:
        raise PccError(e.code, e.what, at=e.at or m.at, hint=e.hint) from None


def cut(m: Values | Matrix, start: int, stop: int) -> Values | Matrix:
    """Return rows `start..stop-1`."""
    return m.cut(start, stop) if isinstance(m, Matrix) else np.ascontiguousarray(m[start:stop])


def held(a: Values) -> Matrix:
    """Return a matrix that is in memory, e.g. beside larger ones that are not."""
    content = hashlib.sha256(np.ascontiguousarray(a).data).hexdigest()
    rows, width = a.shape
    return Matrix(named(a.dtype.str, a.shape, content), (rows, width), lambda i, j: a[i:j])


def equal(a: Values | Matrix, b: Values | Matrix) -> bool:
    """Whether two matrices hold the same numbers, read block by block."""
    if a.shape != b.shape:
        return False
    if isinstance(a, Matrix) and isinstance(b, Matrix) and a.identity == b.identity:
        return True

    def some(x: Values | Matrix, i: int) -> Values:
        stop = min(i + BLOCK, len(x))
        return x.rows(i, stop) if isinstance(x, Matrix) else x[i:stop]

    return all(np.array_equal(some(a, i), some(b, i)) for i in range(0, len(a), BLOCK))
