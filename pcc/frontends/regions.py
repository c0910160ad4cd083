"""Region graphs: which scopes are split how. A region is a scope; a partition splits it in parts.

Trees are nested tuples of variables, `((0, 1), (2, 3))`; `RegionGraph` also holds DAGs, where a
region may have several partitions and several parents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from pcc.errors import PccError
from pcc.ir.types import mask_of, show_scope, variables_of

Nested: TypeAlias = Any  # int | tuple[Nested, ...]
Name = TypeVar("Name")


@dataclass(frozen=True)
class RegionGraph:
    """Regions, parts before wholes; the last one is the root.

    `scopes[i]` is a mask of variables. `partitions[i]` lists the ways to split region i, each a
    tuple of regions; none for a region of one variable, and for one that is factorised.
    """

    scopes: tuple[int, ...]
    partitions: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        for i, (scope, ways) in enumerate(zip(self.scopes, self.partitions, strict=True)):
            for parts in ways:
                self._check(i, scope, parts)
        n = self.scopes[-1].bit_count() if self.scopes else 0
        if not n or self.scopes[-1] != (1 << n) - 1:
            top = show_scope(self.scopes[-1]) if n else "nothing"
            raise PccError("T102", f"the root is over {top}, expected the variables 0..{n - 1}")

    def _check(self, i: int, scope: int, parts: tuple[int, ...]) -> None:
        where, total = f"region {show_scope(scope)}", 0
        if len(parts) < 2 or not all(0 <= p < i for p in parts):
            raise PccError("T102", f"{where}: a partition has two or more parts, made before it")
        for p in parts:
            if both := total & self.scopes[p]:
                raise PccError(
                    "T102",
                    f"{where} is not decomposable: parts share variables {show_scope(both)}",
                    hint="every variable belongs to one part",
                )
            total |= self.scopes[p]
        if total != scope:
            raise PccError(
                "T102", f"{where} has a partition over {show_scope(total)} instead of its scope"
            )

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.scopes[-1].bit_count()

    @property
    def is_tree(self) -> bool:
        """Whether regions have at most one parent and one partition, and leaves one variable."""
        used = [p for ways in self.partitions for parts in ways for p in parts]
        single = all(
            len(ways) == (scope.bit_count() > 1)
            for scope, ways in zip(self.scopes, self.partitions, strict=True)
        )
        return single and len(used) == len(set(used)) == len(self.scopes) - 1

    def heights(self) -> list[int]:
        """0 for a region without partitions, else 1 + the largest height of its parts."""
        out: list[int] = []
        for ways in self.partitions:
            out.append(max((1 + out[p] for parts in ways for p in parts), default=0))
        return out


def levels(
    leaves: Iterable[Name], parent: Mapping[Name, Name], arity: Mapping[Name, int]
) -> Iterator[list[Name]]:
    """Yield the inner nodes of a forest by level, in the published order of folds.

    A node comes right after the level that completes its `arity` parts, where its last part lies.
    """
    frontier, missing = list(leaves), dict(arity)
    while frontier:
        ready = []
        for node in (parent[x] for x in frontier if x in parent):
            missing[node] -= 1
            if not missing[node]:
                ready.append(node)
        if ready:
            yield ready
        frontier = ready


def from_nested(tree: Nested) -> RegionGraph:
    """Read a tree given as nested tuples (or lists) of variables, one region per tuple."""
    scopes: list[int] = []
    ways: list[tuple[tuple[int, ...], ...]] = []
    stack: list[tuple[Nested, bool]] = [(tree, False)]
    made: list[int] = []  # regions that wait for their parent
    while stack:
        x, done = stack.pop()
        if isinstance(x, int | np.integer) and not isinstance(x, bool):
            if x < 0:
                raise PccError("T102", f"variable {x} is negative")
            scopes.append(1 << int(x))
            ways.append(())
        elif not isinstance(x, tuple | list) or len(x) < 2:
            raise PccError("T102", f"a region is a variable or two or more regions, not {x!r:.60}")
        elif not done:
            stack.append((x, True))
            stack.extend((y, False) for y in reversed(x))
            continue
        else:
            parts = tuple(made[len(made) - len(x) :])
            del made[len(made) - len(x) :]
            scopes.append(mask_of([v for p in parts for v in variables_of(scopes[p])]))
            ways.append((parts,))
        made.append(len(scopes) - 1)
    return RegionGraph(tuple(scopes), tuple(ways))


def balanced(n: int) -> Nested:
    """Cut 0..n-1 at round(len / 2), recursively: the published split rule."""
    return _halve(list(range(_positive(n))))


def random_tree(n: int, seed: int) -> Nested:
    """Shuffle the variables, then cut every scope in two at a random place."""
    rng = np.random.default_rng(seed)
    order = [int(v) for v in rng.permutation(_positive(n))]
    return _cut(order, lambda size: int(rng.integers(1, size)))


def shuffled(n: int, seed: int) -> Nested:
    """Shuffle the variables, then cut in halves as `balanced` does."""
    rng = np.random.default_rng(seed)
    return _halve([int(v) for v in rng.permutation(_positive(n))])


def _positive(n: int) -> int:
    if n < 1:
        raise PccError("T100", f"n is {n}: a tree has at least one variable")
    return n


def _halve(scope: list[int]) -> Nested:
    return _cut(scope, lambda size: round(size / 2))


def _cut(scope: list[int], place: Any) -> Nested:
    """Split recursively at `place(len)`; iterative, as random cuts may be deep."""
    todo, built = [(scope, False, 0)], list[Nested]()
    while todo:
        part, done, _ = todo.pop()
        if done:
            right, left = built.pop(), built.pop()
            built.append((left, right))
        elif len(part) == 1:
            built.append(part[0])
        else:
            at = place(len(part))
            todo += [(part, True, 0), (part[at:], False, 0), (part[:at], False, 0)]
    return built[0]


def from_networkx(graph: Any, root: Any = None) -> RegionGraph:
    """Read a `networkx.DiGraph` whose edges go from regions to their parts.

    A node with a true attribute `partition` is a partition: its successors are the parts of its
    predecessor. Every other node is a region; it points to its partitions, or straight to its parts
    if there is one partition. A region without successors has the attribute `scope` (variables), or
    is itself a variable index. A given `scope` must be what the parts cover. Errors: T102, T103.
    """
    import networkx as nx

    if not graph.is_directed() or not nx.is_directed_acyclic_graph(graph):
        raise PccError("T103", "the region graph is not a directed acyclic graph")
    tops = [v for v, d in graph.in_degree() if d == 0]
    if root is None and len(tops) != 1:
        raise PccError("T103", f"the region graph has roots {tops[:5]}", hint="name the root")
    top = tops[0] if root is None else root
    if top not in graph or _is_partition(graph, top):
        raise PccError("T103", f"the root {top!r} is no region of the graph")
    place: dict[Any, int] = {}
    scopes: list[int] = []
    ways: list[tuple[tuple[int, ...], ...]] = []
    below = nx.descendants(graph, top) | {top}
    for node in reversed(list(nx.topological_sort(graph.subgraph(below)))):
        if _is_partition(graph, node):
            continue
        parts = [tuple(place[r] for r in names) for names in _splits(graph, node)]
        place[node] = len(scopes)
        scopes.append(_scope(graph, node, [scopes[p] for p in parts[0]] if parts else []))
        ways.append(tuple(parts))
    return RegionGraph(tuple(scopes), tuple(ways))


def _is_partition(graph: Any, node: Any) -> bool:
    return bool(graph.nodes[node].get("partition", False))


def _splits(graph: Any, node: Any) -> list[list[Any]]:
    """Return the parts of a region, partition by partition."""
    children = list(graph.successors(node))
    marked = [_is_partition(graph, x) for x in children]
    if not any(marked):
        return [children] if children else []
    if not all(marked):
        raise PccError("T103", f"region {node!r} points to both partitions and regions")
    out = [list(graph.successors(x)) for x in children]
    if any(_is_partition(graph, y) for parts in out for y in parts):
        raise PccError("T103", f"a partition of {node!r} points to a partition")
    return out


def _scope(graph: Any, node: Any, parts: list[int]) -> int:
    named = graph.nodes[node].get("scope")
    whole = 0
    for p in parts:
        whole |= p
    if named is None and not parts:
        named = [node]
    if named is None:
        return whole
    if not isinstance(named, Iterable) or not all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 0 for v in named
    ):
        raise PccError(
            "T103",
            f"the leaf {node!r} is not a variable index",
            hint="give it the attribute scope=[variable, ...]",
        )
    mask = mask_of([int(v) for v in named])
    if not mask or (parts and mask != whole):
        raise PccError(
            "T103",
            f"region {node!r} is over {show_scope(mask)}, its parts over {show_scope(whole)}",
        )
    return mask
