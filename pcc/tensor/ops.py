"""Tensor ops: arrays with a dtype, a per-row shape and maybe a batch axis; none knows about scopes.

Axes in attributes count the per-row shape only (0 is the first axis after the batch axis). Each op
has its meaning in NumPy (`eval`); those that are polynomials of their operands use the carrier's
arithmetic, so that they can also be checked in a finite field; the others are `opaque`.
"""

from __future__ import annotations

import math
import string
from typing import ClassVar

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring, rows, split_equation
from pcc.ir.types import BATCHES, DTYPES, Tensor, Type, join_batch


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


def _finite(top: Values) -> Values:
    """Replace -inf shifts, so that (-inf) - (-inf) cannot make a NaN."""
    return np.where(np.isneginf(top), 0.0, top)


# ---------------------------------------------------------------- leaves


class Input(TensorOp, name="t.input"):
    """A run-time argument, by name. `batch`: "b" one per row, "c" one or one per row."""

    key: str
    dtype: str
    batch: str
    shape: tuple[int, ...]

    def infer(self) -> Type:
        self.require(self.dtype in DTYPES, "E112", f"unknown dtype {self.dtype!r}")
        self.require(self.batch in BATCHES, "E112", f"unknown batch axis {self.batch!r}")
        return Tensor(self.dtype, self.shape, self.batch)


class Const(TensorOp, name="t.const"):
    """A trained array."""

    value: Array

    def infer(self) -> Type:
        return Tensor(self.value.dtype, self.value.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.const(self.value.value, self.value.ref)


# ---------------------------------------------------------------- movement


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


# ---------------------------------------------------------------- arithmetic


class Binary(TensorOp):
    """An element-wise op on two values of equal rank."""

    a: Op
    b: Op
    result: ClassVar[str] = ""
    accepts: ClassVar[tuple[str, ...]] = NUMBERS

    def infer(self) -> Type:
        ta, tb = self.takes(self.a, *self.accepts), tensor(self.b)
        self.require(ta.dtype == tb.dtype, "E112", f"operands are {ta} and {tb}")
        return self.like(self.broadcast(self.a, self.b), self.result or ta.dtype)


class Add(Binary, name="t.add"):
    """a + b."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.add(*args)


class Sub(Binary, name="t.sub"):
    """a - max(b, -3.4e38): -inf - (-inf) = -inf, the ratio of two zero probabilities is zero."""

    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        a, b = args
        return np.asarray(a - (np.maximum(b, LOWEST) if b.dtype.kind == "f" else b))


class Mul(Binary, name="t.mul"):
    """a * b."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.mul(*args)


class Div(Binary, name="t.div"):
    """a / b for b > 0; 0 where b = 0."""

    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        a, b = np.broadcast_arrays(*args)
        return np.where(b > 0, a / np.where(b > 0, b, 1), 0)


class Less(Binary, name="t.less"):
    """a < b."""

    result = "bool"
    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] < args[1])


class Equal(Binary, name="t.equal"):
    """a == b."""

    result = "bool"
    accepts = DTYPES
    opaque = True

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] == args[1])


class And(Binary, name="t.and"):
    """a and b."""

    accepts = ("bool",)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] & args[1])


class Or(Binary, name="t.or"):
    """a or b."""

    accepts = ("bool",)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] | args[1])


class Unary(TensorOp):
    """An element-wise op, or a normalisation over the last axis."""

    x: Op
    accepts: ClassVar[tuple[str, ...]] = ("f32",)
    opaque = True

    def infer(self) -> Type:
        return self.takes(self.x, *self.accepts)


class Normalisation(Unary):
    """A `Unary` over the last axis, which a value per row must have."""

    def infer(self) -> Type:
        t = self.takes(self.x, "f32")
        self.require(len(t.shape) > 0, "E110", "a scalar has no axis")
        self.filled(self.x, -1)
        return t


class Not(Unary, name="t.not"):
    """not x."""

    accepts = ("bool",)
    opaque = False

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(~args[0])


