"""Tensor ops that remove axes: reductions, running sums and products, contractions."""

from __future__ import annotations

import string
from typing import ClassVar

import numpy as np

from pcc.ir.array import rounded
from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import LogReal, MaxPlus, Semiring, rows, split_equation
from pcc.ir.types import HALVES, INT8, Type
from pcc.tensor.core import NUMBERS, TensorOp, finite, stored_as


class Reduction(TensorOp):
    """A reduction of one axis, which is removed."""

    x: Op
    axis: int
    accepts: ClassVar[tuple[str, ...]] = NUMBERS

    def infer(self) -> Type:
        t = self.takes(self.x, *self.accepts)
        a = self.axis_of(self.x, self.axis) + len(t.shape)
        self.filled(self.x, a)
        return self.like((*t.shape[:a], *t.shape[a + 1 :]), t.dtype)

    @property
    def at(self) -> int:
        """The axis, counted from the end."""
        return self.axis_of(self.x, self.axis)


class ReduceSum(Reduction, name="t.reduce_sum"):
    """Sum over an axis."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        a = args[0].ndim + self.at
        letters = string.ascii_letters[: args[0].ndim]
        return s.einsum(f"{letters}->{letters[:a]}{letters[a + 1 :]}", args[0])


class ReduceProd(Reduction, name="t.reduce_prod"):
    """Product over an axis."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        parts = np.moveaxis(args[0], self.at, 0)
        y: Values = parts[0]
        for p in parts[1:]:
            y = s.mul(y, p)
        return y


class ReduceMax(Reduction, name="t.reduce_max"):
    """Largest element over an axis."""

    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0].max(axis=self.at))


class ReduceLse(Reduction, name="t.reduce_lse"):
    """log sum exp over an axis, shifted by the maximum; all -inf gives -inf."""

    accepts = ("f32",)
    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        top = finite(args[0].max(axis=self.at, keepdims=True))
        with np.errstate(divide="ignore"):
            total = np.log(np.exp(args[0] - top).sum(axis=self.at))
        return np.asarray(total + np.squeeze(top, axis=self.at))


class Cumsum(TensorOp, name="t.cumsum"):
    """Running sum over an axis: y_j = sum_{i<=j} x_i, or sum_{i<j} x_i if exclusive."""

    x: Op
    axis: int
    exclusive: bool
    opaque = True

    def infer(self) -> Type:
        self.axis_of(self.x, self.axis)
        return self.takes(self.x, *NUMBERS)

    def eval(self, s: Semiring, *args: Values) -> Values:
        a = self.axis_of(self.x, self.axis)
        if not self.exclusive:
            return np.cumsum(args[0], axis=a)
        moved = np.moveaxis(args[0], a, 0)
        first = np.zeros_like(moved[:1])
        return np.moveaxis(np.cumsum(np.concatenate([first, moved[:-1]]), axis=0), 0, a)


class CumProd(TensorOp, name="t.cumprod"):
    """Exclusive running product over an axis: y_j = prod_{i<j} x_i (y_0 = 1)."""

    x: Op
    axis: int

    def infer(self) -> Type:
        self.filled(self.x, self.axis_of(self.x, self.axis))
        return self.takes(self.x, *NUMBERS)

    def eval(self, s: Semiring, *args: Values) -> Values:
        moved = np.moveaxis(args[0], self.axis_of(self.x, self.axis), 0)
        y = [moved[0] * 0 + 1]
        for x in moved[:-1]:
            y.append(s.mul(y[-1], x))
        return np.moveaxis(np.stack(y), 0, self.axis_of(self.x, self.axis))


