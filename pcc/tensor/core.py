"""Values: the base of tensor ops, and the leaves of expressions, inputs and trained arrays.

Axes in attributes count the per-row shape only (0 is the first axis after the batch axis). Each op
has its meaning in NumPy (`eval`); those that are polynomials of their operands use the carrier's
arithmetic, so that they can also be checked in a finite field; the others are `opaque`.
"""

from __future__ import annotations

import numpy as np

from pcc.ir.array import Array, rounded, widened
from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import BATCHES, HALVES, STORED, Tensor, Type, join_batch


class TensorOp(Op):
    """A value of tensor type."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        """Return this node's value from those of its operands."""
        raise NotImplementedError(self.name)

    def like(self, shape: tuple[int, ...], dtype: str = "f32") -> Tensor:
        """Return the type of a result whose batch axis is the join of the operands'."""
        return Tensor(dtype, shape, join_batch(*(tensor(a).batch for a in self.args)))

    def broadcast(self, *xs: Op) -> tuple[int, ...]:
        """Return the common shape of operands of equal rank (size-1 axes stretch)."""
        shapes = [tensor(x).shape for x in xs]
        self.require(len({len(s) for s in shapes}) == 1, "E110", f"ranks differ: {shapes}")
        for sizes in zip(*shapes, strict=True):
            self.require(len({n for n in sizes if n != 1}) <= 1, "E110", f"shapes {shapes}")
        return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes, strict=True))

    def axis_of(self, x: Op, axis: int) -> int:
        """Return `axis` counted from the end, as NumPy takes it with or without a batch axis."""
        rank = len(tensor(x).shape)
        self.require(0 <= axis < rank, "E111", f"axis {axis} of a rank-{rank} value")
        return axis - rank

    def takes(self, x: Op, *dtypes: str) -> Tensor:
        """Return the type of an operand, whose dtype must be one of these."""
        t = tensor(x)
        self.require(t.dtype in dtypes, "E112", f"the operand is {t}, expected {dtypes}")
        return t

    def filled(self, x: Op, axis: int) -> None:
        """Refuse an axis without elements: it has no largest element, no product to start from."""
        self.require(tensor(x).shape[axis] > 0, "E110", f"{tensor(x)} has an empty axis")


NUMBERS = ("f32", "i64")
LOWEST = -3.4e38  # stands in for -inf where a difference would make a NaN


def finite(top: Values) -> Values:
    """Replace -inf shifts, so that (-inf) - (-inf) cannot make a NaN."""
    return np.where(np.isneginf(top), 0.0, top)


def stored_as(x: Values, like: Op, s: Semiring) -> Values:
    """Round `x` to the dtype of `like` if that is f16 or bf16, as an op on stored halves does.

    Exact carriers do not round: there the op is what it would be of real numbers.
    """
    dtype = tensor(like).dtype
    if dtype not in HALVES or s.exact:
        return x
    return rounded(x, dtype).astype(x.dtype)


# ---------------------------------------------------------------- leaves


class Input(TensorOp, name="t.input"):
    """A run-time argument, by name. `batch`: "b" one per row, "c" one or one per row."""

    key: str
    dtype: str
    batch: str
    shape: tuple[int, ...]

    def infer(self) -> Type:
        self.require(self.dtype in STORED, "E112", f"unknown dtype {self.dtype!r}")
        self.require(self.batch in BATCHES, "E112", f"unknown batch axis {self.batch!r}")
        return Tensor(self.dtype, self.shape, self.batch)


class Const(TensorOp, name="t.const"):
    """A trained array."""

    value: Array

    def infer(self) -> Type:
        return Tensor(self.value.dtype, self.value.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.const(widened(self.value.value), self.value.ref)
