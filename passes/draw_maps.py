"""Chains of draws, each of which selects the next one's row, as maps that are drawn all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pcc.ir.core import Op, postorder, tensor
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.lazy_experts import LINEAR, ROWWISE
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t

ALIKE = (*ROWWISE, t.Log, t.Exp)  # of each row of the first operand, whatever the others are
PAIRED = (t.Add, t.Sub, t.Mul, t.Div)


class _UnlikeError(Exception):
    """Values of a chain are not made in the same way."""


@dataclass(frozen=True)
class Link:
    """A draw whose masses are a function of row `before` of a table `[1,K,K]`, and of no other."""

    draw: t.InverseCdf
    before: Op
    select: t.SelectRow


@dataclass(frozen=True)
class DrawMaps(Pass):
    """z_t = draw(f_t(row z_{t-1} of W_t), u_t), t = 1..T  =>  z = trajectory(maps, z_0).

    maps[t,k] = draw(f_t(row k of W_t), u_t): with its uniform given, a draw is a map of states to
    states. All maps are drawn side by side, and following them takes T look-ups instead of T
    products, softmaxes and running sums one after another: the same rows, uniforms and draws.

    Reads all K rows of each W_t instead of one. So it pays on GPUs, where a step of the chain takes
    longer than reading its table: for `chain` draws or more, and tables of at most `most` trained
    numbers (`whole`: or of any size, since they are computed whatever is drawn). Declines shorter
    chains, larger tables, and draws with folds.
    """

    name: ClassVar[str] = "draw-maps"
    exact: ClassVar[Exact] = Exact.ROUNDING
    chain: int = 4  # draws; balanced trees are no chains: each level is drawn at once already
    most: int = 1 << 23  # 17 MB of halves: 4 us on an H200, about what a step with a product takes
    whole: bool = False

    def run(self, module: Module, notes: Notes) -> Module:
        """Replace every chain that is long enough."""
        found = [c for c in chains(module) if self._pays(c, notes)]
        return module.with_roots(_rebuilt(module.roots, found)) if found else module

    def _pays(self, links: Sequence[Link], notes: Notes) -> bool:
        first, largest = links[0].draw, max(_trained(x.select.w) for x in links)
        if len(links) + 1 < self.chain:
            notes.skip(first, f"a chain of {len(links) + 1} draws, fewer than {self.chain}")
        elif largest > self.most and not self.whole:
            notes.skip(first, f"a table of {largest} trained numbers, more than {self.most}")
        else:
            states = tensor(links[0].draw.mass).shape[1]
            notes.did(first, f"{len(links)} draws are maps of {states} states")
            return True
        return False


def _rebuilt(roots: tuple[Op, ...], found: Sequence[Sequence[Link]]) -> tuple[Op, ...]:
    """Return the roots with draws of chains taken from trajectories."""
    place_of = {x.draw: (c, i) for c in map(tuple, found) for i, x in enumerate(c)}
    maps, new = {tuple(c): _maps(c) for c in found}, dict[Op, Op]()
    for n in postorder(*roots):
        if n in place_of:
            chain, step = place_of[n]
            path = t.Trajectory(maps[chain], new[chain[0].before])  # maps read no draw
            new[n] = mk.place(mk.take(path, [step]), n.loc)
        else:
            new[n] = n.with_args(tuple(new[a] for a in n.args))
    return tuple(new[r] for r in roots)


def chains(module: Module) -> list[list[Link]]:
    """Return paths of links, the longest first; each link is in one of them."""
    links = {x.draw: x for x in _links(module)}
    depth: dict[Op, int] = {}
    for draw, link in links.items():  # operands come first
        depth[draw] = depth.get(link.before, 0) + 1
    used, out = set[Op](), list[list[Link]]()
    for draw in sorted(links, key=lambda d: -depth[d]):
        path: list[Link] = []
        at: Op = draw
        while at in links and at not in used:
            used.add(at)
            path.append(links[at])
            at = links[at].before
        if path:
            out.append(path[::-1])
    return out


def _links(module: Module) -> Iterator[Link]:
    nearest: dict[Op, frozenset[Op]] = {}  # the draws that a value is computed from, without others
    for n in module.nodes():
        below = frozenset[Op]().union(*(nearest[a] for a in n.args))
        if isinstance(n, t.InverseCdf):
            if (link := _link(n, below)) is not None:
                yield link
            below = frozenset((n,))
        nearest[n] = below


def _link(n: t.InverseCdf, below: frozenset[Op]) -> Link | None:
    """Return the link of a draw, if it reads one draw, as the choice of a row of a square table."""
    if len(below) != 1 or tensor(n).shape != (1,):
        return None
    (before,) = below
    readers = [x for x in postorder(n, leaf=below.__contains__) if before in x.args]
    if len(readers) != 1 or not isinstance(select := readers[0], t.SelectRow):
        return None
    if tensor(select.w).shape != (1, *(tensor(n.mass).shape[1],) * 2):
        return None
    link = Link(n, before, select)
    try:
        _drawn([link])
    except _UnlikeError:
        return None
    return link


def _trained(w: Op) -> int:
    """Return how many trained numbers a table is computed from."""
    size = int(np.prod(tensor(w).shape))
    while isinstance(w, (*ALIKE, t.Take, t.Reshape)):
        w = w.args[0]
    return size * (tensor(w.a).shape[0] if isinstance(w, t.Contract) and w.eq == LINEAR else 1)


# ---------------------------------------------------------------- maps


def _maps(links: Sequence[Link]) -> Op:
    """Return the maps `[T,K]` of a chain, drawn together if they are made in the same way."""
    k = tensor(links[0].draw.mass).shape[1]
    try:
        return mk.reshape(_drawn(links), (len(links), k))
    except _UnlikeError:
        return mk.concat([mk.reshape(_drawn([x]), (1, k)) for x in links])


def _drawn(links: Sequence[Link]) -> Op:
    rows = _Rows(tuple(x.select for x in links))
    return t.InverseCdf(
        rows.every(tuple(x.draw.mass for x in links)), rows.repeated([x.draw.u for x in links])
    )


class _Rows:
    """Functions of one row of each table, for every row that could be selected."""

    def __init__(self, selects: tuple[t.SelectRow, ...]) -> None:
        self.selects = selects
        self.k = tensor(selects[0].w).shape[1]

    def every(self, values: tuple[Op, ...]) -> Op:
        """Return `[TK,..]`: values that read their rows, or are the same for all of them."""
        pairs = list(zip(values, self.selects, strict=True))
        if all(x is s for x, s in pairs):
            return mk.reshape(_tables([s.w for s in self.selects]), (len(pairs) * self.k, self.k))
        reads = {any(n is s for n in postorder(x)) for x, s in pairs}
        if reads == {False}:
            return values[0] if all(x is values[0] for x in values) else self.repeated(values)
        first, kinds = values[0], {type(x) for x in values}
        if len(reads) > 1 or len(kinds) > 1 or not isinstance(first, (*ALIKE, *PAIRED)):
            raise _UnlikeError
        operands = list(zip(*(x.args for x in values), strict=True))
        count = len(operands) if isinstance(first, PAIRED) else 1
        if any(x is not column[0] for column in operands[count:] for x in column):
            raise _UnlikeError
        made = [self.every(column) for column in operands[:count]]
        return first.with_args((*made, *first.args[count:]))

    def repeated(self, values: Sequence[Op]) -> Op:
        """Return values `[1,..]`, each for the rows of its table."""
        each = mk.joined(values)
        count, *rest = tensor(each).shape
        each = mk.reshape(each, (count, 1, *rest))
        return mk.reshape(t.Expand(each, each, (count, self.k, *rest)), (count * self.k, *rest))


def _tables(ws: Sequence[Op]) -> Op:
    """Join tables `[1,K,K]`, before what is done to each of their rows."""
    first = ws[0]
    same = all(type(w) is type(first) and w.args[1:] == first.args[1:] for w in ws)
    if isinstance(first, ALIKE) and same:
        return first.with_args((_tables([w.args[0] for w in ws]), *first.args[1:]))
    return mk.joined(ws)
