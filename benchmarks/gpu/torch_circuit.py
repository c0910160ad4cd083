"""Drafts in plain torch: head projection, sampling given the carry, conditionals of each prefix.

Written as one would without a compiler, for CUDA graphs: no synchronisation, static shapes, one
batch of B rows. Circuits are those of `pcc.frontends.templates`: `ff`, `cp`, `hmm`, `btree`.
Numbers of the circuit are float32; the projection runs in the dtype of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_shapes(kind: str, n: int, r: int) -> list[tuple[int, int, int]]:
    """Return the shapes (folds, outputs, inputs) of a template's sum layers, in its order."""
    if kind == "ff":
        return []
    if kind == "cp":
        return [(1, 1, r)]
    if kind == "hmm":  # the last transition first, the initial law last
        return [(1, r, r)] * (n - 1) + [(1, 1, r)]
    if kind != "btree" or n & (n - 1) or n < 2:
        raise ValueError(f"no head {kind!r} of {n} tokens here")
    out, folds = [], n // 2
    while folds > 1:
        out.append((folds, r, r))
        folds //= 2
    return [*out, (1, 1, r)]


def pick(mass: Tensor, u: Tensor) -> Tensor:
    """Return the first index whose running mass exceeds u times the total: u in [0, 1)."""
    total = mass.cumsum(-1)
    level = u[..., None] * total[..., -1:]
    return (total <= level).sum(-1).clamp_max(mass.shape[-1] - 1)


