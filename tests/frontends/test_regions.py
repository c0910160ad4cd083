"""Region graphs: the split rules, networkx graphs, and every way in which they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcc.errors import PccError
from pcc.frontends.regions import (
    Nested,
    RegionGraph,
    balanced,
    from_nested,
    from_networkx,
    random_tree,
    shuffled,
)


def leaves(tree: Nested) -> list[int]:
    return [tree] if isinstance(tree, int) else [v for part in tree for v in leaves(part)]


@given(st.integers(1, 70), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_trees_hold_every_variable_once(n: int, seed: int) -> None:
    for tree in (balanced(n), random_tree(n, seed), shuffled(n, seed)):
        assert sorted(leaves(tree)) == list(range(n))
        g = from_nested(tree)
        assert g.n == n
        assert g.is_tree
        assert len(g.scopes) == 2 * n - 1
        assert g.heights()[-1] == max(g.heights())
    assert leaves(balanced(n)) == list(range(n))


def test_the_published_split_rule() -> None:
    """Halves of odd length are cut at round(len / 2): to the even side, as Python rounds."""
    assert balanced(5) == ((0, 1), (2, (3, 4)) if round(1.5) == 1 else ((2, 3), 4))
    assert balanced(6) == (((0, 1), 2), ((3, 4), 5))
    assert balanced(4) == ((0, 1), (2, 3))
    assert balanced(1) == 0


def test_a_deep_tree() -> None:
    tree: Nested = 0
    for v in range(1, 3000):
        tree = (v, tree)
    g = from_nested(tree)
    assert (g.n, g.heights()[-1]) == (3000, 2999)


def digraph(edges: list[tuple[Any, Any]], **nodes: dict[str, Any]) -> Any:
    g = nx.DiGraph()
    g.add_edges_from(edges)
    for name, data in nodes.items():
        g.add_node(name, **data)
    return g


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_networkx_tree_is_the_nested_tree(n: int, seed: int) -> None:
    tree = random_tree(n, seed)
    g, stack = nx.DiGraph(), [tree]
    g.add_node(tree)
    while stack:
        x = stack.pop()
        for part in x if isinstance(x, tuple) else ():
            g.add_edge(x, part)
            stack.append(part)
    read, nested = from_networkx(g), from_nested(tree)
    assert read.is_tree
    assert set(read.scopes) == set(nested.scopes)
    assert splits(read) == splits(nested)


def splits(g: RegionGraph) -> dict[int, list[list[int]]]:
    """By scope, the scopes of the parts."""
    rows = zip(g.scopes, g.partitions, strict=True)
    return {scope: [[g.scopes[p] for p in parts] for parts in ways] for scope, ways in rows}


def test_partitions_and_scopes() -> None:
    g = digraph(
        [("r", "p"), ("r", "q"), ("p", "ab"), ("p", "c"), ("q", "a"), ("q", "bc")],
        p={"partition": True}, q={"partition": True}, ab={"scope": [0, 1]}, c={"scope": [2]},
        a={"scope": {0}}, bc={"scope": (1, 2)},
    )  # fmt: skip
    read = from_networkx(g)
    assert read.scopes[-1] == 0b111
    assert sorted(sorted(read.scopes[p] for p in ways) for ways in read.partitions[-1]) == [
        [0b001, 0b110],
        [0b011, 0b100],
    ]
    assert not read.is_tree
    assert from_networkx(digraph([("r", 0), ("r", 1), ("x", "r")]), root="r").n == 2


ONE, WAY = {"scope": [0]}, {"partition": True}
WRONG: list[tuple[str, str, Callable[[], object]]] = [
    ("no variables", "T100", lambda: balanced(0)),
    ("a word", "T102", lambda: from_nested(("a", 0))),
    ("true", "T102", lambda: from_nested((True, 0))),
    ("one part", "T102", lambda: from_nested(((0,), 1))),
    ("negative", "T102", lambda: from_nested((-1, 0))),
    ("a variable twice", "T102", lambda: from_nested(((0, 1), (1, 2)))),
    ("a variable missing", "T102", lambda: from_nested((0, 2))),
    ("no regions", "T102", lambda: RegionGraph((), ())),
    ("parts made later", "T102", lambda: RegionGraph((3, 1, 2), (((1, 2),), (), ()))),
    ("scope of other parts", "T102", lambda: RegionGraph((1, 2, 7), ((), (), ((0, 1),)))),
    ("undirected", "T103", lambda: from_networkx(nx.Graph([(0, 1)]))),
    ("a cycle", "T103", lambda: from_networkx(digraph([("a", "b"), ("b", "a")]))),
    ("two roots", "T103", lambda: from_networkx(digraph([("a", 0), ("b", 0)]))),
    ("nothing", "T103", lambda: from_networkx(nx.DiGraph())),
    ("no such root", "T103", lambda: from_networkx(digraph([("a", 0), ("a", 1)]), root="z")),
    ("leaf of no variable", "T103", lambda: from_networkx(digraph([("a", "x"), ("a", 1)]))),
    ("scope of words", "T103", lambda: from_networkx(digraph([("a", 1)], a={"scope": "xy"}))),
    ("scope of a number", "T103", lambda: from_networkx(digraph([], a={"scope": 3}))),
    ("empty scope", "T103", lambda: from_networkx(digraph([], a={"scope": []}))),
    (
        "scope of more than the parts", "T103",
        lambda: from_networkx(digraph([("a", 0), ("a", 1)], a={"scope": [0, 1, 2]})),
    ),
    (
        "partitions and regions", "T103",
        lambda: from_networkx(digraph([("a", "p"), ("a", 0), ("p", 0), ("p", 1)], p=WAY)),
    ),
    (
        "partition of a partition", "T103",
        lambda: from_networkx(digraph([("a", "p"), ("p", "q"), ("p", 1)], p=WAY, q=WAY)),
    ),
    (
        "partition of one part", "T102",
        lambda: from_networkx(digraph([("a", "p"), ("p", "x")], p=WAY, x=ONE)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "code", "build"), WRONG, ids=[w for w, _, _ in WRONG])
def test_wrong_graphs(what: str, code: str, build: Callable[[], object]) -> None:
    with pytest.raises(PccError) as e:
        build()
    assert e.value.code == code, str(e.value)
    assert len(str(e.value)) < 500
