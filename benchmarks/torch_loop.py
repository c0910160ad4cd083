"""The published self-speculative loop in plain eager torch, with a clock at each part.

One round, for a shared backbone (no layers of its own for the draft), batch 1, fp32, sampling:

head      logits of the circuit from the features of the last committed token: one `linear` per
          parameter tensor (the published einsum is no faster)
normalise log_softmax of the emissions, softmax of the sum weights
sample    the published bottom-up sampler: every unit of every leaf draws a token, every sum unit
          chooses one of its inputs, the root's choice survives
verify    the backbone over the n drafts with a static key-value cache, and the output matrix
prefix    q(x_1..x_i) for i = 1..n: one masked batch of n rows
accept    the loop on the host: accept x_i while log u <= log p(x_i) - log q(x_i | x_<i)
residual  after a rejection: q(. | x_<i) from V masked rows, then a draw from max(0, p - q)

It restates the published loop without the circuit library around it and without its n-gram
dictionary, and it skips the extra pass that the published loop pays after a round without any
accepted token. It does less than the published code; the two were not timed side by side. The cache
is cropped by a length. The head's weights lie as published, `[n,r,V,D]`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines import Masked, Params

PARTS = ("head", "normalise", "sample", "verify", "prefix", "accept", "residual")


class Backbone:
    """A Llama decoder over a static key-value cache."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor], rows: int) -> None:
        self.config, self.state = config, state
        self.heads = config["num_attention_heads"]
        self.width = config["hidden_size"] // self.heads
        layers = config["num_hidden_layers"]
        self.keys = [torch.zeros(1, self.heads, rows, self.width) for _ in range(layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        half = torch.arange(0, self.width, 2, dtype=torch.float64) / self.width
        angle = torch.arange(rows, dtype=torch.float64)[:, None] * config["rope_theta"] ** -half
        double = torch.cat((angle, angle), -1)
        self.cos, self.sin = double.cos().float(), double.sin().float()
        self.mask = torch.ones(rows, rows, dtype=torch.bool).tril()

    def __call__(self, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, V) of tokens at positions start.."""
        s, count = self.state, ids.shape[0]
        stop = start + count
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        mask = self.mask[start:stop, :stop]
        x = s["model.embed_tokens.weight"][ids]
        for i in range(len(self.keys)):
            at = f"model.layers.{i}."
            h = self._norm(x, s[f"{at}input_layernorm.weight"])
            q, k, v = (
                functional.linear(h, s[f"{at}self_attn.{c}_proj.weight"])
                .view(count, self.heads, self.width)
                .transpose(0, 1)
                for c in "qkv"
            )
            self.keys[i][0, :, start:stop] = _turn(k, cos, sin)
            self.values[i][0, :, start:stop] = v
            y = functional.scaled_dot_product_attention(
                _turn(q, cos, sin)[None],
                self.keys[i][:, :, :stop],
                self.values[i][:, :, :stop],
                attn_mask=mask,
            )
            y = y[0].transpose(0, 1).reshape(count, -1)
            x = x + functional.linear(y, s[f"{at}self_attn.o_proj.weight"])
            h = self._norm(x, s[f"{at}post_attention_layernorm.weight"])
            gate = functional.linear(h, s[f"{at}mlp.gate_proj.weight"])
            up = functional.linear(h, s[f"{at}mlp.up_proj.weight"])
            x = x + functional.linear(functional.silu(gate) * up, s[f"{at}mlp.down_proj.weight"])
        hidden = self._norm(x, s["model.norm.weight"])
        return hidden, functional.linear(hidden, s["lm_head.weight"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config["rms_norm_eps"])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Loop:
    """Rounds of the published loop on one sequence."""

    def __init__(
        self, masked: Masked, backbone: Backbone, emission: Tensor, sums: Sequence[Tensor]
    ) -> None:
        self.masked, self.backbone = masked, backbone
        self.weights = [w.reshape(-1, w.shape[-1]) for w in (emission, *sums)]
        self.shapes = [w.shape[:-1] for w in (emission, *sums)]
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.accepted = 0

    def start(self, prompt: Tensor) -> None:
        """Read the prompt."""
        hidden, logits = self.backbone(prompt, 0)
        self.length, self.hidden, self.logits = len(prompt), hidden[-1], logits[-1:]

    def head(self, hidden: Tensor) -> list[Tensor]:
        """Return the circuit's logits for features (D,)."""
        pairs = zip(self.weights, self.shapes, strict=True)
        return [functional.linear(hidden, w).view(shape) for w, shape in pairs]

    def normalise(self, logits: Sequence[Tensor]) -> Params:
        """Return the circuit's parameters."""
        emission, *sums = logits
        return Params(torch.log_softmax(emission, -1), tuple(torch.softmax(s, -1) for s in sums))

    @torch.no_grad()
    def round(self, u: Tensor) -> Tensor:
        """Draft and verify n tokens from the same state; return those that stay."""
        n, clock = self.masked.n, _Clock(self.seconds)
        made = self.head(self.hidden)
        clock("head")
        p = self.normalise(made)
        clock("normalise")
        x = self.sample(p)
        clock("sample")
        _, logits = self.backbone(x, self.length)
        log_p = torch.log_softmax(torch.cat((self.logits, logits)), -1)
        clock("verify")
        log_prefix = self.masked.prefix(p, x)
        log_q = torch.diff(log_prefix, prepend=torch.zeros(1))
        clock("prefix")
        ratio = (log_p[torch.arange(n), x] - log_q).cpu()
        level = u.log().cpu()
        count = 0
        while count < n and level[count] <= ratio[count]:
            count += 1
        clock("accept")
        if count < n:
            free = self.residual(p, x, count, log_p[count].exp())
        else:
            free = torch.multinomial(log_p[n].exp(), 1)
        clock("residual")
        self.accepted = count
        return torch.cat((x[:count], free))

    def sample(self, p: Params) -> Tensor:
        """Draw x (n,) bottom-up: every unit draws, the root's choice survives."""
        m = self.masked
        n, r, vocab = p.emission.shape
        leaf = torch.multinomial(p.emission.exp().view(n * r, vocab), 1).view(n, r, 1)
        if m.kind == "ff":
            return leaf[:, 0, 0]
        if m.kind == "cp":
            return leaf[:, int(_choose(p.sums[0])), 0]
        if m.kind == "hmm":
            value = leaf[n - 1]
            for k, w in enumerate(p.sums):
                value = value[_choose(w)[0]]
                if k < n - 1:
                    value = torch.cat((leaf[n - 2 - k], value), -1)
            return value[0]
        value = leaf
        for w in p.sums:
            both = torch.cat((value[0::2], value[1::2]), -1)
            pick = _choose(w)[..., None].expand(-1, -1, both.shape[-1])
            value = both.gather(1, pick)
        return value[0, 0]

    def residual(self, p: Params, x: Tensor, at: int, target: Tensor) -> Tensor:
        """Draw from max(0, target - q(x_at = . | x_<at))."""
        m = self.masked
        rows = x.repeat(m.vocab, 1)
        rows[:, at] = torch.arange(m.vocab)
        seen = m.until[at].expand(m.vocab, m.n)
        root = m.up(p, m.leaves(p, rows, seen)).root
        rest = (target - torch.softmax(root, -1)).clamp_min(1e-15)
        return torch.multinomial(rest, 1)


def _choose(w: Tensor) -> Tensor:
    """Choose one input for each unit of weights (F, Ko, Ki): (F, Ko)."""
    return torch.multinomial(w.flatten(0, 1), 1).view(w.shape[:2])


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self.last = now - self.last, now
