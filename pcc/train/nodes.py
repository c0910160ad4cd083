"""The circuit of a head as a graph of sums; regions that several others read are one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pcc.frontends.mtpc_wiring import LEAVES, Pair, Wiring

FACTORS = -2  # a root without a sum: the product of its parts


@dataclass(frozen=True, eq=False)
class Node:
    """Fold `fold` of sum layer `layer` (-1: a leaf) and the parts that it multiplies, or mixes.

    `mask` holds the tokens below. A mixture weighs unit k of each part: m[k] = sum_h w[k,h] m_h[k].
    """

    layer: int
    fold: int
    mask: int
    parts: tuple[Node, ...] = ()
    mix: bool = False

    @property
    def is_product(self) -> bool:
        """Whether there are no weights."""
        return self.layer == FACTORS

    @property
    def first(self) -> int:
        """The first token below."""
        return (self.mask & -self.mask).bit_length() - 1

    def leaves(self) -> list[int]:
        """Return the leaf folds below a tree, left to right."""
        if self.layer == LEAVES:
            return [self.fold]
        return [f for p in self.parts for f in p.leaves()]


def nodes_of(wiring: Wiring, scope: Sequence[int]) -> list[Node]:
    """Return the nodes, parts first and in the order of their first tokens; the root last."""
    made: dict[Pair, Node] = {}
    for fold, token in enumerate(scope):
        made[LEAVES, fold] = Node(LEAVES, fold, 1 << token)
    for layer, folds in enumerate(wiring.sums):
        for fold, entry in enumerate(folds):
            parts = [made[p] for p in entry.inputs]
            if not entry.mix:
                parts.sort(key=lambda x: x.first)
            mask = 0
            for p in parts:
                mask |= p.mask
            made[layer, fold] = Node(layer, fold, mask, tuple(parts), entry.mix)
    nodes = list(made.values())
    if len(wiring.root) == 1 and nodes[-1] is not made[wiring.root[0]]:
        nodes.append(nodes.pop(nodes.index(made[wiring.root[0]])))
    if len(wiring.root) > 1:
        roots = sorted((made[p] for p in wiring.root), key=lambda x: x.first)
        nodes.append(Node(FACTORS, 0, (1 << len(set(scope))) - 1, tuple(roots)))
    return nodes


def is_forest(nodes: Sequence[Node]) -> bool:
    """Whether every node has one parent, and only the root mixes."""
    below = [p for v in nodes for p in v.parts]
    return len(below) == len(set(below)) and not any(v.mix for v in nodes[:-1])