class Exp(Unary, name="t.exp"):
    """e^x; exp(-inf) = 0."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(np.exp(args[0]))


class Log(Unary, name="t.log"):
    """log x for x >= 0; log 0 = -inf."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(args[0]))


class Softmax(Normalisation, name="t.softmax"):
    """y_i = exp(x_i) / sum_j exp(x_j) over the last axis; a row of -inf gives equal shares."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        x = np.maximum(args[0], LOWEST)
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True))


class LogSoftmax(Normalisation, name="t.log_softmax"):
    """y_i = x_i - log sum_j exp(x_j) over the last axis; some x_i must be above -inf."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        x = args[0] - _finite(args[0].max(axis=-1, keepdims=True))
        return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


class Cast(TensorOp, name="t.cast"):
    """Same values in another dtype."""

    x: Op
    dtype: str
    opaque = True

    def infer(self) -> Type:
        self.require(self.dtype in DTYPES, "E112", f"unknown dtype {self.dtype!r}")
        return self.like(tensor(self.x).shape, self.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        kind = {"f32": np.float64, "i64": np.int64, "bool": np.bool_}[self.dtype]
        return args[0].astype(kind)


class Where(TensorOp, name="t.where"):
    """a where cond, else b."""

    cond: Op
    a: Op
    b: Op

    def infer(self) -> Type:
        self.require(tensor(self.cond).dtype == "bool", "E112", "the condition is not boolean")
        ta, tb = tensor(self.a), tensor(self.b)
        self.require(ta.dtype == tb.dtype, "E112", f"operands are {ta} and {tb}")
        return self.like(self.broadcast(self.cond, self.a, self.b), ta.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.where(*args)


# ---------------------------------------------------------------- reductions and contractions


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
        top = _finite(args[0].max(axis=self.at, keepdims=True))
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
    """Binary einsum over per-row axes; the batch axes broadcast."""

    a: Op
    b: Op
    eq: str

    def infer(self) -> Type:
        t, other = self.takes(self.a, *NUMBERS), tensor(self.b)
        self.require(t.dtype == other.dtype, "E112", f"operands are {t} and {other}")
        return self.like(_equation(self, self.eq, self.a, self.b), t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        return s.einsum(rows(self.eq), *args)


class LogContract(TensorOp, name="t.log_contract"):
    """log einsum(eq, exp(x), w): `x` in logs, shifted by its maxima; `w` linear."""

    x: Op
    w: Op
    eq: str
    opaque = True

    def infer(self) -> Type:
        for x in (self.x, self.w):
            self.takes(x, "f32")
        return self.like(_equation(self, self.eq, self.x, self.w))

    def eval(self, s: Semiring, *args: Values) -> Values:
        from pcc.ir.semiring import LogReal

        (tx, tw), out = split_equation(self.eq)
        return LogReal().contract(f"{tw},{tx}->{out}", args[1], args[0])


class MaxContract(TensorOp, name="t.max_contract"):
    """max-plus contraction over per-row axes: max over lost axes of (x + w); both in logs."""

    x: Op
    w: Op
    eq: str
    opaque = True

    def infer(self) -> Type:
        for x in (self.x, self.w):
            self.takes(x, "f32")
        return self.like(_equation(self, self.eq, self.x, self.w))

    def eval(self, s: Semiring, *args: Values) -> Values:
        from pcc.ir.semiring import MaxPlus

        (tx, tw), out = split_equation(self.eq)
        return MaxPlus().contract(f"{tx},{tw}->{out}", None, *args)


# ---------------------------------------------------------------- index ops


class Column(Unary, name="t.column"):
    """1 + min(max(x, -1), card): 1..card for a possible value, 0 or card + 1 for others; x i64.

    Tables with an empty column at each end need no further test of x.
    """

    card: int
    accepts = ("i64",)

    def infer(self) -> Type:
        self.require(self.card > 0, "E110", f"card is {self.card}, not positive")
        return super().infer()

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.clip(args[0], -1, self.card) + 1


class FloorDiv(Unary, name="t.floor_div"):
    """x // by for x >= 0, i64."""

    by: int
    accepts = ("i64",)

    def infer(self) -> Type:
        self.require(self.by > 0, "E110", f"cannot divide by {self.by}")
        return super().infer()

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] // self.by)


class Remainder(Unary, name="t.remainder"):
    """x mod by for x >= 0, i64."""

    by: int
    accepts = ("i64",)

    def infer(self) -> Type:
        self.require(self.by > 0, "E110", f"cannot divide by {self.by}")
        return super().infer()

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] % self.by)


