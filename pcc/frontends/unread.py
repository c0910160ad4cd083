"""Large tensors of a checkpoint that stay where they are until their numbers are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.recipe import Recipe, named

Values = np.ndarray[Any, Any]
LARGE = 1 << 22  # elements of a tensor that is not read at once


class Shaped:
    """Numbers that are not there yet, with the attributes of an array that say their shape.

    `np.asarray` makes all of them.
    """

    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unread(Shaped):
    """A tensor of real numbers, f32 once it is read: `read(start, stop)` in row-major order."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Values]
    identity: str
    at: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        return np.asarray(self.array().value, dtype)

    def array(self) -> Array:
        """Return it as a trained array that is made when it is needed."""
        return Array.lazy("f32", self.shape, Recipe(named("unread", self.identity), self._finite))

    def _finite(self, start: int, stop: int) -> Values:
        """Return some numbers. Errors: F112 (NaN or infinity)."""
        with np.errstate(over="ignore"):
            part = np.asarray(self.read(start, stop), np.float32)
        if not np.isfinite(part).all():
            name = "NaN" if np.isnan(part).any() else "infinite"
            hint = "use a checkpoint from an earlier step"
            raise PccError("F112", f"holds {name} values", at=self.at, hint=hint)
        return part


def trained(values: Values | Unread) -> Array:
    """Return a tensor as a trained array."""
    return values.array() if isinstance(values, Unread) else Array.of(values)


def floats(value: Any, at: str) -> Any:
    """Return contiguous float32 values. Errors: F112 (not real numbers, NaN or infinite)."""
    if isinstance(value, Unread):
        return value  # its numbers are checked when they are read
    if value.dtype.kind != "f":
        raise PccError("F112", f"holds {value.dtype} values, not floats", at=at)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(value, dtype=np.float32)
    for i, part in enumerate(result if result.ndim > 2 else [result]):
        if not np.isfinite(part).all():
            name = "NaN" if np.isnan(part).any() else "infinite"
            what = f"holds {name} values (fold {i})"
            raise PccError("F112", what, at=at, hint="use a checkpoint from an earlier step")
    return result


def parts(values: Values | Unread) -> Iterator[memoryview]:
    """Yield the bytes of float32 numbers in row-major order, one part in memory at a time."""
    if isinstance(values, Unread):
        yield from (part.data for part in values.array().parts())
    else:
        yield np.ascontiguousarray(values, dtype="<f4").data
