"""In which order a module is computed: pieces one after another, the rest in few groups between.

Each node that no piece makes may be computed in any gap between the pieces that it needs and the
pieces that need it. The gaps that are used are as few as can be (an interval contains one of them
each), and each node goes to the last one that it may: then little waits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.patterns import MATCHERS
from pcc.backends.cuda.piece import HALF_FORMS, SQUARES, WIDE, Piece, Want
from pcc.ir.core import Op
from pcc.tensor import ops as t

VIEWS = (t.Reshape, t.Transpose, t.Take, t.Const)  # computed again rather than stored


def made_form(form: str) -> str:
    """Return the form under which a value is kept: every dtype of its own is "f32"."""
    return form if form in HALF_FORMS or form == SQUARES else WIDE


@dataclass
class Group:
    """Nodes that one generated kernel computes, operands first; what it reads and must write."""

    nodes: list[Op] = field(default_factory=list)
    inputs: list[Op] = field(default_factory=list)
    outputs: list[Op] = field(default_factory=list)


class Schedule:
    """`steps`: pieces and groups in order; `wanted`: in which forms values of pieces are read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pieces: dict[Op, Piece] = {}
        for op in graph.nodes:
            for match in MATCHERS:
                if (piece := match(op, graph)) is not None:
                    self.pieces[op] = piece
                    break
        graph.made = set(self.pieces)
        self.owners = dict(self.pieces)
        self._claim_states()
        self.wanted: dict[Op, set[str]] = {}
        self.order = self._ordered()
        self.ranked = [u for u in self.order if not isinstance(u, Op)]
        self.steps = self._steps()

    def offers(self, op: Op, form: str) -> bool:
        """Whether the piece that makes `op` can give it in this form."""
        piece = self.pieces.get(self.graph.source(op))
        return piece is not None and form in piece.forms

    def _claim_states(self) -> None:
        for piece in self.pieces.values():
            for state in piece.states:
                self.owners[state] = piece

    # ------------------------------------------------------------ what is needed

    def needs(self, unit: Piece | Op) -> list[Want]:
        """Return the arrays that a piece or a node reads."""
        if isinstance(unit, Op):
            return [(a, WIDE) for a in dict.fromkeys(unit.args)]
        return [
            (self.graph.source(op), made_form(f)) for op, f in unit.needs(self.graph, self.offers)
        ]

    def unit(self, op: Op) -> Piece | Op:
        """Return the piece that makes `op`, or `op`."""
        return self.owners.get(op, op)

    def _ordered(self) -> list[Piece | Op]:
        """Return all that the outputs need, operands first. Iterative: modules are deep."""
        out: list[Piece | Op] = []
        seen: set[int] = set()
        stack: list[tuple[Piece | Op, bool]] = []
        for root in reversed(self.graph.roots):
            if root in self.graph.outputs:
                self.wanted.setdefault(root, set()).add(WIDE)
            stack.append((self.unit(root), False))
        while stack:
            unit, done = stack.pop()
            if done:
                out.append(unit)
                continue
            if id(unit) in seen:
                continue
            seen.add(id(unit))
            stack.append((unit, True))
            for op, form in reversed(self.needs(unit)):
                self.wanted.setdefault(op, set()).add(form)
                stack.append((self.unit(op), False))
        return out

    # ------------------------------------------------------------ gaps

    def _steps(self) -> list[Piece | Group]:
        gap = self._gaps()
        groups = self._groups(gap)
        out: list[Piece | Group] = []
        for i in range(len(self.ranked) + 1):
            if i in groups:
                out.append(groups[i])
            if i < len(self.ranked):
                out.append(self.ranked[i])
        return out

    def _light(self) -> Iterator[Op]:
        for unit in self.order:
            if isinstance(unit, Op) and not isinstance(unit, t.Input | t.Const):
                yield unit

    def _gaps(self) -> dict[Op, int]:
        """Return for each node the gap that it is computed in: gap i lies before piece i."""
        rank = {id(p): i for i, p in enumerate(self.ranked)}
        first: dict[Op, int] = {}
        for op in self._light():
            first[op] = max((self._ready(a, rank, first) for a, _ in self.needs(op)), default=0)
        last = dict.fromkeys(first, len(self.ranked))
        for unit in reversed(self.order):
            bound = last.get(unit, 0) if isinstance(unit, Op) else rank[id(unit)]
            for op, _ in self.needs(unit):
                if op in last:
                    last[op] = min(last[op], bound)
        points: list[int] = []
        for end, begin in sorted((last[op], first[op]) for op in first):
            if not points or points[-1] < begin:
                points.append(end)
        return {op: max(p for p in points if p <= last[op]) for op in first}

    def _ready(self, op: Op, rank: dict[int, int], first: dict[Op, int]) -> int:
        unit = self.unit(op)
        return first.get(unit, 0) if isinstance(unit, Op) else rank[id(unit)] + 1

    def _groups(self, gap: dict[Op, int]) -> dict[int, Group]:
        """Return the group of each gap, last first: what later ones read is an output."""
        asked: dict[int, dict[Op, None]] = {}
        for unit in self.order:
            if not isinstance(unit, Op):
                for op, _ in self.needs(unit):
                    if op in gap:
                        asked.setdefault(gap[op], {})[op] = None
        for op in self.graph.roots:
            if op in gap:
                asked.setdefault(gap[op], {})[op] = None
        out: dict[int, Group] = {}
        for i in range(len(self.ranked), -1, -1):
            if asked.get(i):
                out[i] = self._group(i, list(asked[i]), gap, asked)
        return out

    def _group(
        self, at: int, outputs: list[Op], gap: dict[Op, int], asked: dict[int, dict[Op, None]]
    ) -> Group:
        group, seen = Group(outputs=outputs), set[Op]()
        stack = [(op, False) for op in reversed(outputs)]
        while stack:
            op, done = stack.pop()
            if done:
                group.nodes.append(op)
            elif op not in seen:
                seen.add(op)
                own = gap.get(op) == at
                if own or (isinstance(op, VIEWS) and op not in self.owners):
                    stack.append((op, True))
                    stack.extend((a, False) for a in reversed(op.args) if a not in seen)
                    continue
                group.inputs.append(op)
                if op in gap:
                    asked.setdefault(gap[op], {})[op] = None
        return group
