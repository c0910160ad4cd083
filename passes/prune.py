"""Remove what contributes nothing: terms of weight zero, folds that nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.ir.core import Op, Uses, postorder, units
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class PruneZero(Pass):
    """w_h = 0: sum_h w_h x_h => the sum over the others. Only trained weights are looked at.

    Pays: whole subcircuits may become unreachable. Declines a weight that is positive in some fold
    or unit, or that depends on the context. A circuit that is zero everywhere is an error: it
    describes no distribution.
    """

    name: ClassVar[str] = "prune-zero"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Drop the operands of mixtures that have weight zero."""

        def rule(n: Op, _: Uses) -> Op | None:
            if not isinstance(n, c.Mix) or not isinstance(n.w, t.Const):
                return None
            keep = [h for h in range(len(n.xs)) if np.any(n.w.value.value[:, :, h])]
            if len(keep) == len(n.xs):
                return None
            if not keep:
                raise PccError(
                    "E310",
                    "a mixture has only zero weights",
                    at=n.loc,
                    hint="its scope has probability zero everywhere",
                )
            notes.did(n, f"dropped {len(n.xs) - len(keep)} of {len(n.xs)} terms")
            return c.Mix(tuple(n.xs[h] for h in keep), mk.take(n.w, keep, 2))

        return module.rewrite(rule)


@dataclass(frozen=True)
class PruneUnreachable(Pass):
    """Folds of an input layer that no gather selects are dropped, and the gathers renumbered.

    Pays: tables, weights and sums of folds that nothing reads are neither stored nor computed.
    Declined where the layer is read whole. Nodes that nothing reaches do not exist: a module is
    what its outputs read.
    """

    name: ClassVar[str] = "prune-unreachable"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Narrow every layer that is only gathered from."""
        read: dict[Op, set[int] | None] = {}
        for n in postorder(*module.roots):
            for a in n.args:
                if isinstance(a, c.InputOp | c.Sum):
                    if isinstance(n, c.Gather) and read.get(a, set()) is not None:
                        read.setdefault(a, set()).update(n.folds)  # type: ignore[union-attr]
                    else:
                        read[a] = None
        for r in module.roots:
            read[r] = None
        keep = {n: sorted(f) for n, f in read.items() if f is not None and len(f) < units(n).folds}

        def rule(n: Op, _: Uses) -> Op | None:
            if isinstance(n, c.Gather) and n.x in keep:
                rows = keep[n.x]
                notes.did(n.x, f"kept {len(rows)} of {units(n.x).folds} folds")
                at = {f: i for i, f in enumerate(rows)}
                return c.Gather(narrow(n.x, rows), tuple(at[f] for f in n.folds))
            return None

        return module.rewrite(rule)


def narrow(n: Op, rows: list[int]) -> Op:
    """Return the layer with only these folds."""
    match n:
        case c.Categorical(vars=vs, p=p):
            return c.Categorical(tuple(vs[f] for f in rows), mk.take(p, rows))
        case c.Gaussian(vars=vs, mu=mu, sigma=sd):
            return c.Gaussian(tuple(vs[f] for f in rows), mk.take(mu, rows), mk.take(sd, rows))
        case c.Sum(x=x, w=w):
            return c.Sum(c.Gather(x, tuple(rows)), mk.take(w, rows))
        case _:
            raise PccError("E404", f"'{n.name}' cannot be narrowed", at=n.loc)
