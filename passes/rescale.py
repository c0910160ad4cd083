"""Linear values with a scale of their own: v[f,k] = s[f,k] exp(e[f]), s within float32's range.

A weighted sum with positive trained weights w mixes its inputs to values that lie close to each
other, whatever the inputs are: max_o y_o / min_o y_o <= max_i (max_o w_oi / min_o w_oi). Divided by
its largest entry, such a value lies within [1/spread, 1], so that a circuit of any depth stays in
linear arithmetic, with one logarithm of one number per row and rescaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcc.ir.core import Op, Values, postorder, tensor
from pcc.passes.ranges import Bounds
from pcc.tensor import ops as t

MIX = "fi,foi->fo"


@dataclass(frozen=True)
class Span:
    """Bounds of the positive entries of s, and of their ratio within a row."""

    low: float
    high: float
    spread: float
    scaled: bool  # whether e may differ from zero


class Spans:
    """The spans of a module's nodes, and which nodes are rescaled where they are made."""

    def __init__(self, roots: tuple[Op, ...], have: dict[Op, Bounds], limits: Bounds) -> None:
        self.have, (self.low, self.high) = have, limits
        self.of: dict[Op, Span] = {}
        self.rescaled: set[Op] = set()
        for n in postorder(*roots):
            shape = getattr(n.type, "shape", ())
            if len(shape) == 2 and not isinstance(n, t.Const):
                span = self._span(n)
                if span is not None and self.low <= span.low and span.high <= self.high:
                    self.of[n] = span

    def scaled(self, n: Op) -> bool:
        """Whether `n` is the product of a significand and a scale of its own."""
        return n in self.of and self.of[n].scaled

    def _span(self, n: Op) -> Span | None:
        match n:
            case t.Contract(a=a, b=t.Const(value=w), eq=eq) if eq == MIX and a in self.of:
                return self._mixed(n, self.of[a], w.value)
            case t.Mul(a=a, b=b) if a in self.of and b in self.of:
                if tensor(a).shape != tensor(b).shape:
                    return self._plain(n)
                x, y = self.of[a], self.of[b]
                low, high = x.low * y.low, x.high * y.high
                return Span(low, high, x.spread * y.spread, x.scaled or y.scaled)
            case t.Take(x=x, axis=0) if x in self.of:
                return self.of[x]
            case _:
                return self._plain(n)

    def _plain(self, n: Op) -> Span | None:
        if n not in self.have:
            return None
        low, high = self.have[n]
        if low < self.low:  # products of many small numbers may leave float64 as well
            return None
        return Span(low, high, high / low, scaled=False)

    def _mixed(self, n: Op, x: Span, w: Values) -> Span | None:
        if not np.isfinite(w).all() or not (w > 0).all():
            return self._plain(n)
        spread = float((w.max(axis=1) / w.min(axis=1)).max())
        low, high = x.low * float(w.min()), x.high * float(w.sum(axis=2).max())
        # Two thirds of the range are left for what comes before the next sum.
        if w.shape[1] > 1 and low < self.low ** (2 / 3) and low * 1e3 < 1 / spread:
            self.rescaled.add(n)
            return Span(1 / spread, 1.0, spread, scaled=True)
        return Span(low, high, min(spread, high / low), x.scaled)
