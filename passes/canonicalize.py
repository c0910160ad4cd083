"""One form for each function: flat products, no layer that does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pcc.circuit import ops as c
from pcc.ir.core import Op, Uses, units
from pcc.ir.module import Module
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t

ROUNDS = 16


@dataclass(frozen=True)
class Canonicalize(Pass):
    """a * (b * c) => a * b * c; 1 x => x; x[0..F-1] => x; x[i][j] => x[i[j]]; concat(x) => x.

    Pays: equal functions become one node, and the patterns of later passes have one form to match.
    Declines a nested product that something else reads: its value would be computed twice; weights
    that are not exactly one. Repeated until nothing changes.
    """

    name: ClassVar[str] = "canonicalize"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Apply every rule to a fixpoint."""
        for _ in range(ROUNDS):
            after = module.rewrite(rule)
            if all(a is b for a, b in zip(module.roots, after.roots, strict=True)):
                break
            module = after
        return module


def rule(n: Op, uses: Uses) -> Op | None:
    """Return the simpler form of `n`, or None."""
    match n:
        case c.Hadamard(xs=(x,)) | c.Concat(xs=(x,)):
            return x
        case c.Hadamard(xs=xs) if any(isinstance(x, c.Hadamard) and uses[x] == 1 for x in xs):
            return c.Hadamard(_flat(xs, uses))
        case c.Mix(xs=(x,), w=w) if _ones(w):
            return x
        case c.Sum(x=x, w=w) if units(x).k == 1 and units(n).k == 1 and _ones(w):
            return x
        case c.Gather(x=x, folds=folds):
            return _gather(x, folds)
        case c.Concat(xs=xs) if any(isinstance(x, c.Concat) for x in xs):
            parts = (y for x in xs for y in (x.xs if isinstance(x, c.Concat) else (x,)))
            return c.Concat(tuple(parts))
        case _:
            return None


def _flat(xs: tuple[Op, ...], uses: Uses) -> tuple[Op, ...]:
    # A chain of products is flattened bottom-up, so one level at a time is enough here.
    out: list[Op] = []
    for x in xs:
        out.extend(x.xs if isinstance(x, c.Hadamard) and uses[x] == 1 else (x,))
    return tuple(out)


def _ones(w: Op) -> bool:
    return isinstance(w, t.Const) and not w.value.recipe and bool(np.all(w.value.value == 1))


def _gather(x: Op, folds: tuple[int, ...]) -> Op | None:
    if folds == tuple(range(units(x).folds)):
        return x
    if isinstance(x, c.Gather):
        return c.Gather(x.x, tuple(x.folds[f] for f in folds))
    if isinstance(x, c.Concat):
        start = 0
        for part in x.xs:
            stop = start + units(part).folds
            if all(start <= f < stop for f in folds):
                return c.Gather(part, tuple(f - start for f in folds))
            start = stop
    return None
