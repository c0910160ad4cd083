"""Tensor ops element by element, and normalisations over the last axis."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import DTYPES, STORED, Type
from pcc.tensor.core import LOWEST, NUMBERS, TensorOp, finite


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
        x = args[0] - finite(args[0].max(axis=-1, keepdims=True))
        return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


class Cast(TensorOp, name="t.cast"):
    """Same values in another dtype."""

    x: Op
    dtype: str
    opaque = True
    stored = ("x",)

    def infer(self) -> Type:
        self.require(self.dtype in DTYPES, "E112", f"unknown dtype {self.dtype!r}")
        return self.like(self.takes(self.x, *STORED).shape, self.dtype)

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
