"""Multiply consecutive sum layers out, where that is cheaper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.circuit import ops as c
from pcc.ir.core import Op, Uses, units
from pcc.ir.module import Module
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class SumCollapse(Pass):
    """w2 (w1 x) => (w2 w1) x, if Ko Ki <= Ko Kh + Kh Ki and nothing else reads w1 x.

    Pays: one contraction for two; the product of trained weights is computed at compile time.
    Declines where the product weight costs more than both, or the inner sum has another reader.
    """

    name: ClassVar[str] = "sum-collapse"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL
    keeps_max: ClassVar[bool] = False  # a sum of products is not a maximum of products

    def run(self, module: Module, notes: Notes) -> Module:
        """Collapse bottom-up."""

        def rule(n: Op, uses: Uses) -> Op | None:
            match n:
                case c.Sum(x=c.Sum(x=x, w=w1) as inner, w=w2):
                    ko, kh, ki = units(n).k, units(inner).k, units(x).k
                    if uses[inner] > 1:
                        notes.skip(n, "the inner sum has another reader")
                        return None
                    if ko * ki > ko * kh + kh * ki:
                        notes.skip(n, f"{ko}x{ki} costs more than {ko}x{kh} and {kh}x{ki}")
                        return None
                    notes.did(n, f"{ko}x{kh} times {kh}x{ki}")
                    return c.Sum(x, t.Contract(w2, w1, "foh,fhi->foi"))
                case _:
                    return None

        return module.rewrite(rule)
