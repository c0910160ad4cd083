"""A verifier's graph as a chain of graphs of a few layers each.

Some builders take a pass of many layers for one fused block, and much longer for it than for its
layers one by one (docs/tensorrt.md, Limits). A layer is known by its states: `past.NAME.i` is of
layer i. Between what reads the states of two layers a chain is cut where the fewest bytes cross.

What crosses is handed on, floats only: the residual, and angles where a rotation is spelled out,
which are rows of a stored table. What depends neither on floats that enter nor on stored arrays
(positions, masks) is not handed on but computed again: cheaper than a border, and it keeps
integers, which not every runtime has in 64 bits, away from borders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from pcc.backends.onnx.graph import Stored
from pcc.backends.tensorrt.forms import drop_unread
from pcc.errors import PccError

STATE = re.compile(r"past\..*\.(\d{1,9})")
HANDED = "handed/"  # how names of what crosses begin
BEFORE, AFTER = "past.", "present."  # of a state: what is read, and what becomes of it, in place


def layers_in(model: ir.Model) -> int:
    """Return how many layers of states a graph has."""
    return len(_readers(model.graph))


def cut(model: ir.Model, layers: int) -> list[ir.Model]:
    """Return graphs of at most so many `layers`, which run one after the other.

    Each takes inputs of the whole graph, and outputs of graphs before it, by their names; each
    output of the whole graph is one of theirs. The graph given is used up. Errors: E430 where
    something other than a float would cross everywhere between two layers, and where a state would
    be read after a graph before has written it.
    """
    readers = _readers(model.graph)
    firsts = sorted(readers)[layers::layers]
    if not firsts:
        return [model]
    cone = _Crossing(model.graph)
    ends = [cone.best(max(readers[i - 1]), min(readers[i]), i) for i in firsts]
    handed = [cone.handed(end) for end in ends]
    _name(model.graph, [v for vs in handed for v in vs])
    places = [0, *(end + 1 for end in ends), len(cone.nodes)]
    pieces = [
        _piece(model, [str(v.name) for v in before], places[i], places[i + 1],
               [str(v.name) for v in after])
        for i, (before, after) in enumerate(zip([[], *handed], [*handed, []], strict=True))
    ]  # fmt: skip
    _check_states(pieces)
    return pieces


def _check_states(pieces: list[ir.Model]) -> None:
    """Refuse a chain that reads a state where it has been written. Errors: E430."""
    written = set[str]()
    for piece in pieces:
        for v in piece.graph.inputs:
            name = str(v.name)
            if name.startswith(BEFORE) and name.removeprefix(BEFORE) in written:
                what = f"the graph cannot be cut: {name!r} is read after it is written"
                raise PccError("E430", what, hint="leave out layers")
        gives = (str(v.name) for v in piece.graph.outputs)
        written |= {name.removeprefix(AFTER) for name in gives if name.startswith(AFTER)}


def _readers(graph: ir.Graph) -> dict[int, list[int]]:
    """Return, by layer, the places of the nodes that read its states; layers without gaps."""
    found: dict[int, list[int]] = {}
    for at, node in enumerate(graph):
        for v in node.inputs:
            if v is not None and v.is_graph_input() and (m := STATE.fullmatch(str(v.name))):
                found.setdefault(int(m[1]), []).append(at)
    return {i: found[known] for i, known in enumerate(sorted(found))}


@dataclass(frozen=True)
class _Life:
    """From which node to which a value is needed."""

    value: ir.Value
    made: int
    last: int


class _Crossing:
    """What crosses from the nodes up to a place to those after it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        at = {node: i for i, node in enumerate(self.nodes)}
        self.lives: list[_Life] = []
        local: dict[int, bool] = {id(v): not _float(v) for v in graph.inputs}
        for i, node in enumerate(self.nodes):
            own = all(_known(v, local) for v in node.inputs if v is not None)
            for v in node.outputs:
                local[id(v)] = own
                if not own:  # what is can be made again anywhere
                    last = max((at[use.node] for use in v.uses()), default=i)
                    self.lives.append(_Life(v, i, last))

    def handed(self, end: int) -> list[ir.Value]:
        """Return the values made up to node `end` that are read after it, and not made again."""
        return [x.value for x in self.lives if x.made <= end < x.last]

    def best(self, first: int, stop: int, layer: int) -> int:
        """Return the last node of a chain's part, from `first` on, before `stop`."""
        near = [x for x in self.lives if x.made < stop and first < x.last]
        costs = {}
        for end in range(first, stop):
            crossing = [x.value for x in near if x.made <= end < x.last]
            if all(map(_float, crossing)):
                costs[end] = sum(map(_bytes, crossing))
        if not costs:
            what = f"the graph cannot be cut before layer {layer}: more than floats would cross"
            raise PccError("E430", what, hint="leave out layers")
        least = min(costs.values())
        return max(end for end, cost in costs.items() if cost == least)


def _known(v: ir.Value, local: dict[int, bool]) -> bool:
    if v.const_value is not None:
        return not isinstance(v.const_value, Stored)
    return local[id(v)]


def _float(v: ir.Value) -> bool:
    return v.dtype is not None and v.dtype.is_floating_point()


def _bytes(v: ir.Value) -> float:
    """Return the bytes of a value; those of a row where it has an open size."""
    assert v.dtype is not None
    assert v.shape is not None
    size = v.dtype.itemsize
    for d in v.shape:
        size *= d if isinstance(d, int) else 1
    return size


def _name(graph: ir.Graph, handed: list[ir.Value]) -> None:
    """Give what is handed on names that no input, output or other value has."""
    taken = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
    taken |= {str(v.name) for node in graph for v in node.outputs}
    for v in {id(v): v for v in handed}.values():
        if v.is_graph_output():
            continue
        name = f"{HANDED}{v.name}"
        while name in taken:
            name += "~"
        taken.add(name)
        v.name = name


def _piece(whole: ir.Model, before: list[str], first: int, stop: int, after: list[str]) -> ir.Model:
    """Return the nodes from `first` up to `stop`, and what they need of those before."""
    model = whole.clone()
    graph = model.graph
    nodes = list(graph)
    made = {str(v.name): v for node in nodes for v in node.outputs}
    own = {str(v.name) for node in nodes[first:stop] for v in node.outputs}
    given = [v for v in graph.outputs if str(v.name) in own]
    given += [made[name] for name in after if name in own and made[name] not in given]
    for name in before:
        _enter(graph, made[name])
    graph.outputs[:] = given
    _drop_dead(graph)
    graph.inputs[:] = [v for v in graph.inputs if v.uses()]
    drop_unread(graph)
    return model


def _enter(graph: ir.Graph, v: ir.Value) -> None:
    """Make an input of a value."""
    entry = ir.Value(name=v.name, shape=v.shape, type=v.type)
    v.name = f"{v.name}~made"  # its node goes, or makes it again for nobody
    for use in list(v.uses()):
        use.node.replace_input_with(use.idx, entry)
    graph.inputs.append(entry)


def _drop_dead(graph: ir.Graph) -> None:
    """Drop nodes of which nothing is read."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
