"""Affine maps that both sides of a comparison hold, replaced by inputs of their own.

Both sides compute the same map of the same input, so nothing that a pass may have changed is lost,
and a weight of millions of numbers is not multiplied again for every case. Where the weight is not
in memory its rows are known by where they come from: then maps of some of its rows, and products
with one row that is selected, are the same rows of one shared input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.tensor.ops import Const, Contract, Input, Reshape, ScaledContract, SelectRow

SHARED = "shared."  # begins the names of such inputs
LINEAR, SELECTED = "d,abcd->abc", "d,fvd->fv"


def share(before: Module, after: Module) -> tuple[Module, Module]:
    """Return both modules over shared inputs."""
    both = set(before.nodes()) & set(after.nodes())
    maps = [n for n in before.nodes() if n in both and _affine(n) and _unread(n) is None]
    new = {
        n: Input(f"{SHARED}{i}", "f32", tensor(n).batch, tensor(n).shape)
        for i, n in enumerate(maps)
    }
    rows = _Rows([*before.nodes(), *after.nodes()])
    if not new and not rows.known:
        return before, after

    def rule(n: Op, _: object) -> Op | None:
        return new.get(n) or rows.in_place_of(n)

    return before.rewrite(rule), after.rewrite(rule)


def _affine(n: Op) -> bool:
    match n:
        case Contract(a=Input(), b=Const()) | ScaledContract(a=Input(), b=Const(), scale=Const()):
            return True
        case _:
            return False


class _Unread(NamedTuple):
    """A projection of `source` by a weight that is not in memory, or its selected rows."""

    source: Input
    weight: Array
    shape: tuple[int, int]
    selection: Op | None
    scale: Array | None = None

    @property
    def keys(self) -> list[str]:
        """A key for each row: of its weights, and of their scales."""
        if self.scale is None:
            return self.weight.row_keys()
        pairs = zip(self.weight.row_keys(), self.scale.row_keys(), strict=True)
        return [f"{key}*{scale}" for key, scale in pairs]


def _unread(n: Op) -> _Unread | None:
    match n:
        case Contract(a=Input() as x, b=Const(value=w), eq=eq) if eq == LINEAR and w.recipe:
            return _Unread(x, w, (w.shape[1], w.shape[2]), None)
        case ScaledContract(a=Input() as x, b=Const(value=w), scale=Const(value=s), eq=eq) if (
            eq == LINEAR and w.recipe
        ):
            return _Unread(x, w, (w.shape[1], w.shape[2]), None, s)
        case Contract(a=Input() as x, b=Reshape(x=SelectRow(w=Const(value=w), sel=sel)), eq=eq) if (
            eq == SELECTED and w.recipe
        ):
            return _Unread(x, w, (w.shape[1], tensor(n).shape[1]), sel)
        case _:
            return None


class _Rows:
    """Numbers the rows of all such weights: one input for those of one source and shape."""

    def __init__(self, nodes: Iterable[Op]) -> None:
        self.known: dict[tuple[Op, tuple[int, int]], dict[str, int]] = {}
        for found in filter(None, map(_unread, nodes)):
            rows = self.known.setdefault((found.source, found.shape), {})
            for key in found.keys:
                rows.setdefault(key, len(rows))

    def in_place_of(self, n: Op) -> Op | None:
        """Return the rows of the shared input that `n` computes, None if it is something else."""
        if (found := _unread(n)) is None:
            return None
        at = (found.source, found.shape)
        rows = self.known[at]
        name = f"{SHARED}rows.{list(self.known).index(at)}"
        whole = Input(name, "f32", tensor(found.source).batch, (len(rows), *found.shape))
        part = mk.take(whole, [rows[key] for key in found.keys])
        return part if found.selection is None else SelectRow(part, found.selection)