def _equation(op: TensorOp, eq: str, *xs: Op) -> tuple[int, ...]:
    op.require(eq.count("->") == 1, "E113", f"{eq!r} is not of the form 'ab,bc->ac'")
    terms, out = split_equation(eq)
    op.require(all(c.isalpha() and c.isascii() for c in "".join(terms)), "E113", f"{eq!r}")
    sizes: dict[str, int] = {}
    op.require(len(terms) == len(xs), "E113", f"{eq!r} has {len(terms)} operands")
    for t, x in zip(terms, xs, strict=True):
        shape = tensor(x).shape
        op.require(len(t) == len(shape) == len(set(t)), "E113", f"{eq!r} on {shape}")
        for c, n in zip(t, shape, strict=True):
            op.require(
                sizes.setdefault(c, n) == n, "E113", f"{eq!r}: axis {c!r} is {sizes[c]}, {n}"
            )
    known = all(c in sizes for c in out) and len(out) == len(set(out))
    op.require(known, "E113", f"{eq!r} has an unbound or repeated result axis")
    return tuple(sizes[c] for c in out)


class Contract(TensorOp, name="t.contract"):
    """Binary einsum over per-row axes; the batch axes broadcast.

    If `b` is f16 or bf16, the f32 `a` is rounded to it; products are exact, sums and result wide.
    """

    a: Op
    b: Op
    eq: str
    stored = ("b",)

    def infer(self) -> Type:
        t, other = self.takes(self.a, *NUMBERS), tensor(self.b)
        same = t.dtype == ("f32" if other.dtype in HALVES else other.dtype)
        self.require(same, "E112", f"operands are {t} and {other}")
        return self.like(_equation(self, self.eq, self.a, self.b), t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.einsum(rows(self.eq), stored_as(args[0], self.b, s), args[1])


class ScaledContract(TensorOp, name="t.scaled_contract"):
    """Binary einsum with integers `b` i8, times `scale` f32, one for each of b's kept indices.

    y = einsum(eq, x, b) scale, where x is `a` rounded to `dtype` (f32: as it is): W = b scale is a
    matrix in 8 bits, and as an index of `scale` is one of the result, the sums are scaled once, at
    their end. `scale` has b's axes that the result has, in b's order. Products are exact, sums and
    result wide.
    """

    a: Op
    b: Op
    scale: Op
    eq: str
    dtype: str
    stored = ("b",)

    def infer(self) -> Type:
        self.takes(self.a, "f32")
        b, scale = self.takes(self.b, INT8), self.takes(self.scale, "f32")
        self.require(self.dtype in ("f32", *HALVES), "E112", f"x cannot be {self.dtype!r}")
        shape = _equation(self, self.eq, self.a, self.b)
        (_, letters), _ = split_equation(self.eq)
        kept = tuple(n for c, n in zip(letters, b.shape, strict=True) if c in self.kept)
        ok = scale.shape == kept and not scale.batch
        self.require(ok, "E110", f"the scales are {scale}, of {b} the indices {kept} are kept")
        return self.like(shape)

    @property
    def kept(self) -> str:
        """The letters of `b` that the result has: those of `scale`."""
        (_, letters), out = split_equation(self.eq)
        return "".join(c for c in letters if c in out)

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, b, scale = args
        if self.dtype in HALVES and not s.exact:
            x = rounded(x, self.dtype).astype(x.dtype)
        out = split_equation(self.eq)[1]
        y = s.einsum(rows(self.eq), x, b)
        return s.einsum(rows(f"{out},{self.kept}->{out}"), y, scale)


class LogOperand(TensorOp):
    """A contraction of `x`, in logs, with `w` over per-row axes; a result in logs."""

    x: Op
    w: Op
    eq: str
    opaque = True

    def infer(self) -> Type:
        for x in (self.x, self.w):
            self.takes(x, "f32")
        return self.like(_equation(self, self.eq, self.x, self.w))


class LogContract(LogOperand, name="t.log_contract"):
    """log einsum(eq, exp(x), w): `x` in logs, shifted by its maxima; `w` linear."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        (tx, tw), out = split_equation(self.eq)
        return LogReal().contract(f"{tw},{tx}->{out}", args[1], args[0])


class MaxContract(LogOperand, name="t.max_contract"):
    """max-plus contraction over per-row axes: max over lost axes of (x + w); both in logs."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        (tx, tw), out = split_equation(self.eq)
        return MaxPlus().contract(f"{tx},{tw}->{out}", None, *args)