class Head:
    """A contextual circuit: projections of the features, and what a round asks of them."""

    def __init__(
        self, kind: str, n: int, r: int, vocab: int, width: int, *, device: str, dtype: torch.dtype
    ) -> None:
        self.kind, self.n, self.vocab = kind, n, vocab
        self.r = 1 if kind == "ff" else r
        self.sums = sum_shapes(kind, n, self.r)
        shapes = [(n, self.r, vocab), *self.sums]
        sizes = [a * b * c for a, b, c in shapes]
        self.shapes, self.sizes = shapes, sizes
        # One matrix: one product reads all weights.
        self.w = torch.randn(sum(sizes), width, device=device, dtype=dtype) * (0.3 / width**0.5)

    @property
    def bytes(self) -> int:
        """Bytes of the projection's weights."""
        return self.w.numel() * self.w.element_size()

    def parameters(self, e: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return log tables (B, n, r, V) and sum weights (B, F, Ko, Ki) for features (B, D)."""
        logits = (e.to(self.w.dtype) @ self.w.t()).float().split(self.sizes, -1)
        made = [x.view(-1, *s) for x, s in zip(logits, self.shapes, strict=True)]
        return made[0].log_softmax(-1), [x.softmax(-1) for x in made[1:]]

    def draft(self, e: Tensor, carry: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, n-1) and their laws (B, n-1, V) given the carry (B,).

        `u` (B, K): a uniform for each latent, then one for each token.
        """
        logs, sums = self.parameters(e)
        seen = logs[:, 0].gather(-1, carry[:, None, None].expand(-1, self.r, 1))[..., 0]
        rest, u_latent, u_token = logs[:, 1:], u[:, : 2 * self.n], u[:, 2 * self.n :]
        if self.kind == "ff":
            q = rest[:, :, 0].exp()
            return pick(q, u_token[:, : self.n - 1]), q
        make = {"cp": self._cp, "hmm": self._hmm, "btree": self._btree}[self.kind]
        return make(logs, seen, sums, u_latent, u_token[:, : self.n - 1])

    def _rows(self, logs: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """Draw tokens 2..n from the tables that the latents (B, n-1) chose."""
        at = z[..., None, None].expand(-1, -1, 1, self.vocab)
        return pick(logs[:, 1:].gather(2, at)[:, :, 0].exp(), u)

    def _of(self, logs: Tensor, x: Tensor) -> Tensor:
        """Return the log tables at tokens 2..n: (B, n-1, r)."""
        at = x[..., None, None].expand(-1, -1, self.r, 1)
        return logs[:, 1:].gather(3, at)[..., 0]

    def _cp(self, logs: Tensor, seen: Tensor, sums: list[Tensor], ul: Tensor, ut: Tensor):  # type: ignore[no-untyped-def]
        prior = sums[0][:, 0, 0].log() + seen
        z = pick(prior.softmax(-1), ul[:, 0])
        x = self._rows(logs, z[:, None].expand(-1, self.n - 1), ut)
        known = self._of(logs, x)
        before = known.cumsum(1) - known
        belief = (prior[:, None] + before).softmax(-1)
        return x, (belief[:, :, None] @ logs[:, 1:].exp())[:, :, 0]

    def _hmm(self, logs: Tensor, seen: Tensor, sums: list[Tensor], ul: Tensor, ut: Tensor):  # type: ignore[no-untyped-def]
        moves = [w[:, 0] for w in reversed(sums[:-1])]  # of states 1 -> 2, 2 -> 3, ..
        first = (sums[-1][:, 0, 0].log() + seen).softmax(-1)
        z = [pick(first, ul[:, 0])]
        for i, w in enumerate(moves):
            row = w.gather(1, z[-1][:, None, None].expand(-1, 1, self.r))[:, 0]
            z.append(pick(row, ul[:, i + 1]))
        x = self._rows(logs, torch.stack(z[1:], 1), ut)
        known, tables = self._of(logs, x), logs[:, 1:].exp()
        belief, q = first, []
        for i, w in enumerate(moves):
            ahead = (belief[:, None] @ w)[:, 0]
            q.append((ahead[:, None] @ tables[:, i])[:, 0])
            belief = (ahead.log() + known[:, i]).softmax(-1)
        return x, torch.stack(q, 1)

    def _btree(self, logs: Tensor, seen: Tensor, sums: list[Tensor], ul: Tensor, ut: Tensor):  # type: ignore[no-untyped-def]
        batch, n, r = len(logs), self.n, self.r
        leaf = torch.zeros(batch, n, r, device=logs.device)
        leaf[:, 0] = seen - seen.amax(-1, keepdim=True)
        up = self._up(leaf.exp(), sums)
        unit = torch.zeros(batch, 1, dtype=torch.int64, device=logs.device)
        used = 0
        for level in range(len(sums) - 1, -1, -1):  # from the root to the leaves
            w, m = sums[level], up[level]
            row = w.gather(2, unit[..., None, None].expand(-1, -1, 1, r))[:, :, 0]
            folds = row.shape[1]
            z = pick(row * m[:, 0::2] * m[:, 1::2], ul[:, used : used + folds])
            unit, used = z.repeat_interleave(2, 1), used + folds
        x = self._rows(logs, unit[:, 1:], ut)
        return x, self._conditionals(logs, seen, sums, self._of(logs, x))

    def _up(self, leaf: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """Return the inputs of each level, leaves (.., n, r) first."""
        out = [leaf]
        for w in sums[:-1]:
            both = out[-1][..., 0::2, :] * out[-1][..., 1::2, :]
            w = w if leaf.ndim == 3 else w[:, None]
            made = (w @ both[..., None])[..., 0]
            out.append(made / made.amax(-1, keepdim=True))
        return out

    def _conditionals(
        self, logs: Tensor, seen: Tensor, sums: list[Tensor], known: Tensor
    ) -> Tensor:
        """Return q (B, n-1, V): one upward and one downward sweep for each of n-1 prefixes."""
        n, device = self.n, logs.device
        values = torch.cat((seen[:, None], known), 1)
        values = (values - values.amax(-1, keepdim=True)).exp()
        observed = torch.ones(n - 1, n, device=device).tril().bool()  # row i: tokens 1..i
        leaf = torch.where(observed[..., None], values[:, None], torch.ones((), device=device))
        up = self._up(leaf, sums)
        down = torch.ones(*leaf.shape[:2], 1, 1, device=device)
        for level in range(len(sums) - 1, -1, -1):
            z = (sums[level][:, None].transpose(-1, -2) @ down[..., None])[..., 0]
            left, right = up[level][..., 0::2, :], up[level][..., 1::2, :]
            down = torch.stack((z * right, z * left), -2).flatten(-3, -2)
            down = down / down.amax((-1, -2), keepdim=True)
        i = torch.arange(n - 1, device=device)
        belief = down[:, i, i + 1]
        q = (belief[:, :, None] @ logs[:, 1:].exp())[:, :, 0]
        return q / q.sum(-1, keepdim=True)
