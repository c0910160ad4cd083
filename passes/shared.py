"""Affine maps that both sides of a comparison hold, replaced by inputs of their own.

Both sides compute the same map of the same input, so nothing that a pass may have changed is lost,
and a weight of millions of numbers is not multiplied again for every case. Where the weight is not
in memory its rows are known by where they come from: then maps of some of its rows, and products
with one row that is selected, are the same rows of one shared input.
"""

from __future__ import annotations

from collections.abc import Iterable

from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.tensor.ops import Const, Contract, Input, Reshape, SelectRow

SHARED = "shared."  # begins the names of such inputs
LINEAR, SELECTED = "d,abcd->abc", "d,fvd->fv"


def share(before: Module, after: Module) -> tuple[Module, Module]:
    """Return both modules over shared inputs."""
    both = set(before.nodes()) & set(after.nodes())
    maps = [n for n in before.nodes() if n in both and _affine(n) and not _unread(n)]
    new: dict[Op, Op] = {
        n: Input(f"{SHARED}{i}", "f32", tensor(n).batch, tensor(n).shape)
        for i, n in enumerate(maps)
    }
    new.update(_of_rows([*before.nodes(), *after.nodes()]))
    if not new:
        return before, after
    return before.rewrite(lambda n, _: new.get(n)), after.rewrite(lambda n, _: new.get(n))


def _affine(n: Op) -> bool:
    return isinstance(n, Contract) and isinstance(n.a, Input) and isinstance(n.b, Const)


def _unread(n: Op) -> bool:
    """Whether `n` is a projection by a weight that is not in memory."""
    return _affine(n) and n.eq == LINEAR and n.b.value.recipe is not None  # type: ignore[attr-defined]


def _of_rows(nodes: Iterable[Op]) -> dict[Op, Op]:
    """Return what takes the place of each map whose weight is not in memory."""
    found: dict[Op, tuple[Op, Const, tuple[int, ...], Op | None]] = {}
    for n in nodes:
        match n:
            case Contract(a=Input() as x, b=Const() as w) if _unread(n):
                found[n] = x, w, tensor(n).shape[1:], None
            case Contract(
                a=Input() as x, b=Reshape(x=SelectRow(w=Const() as w, sel=sel)), eq=eq
            ) if eq == SELECTED and w.value.recipe is not None:
                found[n] = x, w, (w.value.shape[1], tensor(n).shape[1]), sel
    rows: dict[tuple[Op, tuple[int, ...]], dict[str, int]] = {}
    for source, w, shape, _ in found.values():
        known = rows.setdefault((source, shape), {})
        for key in w.value.row_keys():
            known.setdefault(key, len(known))
    new: dict[Op, Op] = {}
    for n, (source, w, shape, selection) in found.items():
        known = rows[source, shape]
        name = f"{SHARED}rows.{list(rows).index((source, shape))}"
        whole = Input(name, "f32", tensor(source).batch, (len(known), *shape))
        part = mk.take(whole, [known[key] for key in w.value.row_keys()])
        new[n] = part if selection is None else SelectRow(part, selection)
    return new
