"""log q(x_i | x_<i) of a folded circuit in torch, for all i in one recursion.

Values are logs. `leaf [N,F,r]` holds log phi_{f,z}(x_scope(f)), `sums[k] [N,F,Ko,Ki]` log weights,
normalised over Ki. A node v with weights W_v reads the product of its parts c_1, c_2, ..:

    up:    m_v[k] = sum_z W_v[k,z] prod_j m_cj[z]
    down:  b_v[z] = sum_k d_v[k] W_v[k,z],   d_cj[z] ~ b_v[z] prod_{l<j} m_cl[z]

With unread parts equal to 1 (everything is normalised), d at a leaf of token i is the posterior of
its unit given x_<i, and q(x_i = v | x_<i) = sum_z d[z] phi[z, v]. CP: the posterior of the
mixture; HMM: the forward message; trees: each up message is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcc.errors import PccError
from pcc.frontends.mtpc_wiring import LEAVES, Pair, Wiring

FACTORS = -2  # a root without a sum: the product of its parts


@dataclass(frozen=True, eq=False)
class Node:
    """Fold `fold` of sum layer `layer` (-1: a leaf) and the parts that it multiplies."""

    layer: int
    fold: int
    parts: tuple[Node, ...] = ()
    mix: bool = False

    def leaves(self) -> list[int]:
        """Return the leaf folds below, left to right."""
        if self.layer == LEAVES:
            return [self.fold]
        return [f for p in self.parts for f in p.leaves()]


class TorchCircuit:
    """The structure of one head's circuit, and its recursions."""

    def __init__(self, wiring: Wiring, scope: Sequence[int], n: int) -> None:
        self.scope, self.n = tuple(scope), n
        self._index: dict[torch.device, Tensor] = {}
        self.roots = [self._node(wiring, p) for p in wiring.root]
        top = self.roots[0]
        self.mixed = top if len(self.roots) == 1 and top.mix else None
        self.trees = list(self.mixed.parts) if self.mixed else [self._single()]
        self.ordered = all(
            [self.scope[f] for f in t.leaves()] == list(range(n)) for t in self.trees
        )

    def _single(self) -> Node:
        return self.roots[0] if len(self.roots) == 1 else Node(FACTORS, 0, tuple(self._sorted()))

    def _sorted(self) -> list[Node]:
        return sorted(self.roots, key=lambda x: min(self.scope[f] for f in x.leaves()))

    def _node(self, wiring: Wiring, pair: Pair) -> Node:
        """Unfold one sum; parts are put in the order of their first token."""
        layer, fold = pair
        if layer == LEAVES:
            return Node(LEAVES, fold)
        entry = wiring.sums[layer][fold]
        parts = [self._node(wiring, p) for p in entry.inputs]
        if not entry.mix:
            parts.sort(key=lambda x: min(self.scope[f] for f in x.leaves()))
        return Node(layer, fold, tuple(parts), entry.mix)

    # ------------------------------------------------------------ sums

    def log_conditionals(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """Return log q(x_i | x_<i), [N,n]."""
        if not self.ordered:
            return self._by_prefix(leaf, sums)
        each = self.beliefs(leaf, sums) + leaf
        return self._by_token(each, leaf.shape[0])

    def _by_token(self, each: Tensor, rows: int) -> Tensor:
        """Log sum over the folds of a token and their units: [N,F,r] -> [N,n]."""
        if self.scope == tuple(range(self.n)):
            return torch.logsumexp(each, -1)
        index = self._folds(each.device)
        return torch.logsumexp(each[:, index].reshape(rows, self.n, -1), -1)

    def _folds(self, device: torch.device) -> Tensor:
        """Return the leaf folds of each token, i64[n,s]."""
        if device not in self._index:
            folds = [[f for f, v in enumerate(self.scope) if v == i] for i in range(self.n)]
            self._index[device] = torch.tensor(folds, device=device)
        return self._index[device]

    def log_rows(self, beliefs: Tensor, table: Tensor) -> Tensor:
        """Return log q(x_i = v | x_<i) [N,n,V] of beliefs [N,F,r] and log tables [N,F,r,V]."""
        each = beliefs[..., None] + table
        return torch.logsumexp(each[:, self._folds(each.device)].flatten(2, 3), 2)

    def beliefs(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """Return log p(fold f, unit z of token i | x_<i), [N,F,r]; errors: N110."""
        if not self.ordered:
            what = "this tree interleaves its variables: only likelihoods can be trained"
            raise PccError(
                "N110", what, hint="use an unshuffled circuit for distillation and drafts"
            )
        found: dict[int, Tensor] = {}
        for tree in self.trees:
            self._down(tree, leaf.new_zeros(leaf.shape[0], 1), leaf, sums, {}, found)
        if self.mixed:
            self._weigh(leaf, sums, found)
        return torch.stack([found[f] for f in range(len(self.scope))], 1)

    def _down(
        self,
        node: Node,
        d: Tensor,
        leaf: Tensor,
        sums: Sequence[Tensor],
        seen: dict[Node, Tensor],
        found: dict[int, Tensor],
    ) -> None:
        """Distribute the posterior `d` [N,Ko] of a node over its parts."""
        if node.layer == LEAVES:
            found[node.fold] = d
            return
        if node.layer == FACTORS:
            b = d.expand(-1, leaf.shape[2])
        else:
            b = torch.logsumexp(d[..., None] + sums[node.layer][:, node.fold], 1)
        for j, part in enumerate(node.parts):
            self._down(part, b, leaf, sums, seen, found)
            # A product without latents (the factorised root) leaves the other parts as they are.
            if j + 1 < len(node.parts) and node.layer != FACTORS:
                b = torch.log_softmax(b + self._up(part, leaf, sums, seen), -1)

    def _up(
        self, node: Node, leaf: Tensor, sums: Sequence[Tensor], seen: dict[Node, Tensor]
    ) -> Tensor:
        """Return m [N,Ko] of a node whose variables are all observed."""
        if node.layer == LEAVES:
            return leaf[..., node.fold, :]
        if node not in seen:
            parts = [self._up(p, leaf, sums, seen) for p in node.parts]
            if node.layer == FACTORS:
                return torch.stack(parts).sum(0)
            x = torch.cat(parts, -1) if node.mix else torch.stack(parts).sum(0)
            w = sums[node.layer][:, node.fold]
            w = w.reshape(w.shape[0], *(1,) * (x.ndim - 2), *w.shape[1:])
            seen[node] = torch.logsumexp(w + x[..., None, :], -1)
        return seen[node]

    def _weigh(self, leaf: Tensor, sums: Sequence[Tensor], found: dict[int, Tensor]) -> None:
        """Multiply each repetition's beliefs by its own posterior given x_<i."""
        assert self.mixed is not None
        prior = sums[self.mixed.layer][:, self.mixed.fold, 0]
        folds = [t.leaves() for t in self.trees]
        for i in range(self.n):
            weight = torch.log_softmax(prior, -1)
            gains = []
            for s, fs in enumerate(folds):
                here = torch.logsumexp(found[fs[i]] + leaf[:, fs[i]], -1)
                gains.append(here)
                found[fs[i]] = found[fs[i]] + weight[:, s, None]
            prior = weight + torch.stack(gains, -1)

    def _by_prefix(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """The same for any order of the variables, by n upward passes as one batch."""
        i = torch.arange(self.n, device=leaf.device)[:, None]
        scope = torch.tensor(self.scope, device=leaf.device)
        masked = torch.where((scope <= i)[None, :, :, None], leaf[:, None], leaf.new_zeros(()))
        tops = [self._up(x, masked, sums, {}) for x in self.roots]
        total = torch.stack([x.sum(-1) if x.shape[-1] == 1 else x[..., 0] for x in tops]).sum(0)
        return torch.diff(total, dim=-1, prepend=total.new_zeros(total.shape[0], 1))

    # ------------------------------------------------------------ modes

    def mode(self, leaf: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the best unit of each fold and which folds are used, for leaf values [N,F,r].

        max over induced trees of prod w prod leaf; ties go to the first. i64[N,F], bool[N,F].
        """
        back: dict[Node, Tensor] = {}
        for root in self.roots:
            self._best(root, leaf, sums, back)
        rows = leaf.shape[0]
        unit = leaf.new_zeros(rows, len(self.scope), dtype=torch.long)
        used = leaf.new_zeros(rows, len(self.scope), dtype=torch.bool)
        start = unit.new_zeros(rows)
        for root in self.roots:
            self._choose(root, start, torch.ones_like(start, dtype=torch.bool), back, unit, used)
        return unit, used

    def _best(
        self, node: Node, leaf: Tensor, sums: Sequence[Tensor], back: dict[Node, Tensor]
    ) -> Tensor:
        if node.layer == LEAVES:
            return leaf[:, node.fold]
        parts = [self._best(p, leaf, sums, back) for p in node.parts]
        x = torch.cat(parts, -1) if node.mix else torch.stack(parts).sum(0)
        score = sums[node.layer][:, node.fold] + x[:, None, :]
        value, back[node] = score.max(-1)
        return value

    def _choose(
        self,
        node: Node,
        state: Tensor,
        here: Tensor,
        back: dict[Node, Tensor],
        unit: Tensor,
        used: Tensor,
    ) -> None:
        if node.layer == LEAVES:
            unit[:, node.fold] = torch.where(here, state, unit[:, node.fold])
            used[:, node.fold] |= here
            return
        z = back[node].gather(1, state[:, None])[:, 0]
        for j, part in enumerate(node.parts):
            mine = here & (z == j) if node.mix else here
            inner = torch.zeros_like(z) if node.mix else z
            self._choose(part, inner, mine, back, unit, used)
