"""Region graphs: which scopes are split how. Results are nested tuples for `templates.tree`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError

if TYPE_CHECKING:
    from pcc.frontends.templates import Nested


def balanced(n: int) -> Nested:
    """Cut 0..n-1 at round(len / 2), recursively: the published split rule."""
    return _halve(list(range(n)))


def random_tree(n: int, seed: int) -> Nested:
    """Shuffle the variables, then cut in halves."""
    order = np.random.default_rng(seed).permutation(n)
    return _halve([int(v) for v in order])


def _halve(scope: list[int]) -> Nested:
    if len(scope) == 1:
        return scope[0]
    at = round(len(scope) / 2)
    return (_halve(scope[:at]), _halve(scope[at:]))


def from_networkx(graph: Any) -> Nested:
    """Read a region tree: a `networkx.DiGraph` with one root whose leaves are variable indices."""
    import networkx as nx

    roots = [v for v, d in graph.in_degree() if d == 0]
    if len(roots) != 1 or not nx.is_arborescence(graph):
        raise PccError(
            "T103",
            f"the region graph is not a tree (roots: {roots[:5]})",
            hint="every region but the root has one parent; build DAGs with pcc.Builder",
        )
    built: dict[Any, Nested] = {}
    for node in nx.dfs_postorder_nodes(graph, roots[0]):
        children = list(graph.successors(node))
        if not children:
            if not isinstance(node, int | np.integer) or isinstance(node, bool):
                raise PccError("T103", f"the leaf {node!r} is not a variable index")
            built[node] = int(node)
        else:
            parts = tuple(built[x] for x in children)
            built[node] = parts[0] if len(parts) == 1 else parts
    return built[roots[0]]