class Lookup(TensorOp, name="t.lookup"):
    """y[f,k] = table[f,k,x[f]]; 0 <= x[f] < V must hold (clamp before)."""

    table: Op
    x: Op

    def infer(self) -> Type:
        t, x = tensor(self.table), tensor(self.x)
        ok = len(t.shape) == 3 and x.shape == t.shape[:1] and x.dtype == "i64"
        self.require(ok, "E110", f"cannot look up {x} in {t}")
        return self.like(t.shape[:2], t.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        table, x = args
        lead = np.broadcast_shapes(table.shape[:-3], x.shape[:-1])
        table = np.broadcast_to(table, (*lead, *table.shape[-3:]))
        index = np.broadcast_to(x[..., None, None], (*lead, *table.shape[-3:-1], 1))
        return np.take_along_axis(table, index, axis=-1)[..., 0]


class SelectRow(TensorOp, name="t.select_row"):
    """y[f,i] = w[f, sel[f], i]; 0 <= sel[f] < Ko must hold."""

    w: Op
    sel: Op

    def infer(self) -> Type:
        w, i = tensor(self.w), tensor(self.sel)
        ok = len(w.shape) == 3 and i.shape == w.shape[:1] and i.dtype == "i64"
        self.require(ok, "E110", f"cannot select rows {i} of {w}")
        return self.like((w.shape[0], w.shape[2]), w.dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        w, sel = args
        lead = np.broadcast_shapes(w.shape[:-3], sel.shape[:-1])
        w = np.broadcast_to(w, (*lead, *w.shape[-3:]))
        index = np.broadcast_to(sel[..., None, None], (*lead, w.shape[-3], 1, w.shape[-1]))
        return np.take_along_axis(w, index, axis=-2)[..., 0, :]


class ArgMax(TensorOp, name="t.argmax"):
    """Index of the largest element of the last axis; ties give the first."""

    x: Op
    opaque = True

    def infer(self) -> Type:
        t = tensor(self.x)
        self.require(len(t.shape) > 0, "E110", "a scalar has no axis")
        self.filled(self.x, -1)
        return self.like(t.shape[:-1], "i64")

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0].argmax(axis=-1))


class InverseCdf(TensorOp, name="t.inverse_cdf"):
    """First j with mass_j > 0 and cumsum_j > u * total, else the last j with mass_j > 0.

    `mass [F,V]` linear and non-negative, `u [F]` in [0, 1); total is the last element of the same
    cumsum. A zero-mass index is never returned unless all are zero (then 0).
    """

    mass: Op
    u: Op
    opaque = True

    def infer(self) -> Type:
        m, u = self.takes(self.mass, "f32"), self.takes(self.u, "f32")
        ok = len(m.shape) == 2 and u.shape == m.shape[:1]
        self.require(ok, "E110", f"mass {m}, uniforms {u}")
        return self.like(m.shape[:1], "i64")

    def eval(self, s: Semiring, *args: Values) -> Values:
        mass, u = args
        cum = np.cumsum(mass, axis=-1)
        hit = (mass > 0) & (cum > u[..., None] * cum[..., -1:])
        first = hit.argmax(axis=-1)
        v = mass.shape[-1]
        last = v - 1 - (mass > 0)[..., ::-1].argmax(axis=-1)
        return np.where(hit.any(axis=-1), first, np.where((mass > 0).any(axis=-1), last, 0))
