"""The n-row masked strategy of the published code, in plain torch: what drafts are compared with.

The published MTPC code answers a prefix q(x_1..x_i) by evaluating the *whole* circuit with the
variables after i integrated out (their leaves become log 1 = 0), and all prefixes by a batch of n
such rows; a conditional row q(x_i = . | x_<i) by giving slot i all V values, V more rows. `Masked`
restates that strategy without the library around it: no graph interpreter, no re-checks, no device
copies, fp32 instead of bf16 autocast, and weights broadcast over rows where the published code
repeats them. It is therefore faster than the published code; a ratio against it flatters nobody.

`Masked.draft(carry, u, ...)` answers the question that the compiled `draft` query answers: given
the carry x_1, draw x_2..x_n and return q. The published loop never conditions a draft on a carry,
so that part is ours, done in the cheapest way the strategy allows:

1. log_softmax of the emissions, softmax of the sums (the inputs are logits, as for pcc);
2. one masked evaluation with only x_1 observed, keeping the input of every sum;
3. top-down ancestral sampling from these values: one draw per visited sum unit, then the n-1
   tokens in one batch. (The published sampler draws n * r tokens bottom-up and discards most.)
4. the rows, in one of three forms, `rows=`:
   - "open" (default): n-1 masked rows, leaf i of row i left open. A circuit is linear in a leaf,
     so one upward pass over the n-1 rows and one downward pass (the derivative with respect to
     every leaf) give the weights b_i[z], and q(x_i = v | x_<i) = sum_z b_i[z] p(v | i, z) / sum b_i
     is one small matmul for all V values. Cheaper than anything in the published code, which has
     no derivatives: n-1 full-circuit evaluations and their reverse.
   - "expand": the published residual routine for every position: per position a batch of V full
     evaluations, (n-1) * V rows in all. (The published loop runs it once per round, for the
     rejected position only; all positions is what training and validation ask of it.)
   - False: only the n prefix marginals, the least the published loop needs per round; `q` is then
     (n-1,), the conditional of each drafted token. It answers less than `draft` does.

Logits must be finite: like the published code, the log-sum-exp has no guard for all -inf.

Shapes and fold order of the logits are the published ones: emissions (1, n, r, V) in token order;
sums per layer (1, F, Ko, Ki): ff none; cp one (1, 1, 1, r); hmm n layers, the last transition
first, the initial distribution (1, 1, 1, r) last; btree (n = 2^k) (1, n/2, r, r), (1, n/4, r, r),
.., (1, 1, 1, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["ff", "cp", "hmm", "btree"]
Rows = Literal["open", "expand", False]
Array = np.ndarray[Any, Any]
KINDS: tuple[Kind, ...] = ("ff", "cp", "hmm", "btree")


def sum_shapes(kind: str, n: int, r: int) -> list[tuple[int, int, int]]:
    """Return (F, Ko, Ki) of every sum layer, in the published order."""
    if kind == "ff":
        return []
    if kind == "cp":
        return [(1, 1, r)]
    if kind == "hmm":
        return [(1, r, r)] * (n - 1) + [(1, 1, r)]
    if kind == "btree":
        if n < 2 or n & (n - 1):
            raise ValueError(f"btree needs n = 2^k, got {n}")
        levels = [n >> k for k in range(1, n.bit_length())]
        return [(f, r if f > 1 else 1, r) for f in levels]
    raise ValueError(f"unknown kind {kind!r}, one of {', '.join(KINDS)}")


def random_logits(
    kind: str, n: int, r: int, vocab: int, seed: int = 0, scale: float = 1.5
) -> tuple[Array, list[Array]]:
    """Return emission logits f32 (1, n, r, V) and sum logits, each f32 (1, F, Ko, Ki)."""
    rng = np.random.default_rng(seed)
    emission = (scale * rng.standard_normal((1, n, r, vocab))).astype(np.float32)
    sums = [
        (scale * rng.standard_normal((1, *shape))).astype(np.float32)
        for shape in sum_shapes(kind, n, r)
    ]
    return emission, sums


@dataclass(frozen=True)
class Params:
    """Normalised parameters: log emissions (n, r, V), linear sum weights, each (F, Ko, Ki)."""

    emission: Tensor
    sums: tuple[Tensor, ...]


@dataclass
class Trace:
    """One upward pass: the root (R,), the input of every sum, the values below every product."""

    root: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    below: list[Tensor] = field(default_factory=list)


def _sum(x: Tensor, w: Tensor) -> Tensor:
    """Return log(exp(x) @ w^T): x (F, R, Ki) in logs, w (F, Ko, Ki) linear."""
    m = x.amax(-1, keepdim=True)
    return torch.log(torch.bmm(torch.exp(x - m), w.mT)) + m


def _draw(mass: Tensor, u: Tensor) -> Tensor:
    """Return per row the first index whose cumulative mass exceeds u times the total."""
    cum = mass.cumsum(-1)
    index = torch.searchsorted(cum, (u * cum[..., -1])[..., None], right=True)[..., 0]
    return index.clamp_(max=mass.shape[-1] - 1)


class Masked:
    """The n-row masked strategy for one circuit shape (see the module's text)."""

    def __init__(self, kind: str, n: int, r: int, vocab: int) -> None:
        if kind == "ff" and r != 1:
            raise ValueError("ff has r = 1")
        self.kind, self.n, self.r, self.vocab = kind, n, r, vocab
        self.shapes = sum_shapes(kind, n, r)
        self.latents = sum(f for f, _, _ in self.shapes)
        self.tokens = torch.arange(n)
        self.until = torch.ones(n, n, dtype=torch.bool).tril()  # row i observes 0..i
        self.nothing = torch.zeros(n - 1, dtype=torch.int64)

    @property
    def uniforms(self) -> int:
        """How many uniforms `draft` takes: the latents in sampling order, then n-1 tokens."""
        return self.latents + self.n - 1

    def normalise(self, emission_logits: Tensor, sum_logits: Sequence[Tensor]) -> Params:
        """Apply the softmaxes; the batch axis is 1."""
        emission = torch.log_softmax(emission_logits[0], -1)
        return Params(emission, tuple(torch.softmax(s[0], -1) for s in sum_logits))

    def leaves(self, p: Params, x: Tensor, observed: Tensor) -> Tensor:
        """Return (n, R, r): log emissions of x (R, n), 0 where not observed (R, n)."""
        values = p.emission[self.tokens[:, None], :, x.T]
        return values * observed.T[..., None]

    def up(self, p: Params, leaf: Tensor) -> Trace:
        """Evaluate the circuit on R rows at once; leaf (n, R, r)."""
        t = Trace(leaf)
        if self.kind == "ff":
            t.root = leaf.sum(0)[:, 0]
            return t
        if self.kind == "cp":
            t.inputs.append(leaf.sum(0, keepdim=True))
            t.root = _sum(t.inputs[0], p.sums[0])[0, :, 0]
            return t
        if self.kind == "hmm":
            value = leaf[-1:]
            for k, w in enumerate(p.sums):
                t.inputs.append(value)
                value = _sum(value, w)
                if k < self.n - 1:
                    t.below.append(value)
                    value = value + leaf[self.n - 2 - k]
            t.root = value[0, :, 0]
            return t
        value = leaf
        for w in p.sums:
            t.below.append(value)
            t.inputs.append(value[0::2] + value[1::2])
            value = _sum(t.inputs[-1], w)
        t.root = value[0, :, 0]
        return t

    def down(self, p: Params, leaf: Tensor, t: Trace, which: Tensor) -> Tensor:
        """Return log d root[j] / d leaf[which[j], j, :] for every row j, (R, r)."""
        rows = torch.arange(leaf.shape[1])
        if self.kind == "ff":
            return leaf.sum(0) - leaf[which, rows]
        top = torch.log(p.sums[-1])  # (1, 1, r)
        if self.kind == "cp":
            return top[0] + t.inputs[0][0] - leaf[which, rows]
        if self.kind == "hmm":
            above = [top.expand(1, leaf.shape[1], self.r)]
            for i in range(1, self.n):
                above.append(_sum(above[-1] + leaf[i - 1], p.sums[self.n - 1 - i].mT))
            message = [*reversed(t.below), torch.zeros_like(t.below[0])]
            return torch.cat(above)[which, rows] + torch.cat(message)[which, rows]
        slope = top.expand(1, leaf.shape[1], self.r)
        for k in reversed(range(len(p.sums))):
            if k < len(p.sums) - 1:
                slope = _sum(slope, p.sums[k].mT)
            left, right = t.below[k][0::2], t.below[k][1::2]
            slope = torch.stack((slope + right, slope + left), 1).flatten(0, 1)
        return slope[which, rows]

    def descend(self, p: Params, t: Trace, u: Tensor) -> Tensor:
        """Draw the latent that each token's emission takes, (n,), from a one-row trace."""
        n = self.n
        if self.kind == "ff":
            return torch.zeros(n, dtype=torch.int64)
        masses = [torch.exp(v[:, 0] - v[:, 0].amax(-1, keepdim=True)) for v in t.inputs]
        if self.kind == "cp":
            return _draw(p.sums[0][:, 0] * masses[0], u[:1]).expand(n)
        if self.kind == "hmm":
            states = [_draw(p.sums[-1][:, 0] * masses[-1], u[:1])]
            for i in range(1, n):
                row = p.sums[n - 1 - i][0].index_select(0, states[-1])
                states.append(_draw(row * masses[n - 1 - i], u[i : i + 1]))
            return torch.cat(states)
        state, used = torch.zeros(1, dtype=torch.int64), 0
        for w, mass in zip(reversed(p.sums), reversed(masses), strict=True):
            folds = w.shape[0]
            state = _draw(w[self.tokens[:folds], state] * mass, u[used : used + folds])
            state, used = state.repeat_interleave(2), used + folds
        return state

    def prefix(self, p: Params, x: Tensor) -> Tensor:
        """Return log q(x_1..x_i) for i = 1..n, (n,), from n masked rows."""
        rows = x.expand(self.n, self.n)
        return self.up(p, self.leaves(p, rows, self.until)).root

    def loglik(self, p: Params, x: Tensor) -> Tensor:
        """Return log q(x) of each row, (R,)."""
        return self.up(p, self.leaves(p, x, torch.ones_like(x, dtype=torch.bool))).root

    def open_rows(self, p: Params, x: Tensor) -> Tensor:
        """Return q(x_i = v | x_<i) for i = 2..n, (n-1, V), from n-1 rows with an open leaf."""
        leaf = self.leaves(p, x.expand(self.n - 1, self.n), self.until[:-1])
        trace = self.up(p, leaf)
        weight = torch.softmax(self.down(p, leaf, trace, self.tokens[1:]), -1)
        return torch.bmm(weight[:, None], torch.exp(p.emission[1:]))[:, 0]

    def expand_rows(self, p: Params, x: Tensor) -> Tensor:
        """Return the same rows from V full evaluations per position, (n-1) * V in all."""
        values = torch.arange(self.vocab)
        out = []
        for i in range(1, self.n):
            rows = x.repeat(self.vocab, 1)
            rows[:, i] = values
            root = self.up(p, self.leaves(p, rows, self.until[i].expand(self.vocab, self.n))).root
            out.append(torch.softmax(root, -1))
        return torch.stack(out)

    @torch.no_grad()
    def conditionals(
        self,
        x: Tensor,
        emission_logits: Tensor,
        sum_logits: Sequence[Tensor],
        rows: Rows = "open",
    ) -> Tensor:
        """Return the q of `draft` for given tokens x (n,), carry included: for parity checks."""
        return self._rows(self.normalise(emission_logits, sum_logits), x, rows)

    def _rows(self, p: Params, x: Tensor, rows: Rows) -> Tensor:
        if rows == "open":
            return self.open_rows(p, x)
        if rows == "expand":
            return self.expand_rows(p, x)
        log_prefix = self.prefix(p, x)
        return torch.exp(log_prefix[1:] - log_prefix[:-1])

    @torch.no_grad()
    def draft(
        self,
        carry: Tensor,
        u: Tensor,
        emission_logits: Tensor,
        sum_logits: Sequence[Tensor],
        rows: Rows = "open",
    ) -> tuple[Tensor, Tensor]:
        """Draw x_2..x_n given x_1 = carry and return them, (n-1,), with q.

        carry i64 (1,); u f32 (1, `uniforms`); q is (n-1, V), or (n-1,) with rows=False.
        """
        p = self.normalise(emission_logits, sum_logits)
        x = torch.cat((carry, self.nothing))
        trace = self.up(p, self.leaves(p, x[None], self.until[:1]))
        state = self.descend(p, trace, u[0])
        mass = torch.exp(p.emission[self.tokens[1:], state[1:]])
        x = torch.cat((carry, _draw(mass, u[0, self.latents :])))
        return x[1:], self._rows(p, x, rows)
