"""Decoders of true shape in plain torch with random weights: EvaByte and byte-Llama, B rows.

What one would write for CUDA graphs: static buffers, masks over all their rows, library products
and `scaled_dot_product_attention`. Weights lie once, `[out, in]`, as in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """A decoder; `window` and `chunk` are those of EvaByte's attention, 0: all keys are kept."""

    name: str
    width: int
    layers: int
    heads: int
    shared: int
    head: int
    inner: int
    vocab: int
    n: int
    window: int = 0
    chunk: int = 0


SHAPES = {
    "evabyte-6.5b": Shape("evabyte-6.5b", 4096, 32, 32, 32, 128, 11008, 320, 16, 2048, 16),
    "byte-llama-3.2-3b": Shape("byte-llama-3.2-3b", 3072, 28, 24, 8, 128, 8192, 268, 8),
    "tiny-eva": Shape("tiny-eva", 64, 2, 2, 2, 32, 96, 320, 8, 64, 16),
    "tiny-llama": Shape("tiny-llama", 64, 2, 4, 2, 16, 96, 268, 8),
}


class Decoder:
    """One pass over n tokens of B rows at positions `length ..`, with caches written in place."""

    def __init__(
        self, shape: Shape, batch: int, rows: int, *, device: str, dtype: torch.dtype
    ) -> None:
        self.shape, self.batch, self.device, self.dtype = shape, batch, device, dtype
        s = shape
        self.keys = rows if not s.window else min(rows, s.window + 16 * s.chunk)
        self.chunks = rows // s.chunk if s.window else 0

        def matrix(out: int, into: int) -> Tensor:
            return torch.randn(out, into, device=device, dtype=dtype) * into**-0.5

        qkv = (s.heads + 2 * s.shared) * s.head
        self.layers = [
            (matrix(qkv, s.width), matrix(s.width, s.heads * s.head),
             matrix(2 * s.inner, s.width), matrix(s.width, s.inner))
            for _ in range(s.layers)
        ]  # fmt: skip
        ones = torch.ones(s.width, device=device)
        self.norms = [(ones, ones) for _ in range(s.layers)]
        self.pool = torch.randn(2, s.layers, s.heads, s.head, device=device)
        self.embed, self.out = matrix(s.vocab, s.width), matrix(s.vocab, s.width)
        cache = (s.layers, batch, s.shared, self.keys + self.chunks, s.head)
        self.k = torch.randn(cache, device=device, dtype=dtype)
        self.v = torch.randn(cache, device=device, dtype=dtype)
        angle = torch.arange(rows + 64, device=device)[:, None] * 1e4 ** (
            -torch.arange(s.head // 2, device=device) / (s.head // 2)
        )
        self.cos, self.sin = angle.cos(), angle.sin()

    @property
    def bytes(self) -> int:
        """Bytes of the weights that a pass reads: the rows of the embedding aside."""
        item = self.out.element_size()
        return (sum(w.numel() for ws in self.layers for w in ws) + self.out.numel()) * item

    def bytes_kv(self, context: int) -> int:
        """Bytes of keys and values that a pass at a context must read."""
        s = self.shape
        rows = context
        if s.window:
            rows = context % s.window + context // s.window * s.window // s.chunk
        return 2 * s.layers * self.batch * s.shared * rows * s.head * self.k.element_size()

    def __call__(self, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, n, D) and logits (B, n, V) in float32."""
        s, n = self.shape, ids.shape[1]
        x = functional.embedding(ids, self.embed).float()
        at = length[:, None] + torch.arange(n, device=self.device)
        turn = self.cos[at][:, None], self.sin[at][:, None]
        slot, mask = self._places(at)
        for i, (qkv, o, up, down) in enumerate(self.layers):
            h = functional.rms_norm(x, (s.width,), self.norms[i][0], 1e-5).to(self.dtype)
            parts = (h @ qkv.t()).split([s.heads * s.head] + [s.shared * s.head] * 2, -1)
            q, k, v = (p.view(self.batch, n, -1, s.head).transpose(1, 2) for p in parts)
            q, k = self._rotate(q, turn), self._rotate(k, turn)
            index = slot[:, None, :, None].expand(-1, s.shared, -1, s.head)
            self.k[i].scatter_(2, index, k)
            self.v[i].scatter_(2, index, v)
            if s.window:
                self._summarise(i, length, n)
            y = functional.scaled_dot_product_attention(
                q, self.k[i], self.v[i], attn_mask=mask, enable_gqa=s.heads != s.shared
            )
            x = x + (y.transpose(1, 2).reshape(self.batch, n, -1) @ o.t())
            h = functional.rms_norm(x, (s.width,), self.norms[i][1], 1e-5).to(self.dtype)
            gate, inner = (h @ up.t()).chunk(2, -1)
            x = x + (functional.silu(gate) * inner) @ down.t()
        h = functional.rms_norm(x, (s.width,), None, 1e-5)
        return h, (h.to(self.dtype) @ self.out.t()).float()

    def _rotate(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]), -1).to(self.dtype)

    def _places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that positions are written to, and which rows each query may read."""
        row = torch.arange(self.keys, device=self.device)
        if not self.shape.window:
            return at, (row <= at[..., None])[:, None]
        s = self.shape
        begin = at // s.window * s.window
        # The position that a row of the ring holds, seen from the query's: the last one not later.
        held = at[..., None] - (at[..., None] - row) % self.keys
        near = held >= begin[..., None]
        chunk = torch.arange(self.chunks, device=self.device)
        far = chunk < (begin // s.chunk)[..., None]
        return at % self.keys, torch.cat((near, far), -1)[:, None]

    def _summarise(self, i: int, length: Tensor, n: int) -> None:
        """Compute the summaries of the chunks that this pass has written to."""
        s = self.shape
        count = (n + s.chunk - 2) // s.chunk + 1
        first = length // s.chunk
        chunk = first[:, None] + torch.arange(count, device=self.device)
        at = (chunk[..., None] * s.chunk + torch.arange(s.chunk, device=self.device)) % self.keys
        index = at.flatten(1)[:, None, :, None].expand(-1, s.shared, -1, s.head)
        k, v = (
            c[i].gather(2, index).view(self.batch, s.shared, count, s.chunk, s.head)
            for c in (self.k, self.v)
        )
        mu, phi = (p[i][:, None, None].to(self.dtype) for p in self.pool)
        near = (k * phi).sum(-1).float() - 0.5 * k.float().square().sum(-1)
        key = ((k * mu).sum(-1).float().softmax(-1)[..., None].to(self.dtype) * k).sum(-2)
        value = ((near * s.head**-0.5).softmax(-1)[..., None].to(self.dtype) * v).sum(-2)
        place = self.keys + chunk % self.chunks
        index = place[:, None, :, None].expand(-1, s.shared, -1, s.head)
        self.k[i].scatter_(2, index, key)
        self.v[i].scatter_(2, index, value)
