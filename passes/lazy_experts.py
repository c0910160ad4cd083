"""Compute only the experts that are selected: push a gather through a matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.ir.core import Op, postorder, tensor
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate

ROWWISE = (t.Softmax, t.LogSoftmax, Temper, Truncate)  # rows of the last axis, independently
LINEAR = "d,abcd->abc"


@dataclass(frozen=True)
class LazyExperts(Pass):
    """Gather(f(W e), z) => f(Gather(W, z) e), for a row-wise f (softmax, temper, truncate).

    `W [F,K,V,D]` holds F K experts. Pays where few are selected: the product reads only their
    weights. Declined if the readers of W e need all rows, or as many by their sum.
    """

    name: ClassVar[str] = "lazy-experts"
    exact: ClassVar[Exact] = Exact.ROUNDING

    def run(self, module: Module, notes: Notes) -> Module:
        """Rewrite every product whose readers select."""
        readers: dict[Op, list[Op]] = {r: [r] for r in module.roots}
        for n in postorder(*module.roots):
            for a in n.args:
                readers.setdefault(a, []).append(n)
        lazy: set[Op] = set()
        for n in module.nodes():
            if isinstance(n, t.Contract) and n.eq == LINEAR and isinstance(n.b, t.Const):
                f, k, *_ = tensor(n).shape
                rows = _rows_read(n, readers)
                if rows < f * k:
                    lazy.add(n)
                    notes.did(n, f"{rows} of {f * k} experts")
                else:
                    notes.skip(n, f"the readers need {rows} of {f * k} experts")

        def rule(n: Op, _: object) -> Op | None:
            match n:
                case t.SelectRow(w=w, sel=sel) if _source(w) in lazy:
                    return _select(w, sel)
                case t.Take(x=x, axis=0, indices=rows) if _source(x) in lazy:
                    taken = _take(x, rows)
                    if (source := _source(taken)) is not None:
                        lazy.add(source)
                    return taken
                case _:
                    return None

        return module.rewrite(rule)


def _rows_read(n: Op, readers: dict[Op, list[Op]]) -> int:
    """Return how many rows of `n [F,K,V]` its readers need if selections are pushed down."""
    f, k, _ = tensor(n).shape
    total = 0
    for r in readers.get(n, []):
        if isinstance(r, t.SelectRow) and r.w is n:
            total += f
        elif isinstance(r, t.Take) and r.axis == 0:
            total += _rows_read(r, readers)
        elif isinstance(r, ROWWISE) and r.args[0] is n:
            total += _rows_read(r, readers)
        else:
            total += f * k
    return total


def _source(n: Op) -> t.Contract | None:
    """Return the product that rows of `n` are rows of."""
    while isinstance(n, ROWWISE) or (isinstance(n, t.Take) and n.axis == 0):
        n = n.args[0]
    return n if isinstance(n, t.Contract) and n.eq == LINEAR else None


def _select(n: Op, sel: Op) -> Op:
    """`n[f, sel[f]]` of the rows that are needed, `[F,V]`."""
    if isinstance(n, ROWWISE):
        return n.with_args((_select(n.args[0], sel), *n.args[1:]))
    if isinstance(n, t.Take):
        return _select(_take(n.x, n.indices), sel)
    assert isinstance(n, t.Contract)
    assert isinstance(n.b, t.Const)
    f, k, width, d = n.b.value.shape
    flat = n.b.value.reshaped((f, k, width * d))
    chosen = mk.reshape(t.SelectRow(t.Const(flat), sel), (f, width, d))
    return t.Contract(n.a, chosen, "d,fvd->fv")


def _take(n: Op, rows: tuple[int, ...]) -> Op:
    """`n[rows]`, from fewer weights."""
    if isinstance(n, ROWWISE):
        return n.with_args((_take(n.args[0], rows), *n.args[1:]))
    if isinstance(n, t.Take):
        return _take(n.x, tuple(n.indices[r] for r in rows))
    assert isinstance(n, t.Contract)
    assert isinstance(n.b, t.Const)
    return t.Contract(n.a, t.Const(n.b.value.taken(rows)), LINEAR)
