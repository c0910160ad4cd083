"""Tensor ops that move elements: shapes, orders, selections, joins."""

from __future__ import annotations

import math

import numpy as np

from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import Type
from pcc.tensor.core import TensorOp


class Reshape(TensorOp, name="t.reshape"):
    """Same elements in row-major order, new shape."""

    x: Op
    shape: tuple[int, ...]

    def infer(self) -> Type:
        t = tensor(self.x)
        same = math.prod(t.shape) == math.prod(self.shape)
        self.require(same, "E110", f"cannot reshape {t.shape} to {self.shape}")
        return self.like(self.shape, t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        lead = args[0].shape[: args[0].ndim - len(tensor(self.x).shape)]
        return args[0].reshape((*lead, *self.shape))


class Transpose(TensorOp, name="t.transpose"):
    """y[i_perm[0], i_perm[1], ...] = x[i_0, i_1, ...]."""

    x: Op
    perm: tuple[int, ...]

    def infer(self) -> Type:
        t = tensor(self.x)
        ok = sorted(self.perm) == list(range(len(t.shape)))
        self.require(ok, "E111", f"{self.perm} does not permute {len(t.shape)} axes")
        return self.like(tuple(t.shape[p] for p in self.perm), t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        lead = args[0].ndim - len(self.perm)
        return args[0].transpose(*range(lead), *(lead + p for p in self.perm))


class Take(TensorOp, name="t.take"):
    """Static selection along an axis: y[.., j, ..] = x[.., indices[j], ..]."""

    x: Op
    axis: int
    indices: tuple[int, ...]

    def infer(self) -> Type:
        t = tensor(self.x)
        a = self.axis_of(self.x, self.axis) + len(t.shape)
        ok = len(self.indices) > 0 and all(0 <= i < t.shape[a] for i in self.indices)
        self.require(ok, "E109", f"indices {self.indices} are not within 0..{t.shape[a] - 1}")
        return self.like((*t.shape[:a], len(self.indices), *t.shape[a + 1 :]), t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.take(args[0], self.indices, axis=self.axis_of(self.x, self.axis))


class Concat(TensorOp, name="t.concat"):
    """Join values along an axis."""

    xs: tuple[Op, ...]
    axis: int

    def infer(self) -> Type:
        self.require(len(self.xs) > 0, "E103", "needs at least one operand")
        ts = [tensor(x) for x in self.xs]
        a = self.axis_of(self.xs[0], self.axis) + len(ts[0].shape)
        rests = {(t.dtype, t.shape[:a], t.shape[a + 1 :]) for t in ts}
        self.require(len(rests) == 1, "E110", f"cannot join {[str(t) for t in ts]} on axis {a}")
        total = sum(t.shape[a] for t in ts)
        return self.like((*ts[0].shape[:a], total, *ts[0].shape[a + 1 :]), ts[0].dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        rank = len(tensor(self.xs[0]).shape)
        lead = np.broadcast_shapes(*(a.shape[: a.ndim - rank] for a in args))
        full = [np.broadcast_to(a, (*lead, *a.shape[a.ndim - rank :])) for a in args]
        return np.concatenate(full, axis=self.axis_of(self.xs[0], self.axis))


class Expand(TensorOp, name="t.expand"):
    """Repeat `x` for every row that `like` has; its per-row axes of size 1 stretch to `shape`."""

    x: Op
    like_: Op
    shape: tuple[int, ...]

    def infer(self) -> Type:
        t = tensor(self.x)
        ok = len(t.shape) == len(self.shape) and all(
            a in (1, b) for a, b in zip(t.shape, self.shape, strict=True)
        )
        self.require(ok, "E110", f"cannot stretch {t.shape} to {self.shape}")
        return self.like(self.shape, t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, other = args
        lead = np.broadcast_shapes(
            x.shape[: x.ndim - len(self.shape)],
            other.shape[: other.ndim - len(tensor(self.like_).shape)],
        )
        return np.broadcast_to(x, (*lead, *self.shape))
