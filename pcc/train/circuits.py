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

import torch
from torch import Tensor

from pcc.frontends.mtpc_wiring import LEAVES, Wiring
from pcc.train.cuts import Cuts
from pcc.train.nodes import FACTORS, Node, is_forest, nodes_of


class TorchCircuit:
    """The structure of one head's circuit, and its recursions."""

    def __init__(self, wiring: Wiring, scope: Sequence[int], n: int) -> None:
        self.scope, self.n = tuple(scope), n
        self._index: dict[torch.device, Tensor] = {}
        self.nodes = nodes_of(wiring, scope)
        self.root = self.nodes[-1]
        self.cuts = Cuts(self.nodes)
        self.mixed = self.root if self.root.mix else None
        self.trees = list(self.root.parts) if self.mixed else [self.root]
        self.ordered = is_forest(self.nodes) and all(
            [self.scope[f] for f in t.leaves()] == list(range(n)) for t in self.trees
        )

    # ------------------------------------------------------------ sums

    def log_conditionals(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """Return log q(x_i | x_<i), [N,n]."""
        if not self.ordered:
            return self.cuts.log_conditionals(leaf, sums)
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
        """Return log p(fold f, unit z of token i | x_<i), [N,F,r]."""
        if not self.ordered:
            return self.cuts.beliefs(leaf, sums)
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
            return leaf[:, node.fold]
        if node not in seen:
            parts = [self._up(p, leaf, sums, seen) for p in node.parts]
            if node.layer == FACTORS:
                return torch.stack(parts).sum(0)
            x = torch.stack(parts).sum(0)
            seen[node] = torch.logsumexp(sums[node.layer][:, node.fold] + x[:, None], -1)
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

    # ------------------------------------------------------------ modes

    def mode(self, leaf: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the best unit of each fold and which folds are used, for leaf values [N,F,r].

        max over induced trees of prod w prod leaf; ties go to the first. i64[N,F], bool[N,F].
        """
        back: dict[Node, Tensor] = {}
        best: dict[Node, Tensor] = {}
        for v in self.nodes:
            self._best(v, leaf, sums, best, back)
        rows = leaf.shape[0]
        unit = leaf.new_zeros(rows, len(self.scope), dtype=torch.long)
        used = leaf.new_zeros(rows, len(self.scope), dtype=torch.bool)
        start = leaf.new_zeros(rows, dtype=torch.long)
        chosen = {self.root: (start, torch.ones_like(start, dtype=torch.bool))}
        for v in reversed(self.nodes):
            if v not in chosen:
                continue
            state, here = chosen.pop(v)
            if v.layer == LEAVES:
                unit[:, v.fold], used[:, v.fold] = torch.where(here, state, 0), here
            else:
                self._choose(v, state, here, back, chosen)
        return unit, used

    def _best(
        self,
        v: Node,
        leaf: Tensor,
        sums: Sequence[Tensor],
        best: dict[Node, Tensor],
        back: dict[Node, Tensor],
    ) -> None:
        if v.layer == LEAVES:
            best[v] = leaf[:, v.fold]
            return
        parts = [best[p] for p in v.parts]
        if v.layer == FACTORS:
            best[v] = torch.stack(parts).sum(0)
            return
        x = torch.stack(parts, -1) if v.mix else torch.stack(parts).sum(0)[:, None]
        best[v], back[v] = (sums[v.layer][:, v.fold] + x).max(-1)

    def _choose(
        self,
        v: Node,
        state: Tensor,
        here: Tensor,
        back: dict[Node, Tensor],
        chosen: dict[Node, tuple[Tensor, Tensor]],
    ) -> None:
        """Send each row on to the parts that its choice uses; a mixture keeps the unit."""
        z = state if v.layer == FACTORS else back[v].gather(1, state[:, None])[:, 0]
        for j, p in enumerate(v.parts):
            mine, inner = (here & (z == j), state) if v.mix else (here, z)
            if p in chosen:  # in no row by two ways: the parts of a product are disjoint
                before, there = chosen[p]
                inner, mine = torch.where(mine, inner, before), mine | there
            chosen[p] = inner, mine
