"""Fold sums over input layers into the input tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.circuit import ops as c
from pcc.ir.core import Op, Uses, tensor, units
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class FoldLeafSums(Pass):
    """sum_i w[o,i] p[i,x] => p'[o,x] with p' = w p: one table look-up, no sum at run time.

    Pays: no sum at run time. Declines contextual weights and tables (p' would cost V sums per row)
    and a table that would grow more than `grow` times.
    """

    name: ClassVar[str] = "fold-leaf-sums"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL
    keeps_max: ClassVar[bool] = False  # a sum of products is not a maximum of products
    grow: int = 4

    def run(self, module: Module, notes: Notes) -> Module:
        """Fold bottom-up."""

        def rule(n: Op, _: Uses) -> Op | None:
            if not isinstance(n, c.Sum) or not (leaf := selected(n.x)):
                return None
            if tensor(n.w).batch or tensor(leaf.p).batch:
                notes.skip(n, "the parameters depend on the context")
                return None
            if units(n).k > self.grow * units(n.x).k:
                notes.skip(n, f"the table would grow from {units(n.x).k} to {units(n).k} units")
                return None
            notes.did(n, f"{units(n).k} units over {len(leaf.vars)} folds")
            return c.Categorical(leaf.vars, t.Contract(n.w, leaf.p, "foi,fiv->fov"))

        return module.rewrite(rule)


def selected(x: Op) -> c.Categorical | None:
    """Return the input layer that `x` is, or selects folds of."""
    match x:
        case c.Categorical():
            return x
        case c.Gather(x=c.Categorical(vars=vs, p=p), folds=folds):
            return c.Categorical(tuple(vs[f] for f in folds), mk.take(p, folds))
        case _:
            return None
