"""Heads over any region graph: how a configuration names one, and the wiring of its circuit.

`circuit.model.regions` (and `head.regions` of a training run) is text: `balanced`, `shuffled:SEED`,
`random:SEED`, a JSON list of lists of variables, `[[0,1],[2,3]]`, or, for graphs with several
partitions or shared regions, `{"scopes": [[0],[1],[0,1]], "partitions": [[],[],[[0,1]]]}`, parts
before wholes, each partition a list of regions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pcc.errors import PccError
from pcc.frontends.mtpc_wiring import LEAVES, Pair, SumFold, Wiring
from pcc.frontends.regions import (
    Nested,
    RegionGraph,
    balanced,
    from_nested,
    random_tree,
    shuffled,
)
from pcc.ir.types import mask_of, variables_of
from pcc.knobs import MAX_REGIONS, MAX_REGIONS_TEXT, MAX_WINDOW

Shape = tuple[int, int, int]
SEEDED: dict[str, Callable[[int, int], Nested]] = {"shuffled": shuffled, "random": random_tree}


def parse_regions(text: Any, n: int, at: str = "") -> RegionGraph:
    """Read the region graph of `n` variables. Errors: T102 (no such graph, or of another n)."""
    try:
        graph = _parse(text, n)
    except PccError as e:
        raise PccError(e.code, e.what, at=at, hint=e.hint) from None
    except (LookupError, TypeError, ValueError, RecursionError, OverflowError):
        hint = "balanced, shuffled:SEED, random:SEED, [[0,1],[2,3]], or scopes and partitions"
        raise PccError("T102", f"{str(text)[:80]!r} is no region graph", at=at, hint=hint) from None
    if graph.n != n:
        raise PccError("T102", f"the region graph is over {graph.n} variables, not {n}", at=at)
    return graph


def _parse(text: Any, n: int) -> RegionGraph:
    if not isinstance(text, str) or len(text) > MAX_REGIONS_TEXT or not 1 <= n <= MAX_WINDOW:
        raise ValueError
    name, _, seed = text.partition(":")
    if text == "balanced":
        return from_nested(balanced(n))
    if name in SEEDED:
        return from_nested(SEEDED[name](n, int(seed)))
    found = json.loads(text)
    if isinstance(found, list | int):
        _bounded(found, n)
        return from_nested(found)
    scopes, ways = found["scopes"], found["partitions"]
    if set(found) != {"scopes", "partitions"} or len(scopes) > MAX_REGIONS:
        raise ValueError
    for v in [*(v for s in scopes for v in s), *(p for w in ways for ps in w for p in ps)]:
        if type(v) is not int or not 0 <= v < max(n, len(scopes)):
            raise ValueError
    return RegionGraph(
        tuple(mask_of(s) for s in scopes),
        tuple(tuple(tuple(parts) for parts in way) for way in ways),
    )


def _bounded(tree: Any, n: int) -> None:
    """Refuse variables beyond n before any becomes a bit of a mask. Errors: T102."""
    stack = [tree]
    while stack:
        x = stack.pop()
        if isinstance(x, list):
            stack += x
        elif type(x) is int and not 0 <= x < n:
            raise PccError("T102", f"variable {str(x)[:20]} is not one of 0..{n - 1}")


def show_regions(graph: RegionGraph) -> str:
    """Return the text that `parse_regions` reads back as the same graph."""
    scopes = [variables_of(s) for s in graph.scopes]
    return json.dumps({"scopes": scopes, "partitions": graph.partitions}, separators=(",", ":"))


def region_wiring(graph: RegionGraph) -> Wiring:
    """Return the wiring of `templates.region_graph`: layers of one fold, parts first.

    Leaf fold i is variable i. A region has one sum for each partition, then a mixture if there are
    several; without partitions it is the product of its variables.
    """
    factors: list[tuple[Pair, ...]] = []  # whose product each region is
    sums: list[tuple[SumFold, ...]] = []
    for i, (scope, ways) in enumerate(zip(graph.scopes, graph.partitions, strict=True)):
        leaves = tuple((LEAVES, v) for v in variables_of(scope))
        if not ways and i < len(graph.scopes) - 1:
            factors.append(leaves)
            continue
        made: list[Pair] = []
        for parts in ways or ((),):
            inputs = tuple(x for p in parts for x in factors[p]) or leaves
            sums.append((SumFold(inputs),))
            made.append((len(sums) - 1, 0))
        if len(made) > 1:
            sums.append((SumFold(tuple(made), mix=True),))
        factors.append(((len(sums) - 1, 0),))
    return Wiring(tuple(sums), factors[-1])


def region_shapes(graph: RegionGraph, r: int) -> list[Shape]:
    """Return (F, Ko, Ki) of each sum layer: Ki is r, or the number of partitions of a mixture."""
    out: list[Shape] = []
    for i, ways in enumerate(graph.partitions):
        root = i == len(graph.partitions) - 1
        if not ways and not root:
            continue
        ko = 1 if root else r
        out += [(1, ko, r)] * max(1, len(ways))
        out += [(1, ko, len(ways))] if len(ways) > 1 else []
    return out
