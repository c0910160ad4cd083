"""Greedy drafts x_2..x_n given the carry x_1: three ways, all lossless, of unequal acceptance.

stepwise: x_i = argmax_v q(v | x_<i) in turn. max-product: the best latents and tokens together.
latent-first: the best latents given the carry, then the best token of each chosen expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcc.train.head import CircuitHead

NAMES = ("stepwise", "max_product", "latent_first")


def draft(
    head: CircuitHead, e: Tensor, carry: Tensor, kinds: Sequence[str] = NAMES
) -> dict[str, Tensor]:
    """Return each draft, i64[N,n] with the carry first, of hidden states [N,D]."""
    h = head.trunk(e)
    table = torch.log_softmax(head.emission_logits(h), -1)
    sums = head.sum_log_weights(h)
    rest = {"max_product": lambda: table.amax(-1), "latent_first": lambda: 0 * table[..., 0]}
    return {
        k: _latents(head, table, sums, carry, rest[k]())
        if k in rest
        else _stepwise(head, table, sums, carry)
        for k in kinds
    }


def _read(head: CircuitHead, table: Tensor, x: Tensor) -> Tensor:
    index = x[:, head.index(x.device)][:, :, None, None].expand(*table.shape[:3], 1)
    return table.gather(-1, index)[..., 0]


def _stepwise(head: CircuitHead, table: Tensor, sums: Sequence[Tensor], carry: Tensor) -> Tensor:
    x = carry[:, None].repeat(1, head.n)
    for i in range(1, head.n):
        beliefs = head.circuit.beliefs(_read(head, table, x), sums)
        x[:, i] = head.circuit.log_rows(beliefs, table)[:, i].argmax(-1)
    return x


def _latents(
    head: CircuitHead, table: Tensor, sums: Sequence[Tensor], carry: Tensor, rest: Tensor
) -> Tensor:
    """Choose latents for leaf values `rest`, the carry's own at the first token."""
    x = carry[:, None].repeat(1, head.n)
    scope = head.index(x.device)
    leaf = torch.where((scope == 0)[None, :, None], _read(head, table, x), rest)
    unit, used = head.circuit.mode(leaf, sums)
    best = table.argmax(-1).gather(-1, unit[..., None])[..., 0]  # [N,F]
    for fold, token in enumerate(head.scope):
        if token:
            x[:, token] = torch.where(used[:, fold], best[:, fold], x[:, token])
    return x
