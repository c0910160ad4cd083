"""The head: hidden state e [N,D] to the logits of a circuit's tables and sum weights.

    trunk       e' = e + B silu(A e)                                  A (H,D), B (D,H); optional
    linear      logits[f,z] = W[f,z] e'                               W (F,r,V,D), as published
    low-rank    logits[f,z] = U[f] e' + G[f,z] (C e') + c[f,z]   U (F,V,D), G (F,r,V,k), C (k,D)
    sums        logits[k] = P_k e' + b_k                              P_k (F,Ko,Ki,D), b_k (F,Ko,Ki)

Softmax over V and over Ki, in float32 whatever the precision of the products.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pcc.errors import PccError
from pcc.frontends.mtpc_checkpoint import EMISSIONS
from pcc.frontends.mtpc_wiring import Wiring, rebuild
from pcc.frontends.region_wiring import parse_regions, region_shapes, region_wiring
from pcc.train import config as cfg
from pcc.train.circuits import TorchCircuit

KEYS = {
    "proj": EMISSIONS,
    "base": EMISSIONS.replace("proj", "base"),
    "factor": EMISSIONS.replace("proj", "factor"),
    "code": EMISSIONS.replace("proj", "code"),
    "bias": EMISSIONS.replace("proj", "bias"),
    "up": "mt_head.trunk.up",
    "down": "mt_head.trunk.down",
}
KINDS = ("ff", "cp", "hmm", "btree", *cfg.REGIONAL)
SUM_KEY = "mt_head._sum_weights_heads.{}.head.{}"


def sum_shapes(kind: str, n: int, r: int, s: int) -> list[tuple[int, int, int]]:
    """Return (F, Ko, Ki) of each sum layer in the published order. Errors: N111."""
    if kind == "ff":
        return []
    if kind == "cp":
        return [(1, 1, r)]
    if kind == "hmm":
        return [(1, r, r)] * (n - 1) + [(1, 1, r)]
    if n & (n - 1) or n < 2:
        what = f"a tree head needs a window that is a power of two, not {n}"
        hint = "choose n = 8 or 16, or kind: tree with regions: balanced"
        raise PccError("N111", what, hint=hint)
    folds = [n >> level for level in range(1, n.bit_length())]
    shapes = [(f * s, 1 if f == 1 else r, r) for f in folds]
    return shapes + ([(1, 1, s)] if s > 1 else [])


def scope_of(kind: str, n: int, s: int, shuffle: bool) -> list[int]:
    """Return the token of each leaf fold: HMM folds are reversed, as published."""
    if kind == "hmm":
        return list(reversed(range(n)))
    if shuffle:
        orders = (np.random.default_rng(42 + i).permutation(n) for i in range(s))
        return [int(v) for order in orders for v in order]
    return list(range(n)) * s


def _check(sizes: cfg.Head) -> None:
    """Refuse kinds and options that do not belong together. Errors: N111."""
    kind = sizes.kind
    if kind not in KINDS:
        raise PccError("N111", f"unknown circuit kind '{kind}'", hint=", ".join(KINDS))
    if kind != "btree" and (sizes.repetitions > 1 or sizes.shuffle):
        raise PccError("N111", "repetitions and shuffling are for btree heads")
    if (kind in cfg.REGIONAL) != bool(sizes.regions):
        what = f"head.regions is {sizes.regions[:40]!r} and head.kind {kind}"
        raise PccError("N111", what, hint=f"regions are for {' and '.join(cfg.REGIONAL)} heads")


def memory_bytes() -> int:
    """Return the memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


