"""Tidy movement ops after the other passes; what nothing reads does not exist in a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.ir.core import Op, Uses
from pcc.ir.module import Module
from pcc.passes import canonicalize
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Dce(Pass):
    """take(take(x)) => take(x), take(concat(..)) => take(part), reshape(reshape(x)) => reshape(x).

    concat(take(x), take(x)) => take(x): neighbours that are one value, or are taken from one. With
    the circuit's own wiring rules. Pays: what they bypass is no longer reachable, hence gone.
    Declines movements along different axes, and takes that cross the parts of a concatenation.
    """

    name: ClassVar[str] = "dce"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Rebuild bottom-up."""
        before = sum(1 for _ in module.nodes())
        after = module.rewrite(self.rule)
        gone = before - sum(1 for _ in after.nodes())
        if gone:
            notes.did(after.roots[0], f"{gone} nodes fewer")
        return after

    def rule(self, n: Op, uses: Uses) -> Op | None:
        """Return a tidier node, or None."""
        match n:
            case t.Take(x=x, axis=axis, indices=rows):
                return mk.take(x, rows, axis)
            case t.Reshape(x=x, shape=shape):
                return mk.reshape(x, shape)
            case t.Concat(xs=xs, axis=axis):
                return mk.joined(xs, axis)
            case _:
                return canonicalize.rule(n, uses)
