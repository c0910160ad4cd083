"""What the launches of a piece are called in a plan: the part of the model that they compute."""

from __future__ import annotations

from collections.abc import Sequence

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.patterns.attention import Attention
from pcc.backends.cuda.patterns.eva import Eva
from pcc.backends.cuda.patterns.gates import Gate
from pcc.backends.cuda.patterns.products import Product
from pcc.backends.cuda.piece import Piece
from pcc.ir.core import Op


class Labels:
    """Names by what reads and feeds a piece; layers are counted as the states are."""

    def __init__(self, graph: Graph, pieces: Sequence[Piece]) -> None:
        self._graph = graph
        self._layer = ""
        self._inputs: dict[Op, str] = {}  # what attention reads -> its layer
        self._makers: dict[Op, Piece] = {p.root: p for p in pieces}
        for p in pieces:
            if isinstance(p, Attention | Eva):
                self._inputs[graph.source(p.inputs.joined)] = self._of(p)

    def _of(self, p: Attention | Eva) -> str:
        return f"layers.{self._graph.in_place[p.states[0]].rpartition('.')[2]}"

    def of(self, piece: Piece) -> str:
        """Return the name of the next piece in order."""
        if piece.root in self._inputs:
            return f"{self._inputs[piece.root]}.qkv"
        if isinstance(piece, Attention | Eva):
            self._layer = self._of(piece)
            return f"{self._layer}.attention"
        if isinstance(piece, Gate):
            return f"{self._layer}.gate_up"
        if not isinstance(piece, Product):
            return piece.root.loc or piece.root.name.removeprefix("t.")
        made = {type(self._makers.get(self._graph.source(x.x))) for x in piece.terms}
        if made & {Attention, Eva}:
            return f"{self._layer}.out"
        if Gate in made:
            return f"{self._layer}.down"
        return piece.root.loc or f"product of {piece.terms[0].k} by {piece.terms[0].n}"
