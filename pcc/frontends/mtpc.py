"""MTPC checkpoints as circuits, with the wiring that the checkpoint holds.

q(x | e) for a hidden state e: tables softmax_V(W e), sum weights softmax_Ki(S e) (arXiv 2511.11346
§3.3), or with shared low-rank experts and a trunk (`pcc.frontends.mtpc_experts`); layers, folds and
scopes from `pcc.frontends.mtpc_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.frontends.mtpc_checkpoint import MtpcHead, load
from pcc.frontends.mtpc_wiring import LEAVES, SumFold
from pcc.frontends.unread import trained
from pcc.ir.array import Array
from pcc.ir.core import Op, Values, units
from pcc.tensor import ops as t
from pcc.tensor.nn import Silu


def load_mtpc(folder: str | Path, *, step: int | None = None, hmm_bias: Any = None) -> Circuit:
    """Read a checkpoint folder (`config.yaml`, `model@STEP.pt` or `.safetensors`)."""
    return from_head(load(Path(folder), step=step, hmm_bias=hmm_bias))


def from_head(head: MtpcHead) -> Circuit:
    """Return the circuit of a head, parameterised by the input `context [Bc, D]`."""
    return _Import(head).circuit()


class _Import:
    def __init__(self, head: MtpcHead) -> None:
        self.head = head
        context: Op = t.Input("context", "f32", "c", (head.width,))
        if head.trunk is not None:
            up = t.Contract(context, t.Const(Array.of(head.trunk.up)), "d,hd->h")
            down = t.Const(Array.of(head.trunk.down))
            context = t.Add(context, t.Contract(Silu(up), down, "h,dh->d"))
        self.context = context
        self.logits: list[tuple[str, Op, Op]] = []
        self.layers: list[Op] = []

    def circuit(self) -> Circuit:
        """Build leaves, sum layers in topological order, and the root."""
        h = self.head
        leaf = c.Categorical(h.scope, t.Softmax(self._emissions()))
        self.leaf = leaf
        for k in range(len(h.sums)):
            self.layers.append(self._layer(k))
        root = self._product(h.wiring.root)
        name = f"{h.kind}-n{h.n}-r{h.r}"
        cards = (h.vocab,) * h.n
        return Circuit(root, cards, name, h.kind, h.r, tuple(self.logits))

    def _emissions(self) -> Op:
        h = self.head
        logits: Op = t.Contract(self.context, t.Const(trained(h.emissions)), "d,abcd->abc")
        if (x := h.experts) is not None:
            # Small products, kept apart: U e + G (C e) + c costs V (D + r k) a position, not r V D.
            code = t.Contract(self.context, t.Const(Array.of(x.code)), "d,kd->k")
            spread = t.Contract(code, t.Const(Array.of(x.factor)), "k,abck->abc")
            logits = t.Add(t.Add(spread, t.Const(Array.of(x.bias))), logits)
        token = t.Input("emission_logits", "f32", "b", (len(h.scope), h.r, h.vocab))
        shuffled = h.repetitions == 1 and h.scope != tuple(range(h.n))
        swap: Op = t.Take(token, 0, h.scope) if shuffled else token
        self.logits.append(("emission_logits", logits, swap))
        return logits

    def _weight(self, k: int) -> Op:
        w: Values = self.head.sums[k]
        name = f"sum_logits.{k}"
        if w.ndim == 3:  # trained, the same for every context
            bias = self.head.biases.get(k)
            w = np.asarray(w)
            return t.Softmax(t.Const(Array.of(w if bias is None else w + bias)))
        logits: Op = t.Contract(self.context, t.Const(trained(w)), "d,abcd->abc")
        if (bias := self.head.biases.get(k)) is not None:
            full = np.broadcast_to(bias, w.shape[:3])
            logits = t.Add(logits, t.Const(Array.of(full)))
        self.logits.append((name, logits, t.Input(name, "f32", "b", w.shape[:3])))
        return t.Softmax(logits)

    def _layer(self, k: int) -> Op:
        folds, w = self.head.wiring.sums[k], self._weight(k)
        if any(f.mix for f in folds):
            return self._mixture(folds, w)
        arity = {len(f.inputs) for f in folds}
        if len(arity) == 1:
            columns = zip(*(f.inputs for f in folds), strict=True)
            return c.Sum(self._times(tuple(self._gather(col) for col in columns)), w)
        parts = [self._product(f.inputs) for f in folds]
        return c.Sum(c.Concat(tuple(parts)), w)

    def _mixture(self, folds: tuple[SumFold, ...], w: Op) -> Op:
        parts: list[Op] = []
        for i, f in enumerate(folds):
            xs = tuple(self._gather((p,)) for p in f.inputs)
            row = t.Take(w, 0, (i,)) if len(folds) > 1 else w
            parts.append(c.Mix(xs, row))
        return parts[0] if len(parts) == 1 else c.Concat(tuple(parts))

    def _product(self, inputs: tuple[tuple[int, int], ...]) -> Op:
        return self._times(tuple(self._gather((p,)) for p in inputs))

    def _times(self, xs: tuple[Op, ...]) -> Op:
        return xs[0] if len(xs) == 1 else c.Hadamard(xs)

    def _gather(self, pairs: tuple[tuple[int, int], ...]) -> Op:
        """Return the listed folds as one layer."""
        sources = list(dict.fromkeys(layer for layer, _ in pairs))
        layers = [self.leaf if s == LEAVES else self.layers[s] for s in sources]
        start = dict(zip(sources, np.cumsum([0, *(units(x).folds for x in layers)]), strict=False))
        index = tuple(int(start[s]) + f for s, f in pairs)
        whole = layers[0] if len(layers) == 1 else c.Concat(tuple(layers))
        if index == tuple(range(units(whole).folds)):
            return whole
        return c.Gather(whole, index)
