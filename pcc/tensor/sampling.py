"""Transforms of a next-token law: temperature, top-k and nucleus, per row.

Every op acts on the last axis; its settings are scalars of the row (or trained ones). A neutral
setting (temperature 1, top_k 0, top_p 1) returns the operand bit for bit, so that a row does not
depend on the settings of its neighbours.
"""

from __future__ import annotations

import numpy as np

from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import Type
from pcc.tensor.nn import NetworkOp


def _column(setting: Values, rank: int) -> Values:
    """Give a scalar per row the axes of a value of per-row rank `rank`."""
    return setting.reshape(*setting.shape, *([1] * rank))


class Temper(NetworkOp, name="t.temper"):
    """y = (x - max x) / T for T > 0; x for T = 1; for T <= 0: 0 at the first maximum, else -inf.

    Logits in, logits out, of the law p^(1/T). The maximum is taken out before the division, so that
    no T overflows.
    """

    x: Op
    temperature: Op

    def infer(self) -> Type:
        x, setting = tensor(self.x), tensor(self.temperature)
        ok = x.dtype == setting.dtype == "f32" and len(x.shape) > 0 and setting.shape == ()
        self.require(ok, "E110", f"logits {x}, temperature {setting}")
        return self.like(x.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, t = args[0], _column(args[1], len(tensor(self.x).shape))
        first = np.arange(x.shape[-1]) == x.argmax(axis=-1)[..., None]
        top = x.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):
            soft = (x - np.where(np.isneginf(top), 0.0, top)) / np.where(t > 0, t, 1.0)
        y = np.where(t > 0, soft, np.where(first, 0.0, -np.inf))
        return np.where(t == 1, x, y)


class Truncate(NetworkOp, name="t.truncate"):
    """Keep the largest entries of each row of `p`, and renormalise.

    In descending order (ties: lower index first), entry j stays if j < top_k (top_k <= 0: always)
    and if the mass before it, of what top_k left, is at most max(top_p, 0): the prefix with
    cumulative mass <= top_p plus the next entry. top_p >= 1 keeps all that top_k left.
    """

    p: Op
    top_k: Op
    top_p: Op

    def infer(self) -> Type:
        p, k, mass = tensor(self.p), tensor(self.top_k), tensor(self.top_p)
        ok = p.dtype == mass.dtype == "f32" and k.dtype == "i64" and len(p.shape) > 0
        ok = ok and k.shape == mass.shape == ()
        self.require(ok, "E110", f"law {p}, top_k {k}, top_p {mass}")
        return self.like(p.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        rank = len(tensor(self.p).shape)
        p, k, mass = args[0], _column(args[1], rank), _column(args[2], rank)
        order = np.argsort(-p, axis=-1, kind="stable")
        best = np.take_along_axis(p, order, axis=-1)
        among = (k <= 0) | (np.arange(p.shape[-1]) < k)
        best = np.where(among, best, 0.0)
        before = np.cumsum(best, axis=-1) - best
        total = best.sum(axis=-1, keepdims=True)
        stays = among & ((mass >= 1) | (before <= np.maximum(mass, 0.0) * total))
        kept = np.where(stays, best, 0.0)
        kept = kept / kept.sum(axis=-1, keepdims=True)
        y = np.zeros(kept.shape)
        np.put_along_axis(y, np.broadcast_to(order, kept.shape), kept, axis=-1)
        return np.where((k <= 0) & (mass >= 1), p, y)


__all__ = ["Temper", "Truncate"]
