"""Held-out measures: bits per byte of a backbone, accepted bytes per round of a head.

Greedy decoding with drafts emits exactly the verifier's greedy text, so its rounds can be replayed
on that text: at position t the draft of hidden state e_t, given the carry, is accepted up to its
first difference, a_t bytes; the next round starts at t + a_t + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcc.train import drafts
from pcc.train.backbone import BOS, Backbone
from pcc.train.head import CircuitHead
from pcc.train.lora import DraftLayers

Values = np.ndarray[Any, Any]
CHUNK = 2048  # positions at once


@torch.no_grad()
def bits_per_byte(
    model: Backbone, documents: Mapping[str, bytes], length: int, device: torch.device
) -> float:
    """Return -mean log2 p(x_t | x_<t) over rows of `length` ids, each begun with BOS."""
    rows = []
    for body in documents.values():
        cut = [body[i : i + length - 1] for i in range(0, len(body), length - 1)]
        rows += [[BOS, *piece] for piece in cut if len(piece) == length - 1]
    total, count = 0.0, 0
    for i in range(0, len(rows), 16):
        ids = torch.tensor(rows[i : i + 16], device=device)
        logp = torch.log_softmax(model.lm_head(model(ids[:, :-1])).float(), -1)
        total -= float(logp.gather(-1, ids[:, 1:, None]).double().sum())
        count += ids[:, 1:].numel()
    return total / max(1, count) / float(np.log(2))


@torch.no_grad()
def continuations(model: Backbone, prompts: Tensor, length: int) -> Tensor:
    """Return prompts [B,P] followed by `length` ids, each the argmax; bytes only."""
    b, p = prompts.shape
    cache = model.cache(b, p + length)
    ids = torch.cat([prompts, prompts.new_zeros(b, length)], 1)
    h = model.cached(prompts, cache, 0)[:, -1]
    for t in range(p, p + length):
        ids[:, t] = model.lm_head(h)[:, :BOS].argmax(-1)
        if t + 1 < p + length:
            h = model.cached(ids[:, t : t + 1], cache, t)[:, -1]
    return ids


@dataclass(frozen=True)
class Acceptance:
    """Greedy texts of the verifier for some prompts, and the layers' states on them."""

    model: Backbone
    ids: Tensor  # [B,T]
    prompt: int
    kept: dict[int | None, list[Tensor]] | None = None  # states of all rows, if they are to be kept

    @classmethod
    def of(cls, model: Backbone, prompts: Tensor, length: int, *, keep: bool = False) -> Acceptance:
        """Continue the prompts greedily."""
        parts = [continuations(model, p, length) for p in torch.split(prompts, 256)]
        return cls(model, torch.cat(parts), prompts.shape[1], {} if keep else None)

    @torch.no_grad()
    def states(self, rows: int, stop: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `rows` texts at a time and the states of the layers below `stop` on them."""
        kept = None if self.kept is None else self.kept.get(stop)
        made: list[Tensor] = []
        for i, ids in enumerate(torch.split(self.ids, rows)):
            h = self.model.states(ids, stop) if kept is None else kept[i]
            made.append(h)
            yield ids, h
            if self.kept is None:
                made.clear()
        if self.kept is not None:
            self.kept[stop] = made

    @torch.no_grad()
    def each(
        self, head: CircuitHead, draft: DraftLayers | None
    ) -> tuple[Tensor, dict[str, Values]]:
        """Return -log q of each slot, [N,n], and each prompt's accepted bytes per round."""
        n, (_, t) = head.n, self.ids.shape
        start = torch.arange(self.prompt - 1, t - n, device=self.ids.device)
        accepted: dict[str, list[Tensor]] = {k: [] for k in drafts.NAMES}
        nll: list[Tensor] = []
        rows = max(1, CHUNK // len(start))
        for ids, shared in self.states(rows, draft.start if draft else None):
            h = draft(shared) if draft else self.model.finish(shared, self.model.depth)
            e = h[:, start].flatten(0, 1)
            x = ids[:, start[:, None] + torch.arange(1, n + 1, device=ids.device)].flatten(0, 1)
            nll.append(-head(e, x))
            for k, d in drafts.draft(head, e, x[:, 0]).items():
                same = (d == x)[:, 1:].long().cumprod(1).sum(1)
                accepted[k].append(same.view(len(ids), -1))
        means = {
            k: np.array([_replay(row) for row in torch.cat(parts).tolist()])
            for k, parts in accepted.items()
        }
        return torch.cat(nll), means

    def measure(self, head: CircuitHead, draft: DraftLayers | None) -> dict[str, float]:
        """Return mean accepted bytes per round with 95 % half-widths over prompts, and NLL."""
        nll, means = self.each(head, draft)
        slots = nll.mean(0)
        out = {"nll_per_byte": float(slots.mean()), "nll_after_carry": float(slots[1:].mean())}
        for k, mean in means.items():
            out[f"accepted_{k}"] = float(mean.mean())
            out[f"accepted_{k}_ci95"] = half_width(mean)
        return out


def half_width(values: Values) -> float:
    """Return half the 95 % interval of a mean: 1.96 s / sqrt(N)."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else float("inf")
    return 1.96 * spread / math.sqrt(len(values))


def _replay(accepted: list[int]) -> float:
    """Return the mean number of accepted bytes of the rounds that decoding would make."""
    at, rounds, total = 0, 0, 0
    while at < len(accepted):
        total, rounds = total + accepted[at], rounds + 1
        at += accepted[at] + 1
    return total / rounds