class CircuitHead(nn.Module):
    """Parameters of one head, and the likelihoods of its circuit."""

    def __init__(self, sizes: cfg.Head, vocab: int, width: int, seed: int = 0) -> None:
        super().__init__()
        kind = sizes.kind
        _check(sizes)
        self.sizes, self.vocab, self.width = sizes, vocab, width
        self.kind, self.n, self.r = kind, sizes.n, 1 if kind == "ff" else sizes.r
        self.scope = scope_of(kind, sizes.n, sizes.repetitions, sizes.shuffle)
        self.shapes, self.wiring = self._structure()
        self.circuit = TorchCircuit(self.wiring, self.scope, sizes.n)
        self._scopes: dict[torch.device, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._fits(len(self.scope))
        self._allocate(len(self.scope))

    def _structure(self) -> tuple[list[tuple[int, int, int]], Wiring]:
        """Return the shapes of the sum layers and what they read."""
        c, n, s = self.sizes, self.n, self.sizes.repetitions
        if self.kind in cfg.REGIONAL:
            graph = parse_regions(c.regions, n, "head.regions")
            if self.kind == "tree" and not graph.is_tree:
                what = "head.regions is not a tree of single variables"
                raise PccError("N111", what, hint="use kind: region-graph")
            return region_shapes(graph, self.r), region_wiring(graph)
        shapes = sum_shapes(self.kind, n, self.r, s)
        return shapes, rebuild(self.kind, n, s, self.scope, shapes, "head")

    def _fits(self, folds: int) -> None:
        """Refuse before allocating what this machine could not hold. Errors: N111."""
        c, r, v, d = self.sizes, self.r, self.vocab, self.width
        each = r * v * d if c.emissions == "linear" else v * d + r * v * (c.rank + 1) * (r > 1)
        sums = sum(math.prod(s) for s in self.shapes) * (d + c.sum_bias)
        need = 4 * (folds * each + c.rank * d + 2 * c.trunk * d + sums)
        have = memory_bytes()
        if have and need > have:
            what = f"the head's parameters take {need / 1e9:.1f} GB of {have / 1e9:.1f} GB memory"
            hint = "lower head.n, head.r, head.rank or head.trunk"
            raise PccError("N111", what, hint=hint)

    def _allocate(self, folds: int) -> None:
        c, r, v, d = self.sizes, self.r, self.vocab, self.width
        if c.emissions == "linear":
            self.proj = self._drawn((folds, r, v, d), 0.02)
        else:
            self.base = self._drawn((folds, v, d), 0.02)
            if r > 1:
                self.factor = self._drawn((folds, r, v, c.rank), c.noise / c.rank**0.5)
                self.code = self._drawn((c.rank, d), d**-0.5)
                self.bias = self._drawn((folds, r, v), c.noise)
        if c.trunk:
            self.up = self._drawn((c.trunk, d), d**-0.5)
            self.down = nn.Parameter(torch.zeros(d, c.trunk))
        self.sums = nn.ParameterList(self._drawn((*x, d), 0.02) for x in self.shapes)
        self.sum_biases = nn.ParameterList(
            nn.Parameter(self._start(x)) for x in (self.shapes if c.sum_bias else [])
        )

    def _drawn(self, shape: Sequence[int], spread: float) -> nn.Parameter:
        return nn.Parameter(spread * torch.randn(*shape, generator=self.generator))

    def _start(self, shape: tuple[int, int, int]) -> Tensor:
        """HMM transitions start at the identity, where the chain is a mixture; others uniform."""
        start = torch.zeros(shape)
        if self.kind == "hmm" and shape[1] > 1:
            start += self.sizes.identity * torch.eye(shape[1])
        return start

    @torch.no_grad()
    def initialise(self, unembedding: Tensor) -> None:
        """Copy unembeddings (m,V,D) of tokens 1..m into their positions; the last one goes on."""
        source = unembedding.detach().float().cpu()
        for fold, token in enumerate(self.scope):
            w = source[min(token, len(source) - 1)]
            if self.sizes.emissions == "low-rank":
                self.base[fold] = w.to(self.base)
            else:
                noise = torch.randn(self.r, *w.shape, generator=self.generator)
                spread = self.sizes.noise * float(w.std()) if self.r > 1 else 0.0
                self.proj[fold] = (w + spread * noise).to(self.proj)

    def index(self, device: torch.device) -> Tensor:
        """Return the scope as a tensor on a device."""
        if device not in self._scopes:
            self._scopes[device] = torch.tensor(self.scope, device=device)
        return self._scopes[device]

    # ------------------------------------------------------------ parameters from a hidden state

    def trunk(self, e: Tensor) -> Tensor:
        """E' = e + B silu(A e)."""
        if not self.sizes.trunk:
            return e
        return e + functional.silu(e @ self.up.T) @ self.down.T

    def emission_logits(self, e: Tensor) -> Tensor:
        """Return logits [N,F,r,V] of the trunk's output, float32 or wider."""
        folds, r, v = len(self.scope), self.r, self.vocab
        if self.sizes.emissions == "linear":
            return _wide((e @ self.proj.flatten(0, 2).T).view(-1, folds, r, v))
        base = (e @ self.base.flatten(0, 1).T).view(-1, folds, 1, v)
        if r == 1:
            return _wide(base)
        code = e @ self.code.T
        spread = (code @ self.factor.flatten(0, 2).T).view(-1, folds, r, v)
        return _wide(base + spread) + self.bias

    def sum_log_weights(self, e: Tensor) -> list[Tensor]:
        """Return log W_k [N,F,Ko,Ki], normalised over Ki."""
        out = []
        for k, (p, shape) in enumerate(zip(self.sums, self.shapes, strict=True)):
            logits = _wide((e @ p.flatten(0, 2).T).view(-1, *shape))
            if self.sizes.sum_bias:
                logits = logits + self.sum_biases[k]
            out.append(torch.log_softmax(logits, -1))
        return out

    # ------------------------------------------------------------ likelihoods

    def leaf(self, logits: Tensor, x: Tensor) -> Tensor:
        """Return log phi_{f,z}(x_scope(f)) [N,F,r] of emission logits and tokens x i64[N,n]."""
        rows, folds, r, v = logits.shape
        want = x[:, self.index(x.device)][..., None].expand(rows, folds, r)
        flat = functional.cross_entropy(logits.reshape(-1, v), want.reshape(-1), reduction="none")
        return -flat.view(rows, folds, r)

    def forward(self, e: Tensor, x: Tensor) -> Tensor:
        """Return log q(x_i | x_<i, e), [N,n]."""
        h = self.trunk(e)
        logits, sums = self.emission_logits(h), self.sum_log_weights(h)
        with torch.autocast(e.device.type, enabled=False):
            return self.circuit.log_conditionals(self.leaf(logits, x), sums)

    def log_rows(self, e: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q(x_i | x_<i) [N,n] and log q(v | x_<i) [N,n,V]."""
        h = self.trunk(e)
        logits, sums = self.emission_logits(h), self.sum_log_weights(h)
        with torch.autocast(e.device.type, enabled=False):
            table = torch.log_softmax(logits, -1)
            index = x[:, self.index(x.device)][:, :, None, None].expand(*table.shape[:3], 1)
            leaf = table.gather(-1, index)[..., 0]
            rows = self.circuit.log_rows(self.circuit.beliefs(leaf, sums), table)
            return rows.gather(-1, x[..., None])[..., 0], rows

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters under their checkpoint names."""
        out = {key: getattr(self, name) for name, key in KEYS.items() if hasattr(self, name)}
        out |= {SUM_KEY.format(k, "proj"): p for k, p in enumerate(self.sums)}
        return out | {SUM_KEY.format(k, "bias"): p for k, p in enumerate(self.sum_biases)}

    @torch.no_grad()
    def assign(self, values: dict[str, Any]) -> None:
        """Set the parameters from a mapping of checkpoint names. Errors: N112."""
        mine = self.tensors()
        if missing := sorted(set(mine) - set(values)):
            raise PccError("N112", f"the checkpoint lacks {missing[0]}")
        for key, p in mine.items():
            value = torch.as_tensor(values[key])
            if value.shape != p.shape:
                what = f"{key} has shape {tuple(value.shape)}, expected {tuple(p.shape)}"
                raise PccError("N112", what)
            p.copy_(value.to(p))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
