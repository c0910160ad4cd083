"""Conditionals of any smooth and decomposable circuit in one upward and one downward recursion.

For the prefix x_<i, a node reads only how many of its own variables come before i: its cut c in
0..|scope|. So it has |scope| + 1 upward messages instead of n + 1, in all the sum of scope sizes
(n log n for balanced trees), and one downward message for each variable of its scope:

    up    m_v[c,k] = log sum_z W_v[k,z] prod_j m_j[c_j(c), z],   leaf: m[0] = 0, m[1] = log phi(x)
    down  d_v[c,k], c the cut before variable i of v: log dP(x_<i) / dm_v[c,k]

c_j(c) counts the variables of part j among the first c of v. At a leaf of token i,
d = log P(x_<i, unit z) up to what normalises it: log q(x_i | x_<i) = logsumexp_z(d + log phi) - m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcc.frontends.mtpc_wiring import LEAVES
from pcc.ir.types import variables_of
from pcc.train.nodes import Node


class Cuts:
    """The recursions over nodes in topological order, parts first; the last one is the root."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.scopes = {v: variables_of(v.mask) for v in self.nodes}
        self._index: dict[tuple[Node, Node, torch.device], Tensor] = {}

    def _cut(self, v: Node, part: Node, device: torch.device) -> Tensor:
        """Return c_part(c) for each cut c of v, i64[|scope(v)| + 1]."""
        key = (v, part, device)
        if key not in self._index:
            inside = [0]
            for x in self.scopes[v]:
                inside.append(inside[-1] + (part.mask >> x & 1))
            self._index[key] = torch.tensor(inside, device=device)
        return self._index[key]

    def up(self, leaf: Tensor, sums: Sequence[Tensor]) -> dict[Node, Tensor]:
        """Return m [N, |scope| + 1, K] of every node, of log leaves [N,F,r]."""
        found: dict[Node, Tensor] = {}
        for v in self.nodes:
            if v.layer == LEAVES:
                here = leaf[:, v.fold]
                found[v] = torch.stack([torch.zeros_like(here), here], 1)
                continue
            x = self._parts(v, found)
            if v.is_product:
                found[v] = x
            elif v.mix:
                found[v] = torch.logsumexp(sums[v.layer][:, v.fold, None] + x, -1)
            else:
                w = sums[v.layer][:, v.fold, None]
                found[v] = torch.logsumexp(w + x[..., None, :], -1)
        return found

    def _parts(self, v: Node, found: Mapping[Node, Tensor]) -> Tensor:
        """Return the product of the parts [N,C,K], or for a mixture the parts [N,C,K,H]."""
        xs = [found[p] for p in v.parts]
        if v.mix:
            return torch.stack(xs, -1)
        cuts = (self._cut(v, p, xs[0].device) for p in v.parts)
        return torch.stack([x[:, c] for x, c in zip(xs, cuts, strict=True)]).sum(0)

    def log_conditionals(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """Return log q(x_i | x_<i), [N,n]: differences of the root's messages."""
        top = self.up(leaf, sums)[self.nodes[-1]]
        top = top.sum(-1) if top.shape[-1] == 1 else top[..., 0]  # a product of leaves has r units
        return torch.diff(top, dim=-1)

    def beliefs(self, leaf: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """Return log p(fold f, unit z of token i | x_<i), [N,F,r]."""
        found = self.up(leaf, sums)
        root = self.nodes[-1]
        given: dict[Node, list[Tensor]] = {root: [-found[root][:, :-1]]}
        out: dict[int, Tensor] = {}
        for v in reversed(self.nodes):
            if v not in given:  # a region that the root does not use
                continue
            parts = given.pop(v)
            d = parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), 0)
            if v.layer == LEAVES:
                out[v.fold] = d[:, 0]
                continue
            for p, b in zip(v.parts, self._down(v, d, found, sums), strict=True):
                given.setdefault(p, []).append(b)
        return torch.stack([out[f] for f in range(leaf.shape[1])], 1)

    def _down(
        self, v: Node, d: Tensor, found: Mapping[Node, Tensor], sums: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return each part's share of d [N,C,K], at the cuts before its own variables."""
        if v.mix:
            w = sums[v.layer][:, v.fold, None]
            return [d + w[..., h] for h in range(len(v.parts))]
        if not v.is_product:
            d = torch.logsumexp(d[..., None] + sums[v.layer][:, v.fold, None], 2)
        cuts = [self._cut(v, p, d.device)[:-1] for p in v.parts]
        xs = [found[p][:, c] for p, c in zip(v.parts, cuts, strict=True)]
        shares = []
        for j, p in enumerate(v.parts):
            others = [x for i, x in enumerate(xs) if i != j]
            b = torch.stack([d.expand_as(xs[j]), *others]).sum(0)
            mine = [c for c, x in enumerate(self.scopes[v]) if p.mask >> x & 1]
            shares.append(b[:, mine])
        return shares
