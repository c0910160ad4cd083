"""Tensor ops on indices: look-ups, selections, the largest element, draws."""

from __future__ import annotations

import numpy as np

from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import HALVES, INT8, Type
from pcc.tensor.arithmetic import Unary
from pcc.tensor.core import TensorOp


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


class Division(Unary):
    """An integer division by a positive number."""

    by: int
    accepts = ("i64",)

    def infer(self) -> Type:
        self.require(self.by > 0, "E110", f"cannot divide by {self.by}")
        return super().infer()


class FloorDiv(Division, name="t.floor_div"):
    """x // by for x >= 0, i64."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(args[0] // self.by)


class Remainder(Division, name="t.remainder"):
    """x mod by for x >= 0, i64."""

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
    """y[f,i] = w[f, sel[f], i]; 0 <= sel[f] < Ko must hold. Rows of a half `w` are widened."""

    w: Op
    sel: Op
    stored = ("w",)

    def infer(self) -> Type:
        w, i = tensor(self.w), tensor(self.sel)
        ok = len(w.shape) == 3 and i.shape == w.shape[:1] and i.dtype == "i64" and w.dtype != INT8
        self.require(ok, "E110", f"cannot select rows {i} of {w}")
        return self.like((w.shape[0], w.shape[2]), "f32" if w.dtype in HALVES else w.dtype)

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


class Trajectory(TensorOp, name="t.trajectory"):
    """y[0] = maps[0, start[0]], y[t] = maps[t, y[t-1]]: where a state goes, map after map.

    `maps [T,K]` i64, `start [1]` i64; 0 <= maps[t,k], start[0] < K must hold.
    """

    maps: Op
    start: Op

    def infer(self) -> Type:
        maps, start = self.takes(self.maps, "i64"), self.takes(self.start, "i64")
        ok = len(maps.shape) == 2 and all(maps.shape) and start.shape == (1,)
        self.require(ok, "E110", f"maps {maps}, start {start}")
        return self.like(maps.shape[:1], "i64")

    def eval(self, s: Semiring, *args: Values) -> Values:
        maps, start = args
        lead = np.broadcast_shapes(maps.shape[:-2], start.shape[:-1])
        maps = np.broadcast_to(maps, (*lead, *maps.shape[-2:]))
        y, out = np.broadcast_to(start, (*lead, 1)), []
        for step in range(maps.shape[-2]):
            y = np.take_along_axis(maps[..., step, :], y, axis=-1)
            out.append(y)
        return np.concatenate(out, axis=-1)
