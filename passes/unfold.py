"""The inverse of folding: one fold per layer, for queries that cut a layer between its folds."""

from __future__ import annotations

from collections.abc import Iterator

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, units
from pcc.passes import pieces as mk


def unfold(root: Op) -> Op:
    """Return the same circuit with F = 1 in every layer (fused layers must be expanded before)."""
    folds: dict[Op, list[Op]] = {}
    for n in postorder(root):
        if isinstance(n, c.CircuitOp):
            folds[n] = _split(n, folds)
    (only,) = folds[root]
    return only


def paths(flat: Op, n: int) -> Iterator[set[Op]]:
    """Yield, for each of n variables, the ops of a circuit above it: its path from leaf to root."""
    ops = [x for x in postorder(flat) if isinstance(x, c.CircuitOp)]
    for i in range(n):
        yield {x for x in ops if units(x).scopes[0] >> i & 1}


def _split(n: Op, folds: dict[Op, list[Op]]) -> list[Op]:
    match n:
        case c.Categorical(vars=vs, p=p):
            return [c.Categorical((v,), mk.take(p, [f])) for f, v in enumerate(vs)]
        case c.Gaussian(vars=vs, mu=mu, sigma=sd):
            pairs = enumerate(vs)
            return [c.Gaussian((v,), mk.take(mu, [f]), mk.take(sd, [f])) for f, v in pairs]
        case c.Sum(x=x, w=w):
            return [c.Sum(y, mk.take(w, [f])) for f, y in enumerate(folds[x])]
        case c.Mix(xs=xs, w=w):
            columns = zip(*(folds[x] for x in xs), strict=True)
            return [c.Mix(ys, mk.take(w, [f])) for f, ys in enumerate(columns)]
        case c.Hadamard(xs=xs):
            return [c.Hadamard(ys) for ys in zip(*(folds[x] for x in xs), strict=True)]
        case c.Kronecker(a=a, b=b):
            return [c.Kronecker(y, z) for y, z in zip(folds[a], folds[b], strict=True)]
        case c.Gather(x=x, folds=index):
            return [folds[x][f] for f in index]
        case c.Concat(xs=xs):
            return [y for x in xs for y in folds[x]]
        case _:
            raise PccError("E404", f"'{n.name}' cannot be unfolded", at=n.loc)
