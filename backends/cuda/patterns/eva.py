"""EVA attention: rings of recent keys and values, summaries of older chunks, all written first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcc.backends.cuda.attention import fits
from pcc.backends.cuda.graph import Graph, half
from pcc.backends.cuda.library import eva_attend
from pcc.backends.cuda.patterns.heads import Attended, cache, heads, merged
from pcc.backends.cuda.patterns.terms import only_multiplied
from pcc.backends.cuda.piece import Output
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.models.base import constant
from pcc.models.evabyte import pooled
from pcc.tensor import eva as e
from pcc.tensor import nn
from pcc.tensor import ops as t

MOST_CHUNK = 32  # positions of one summary that the kernel takes


@dataclass(frozen=True)
class Eva(Attended):
    """root [N,H hd] = the heads beside one another, rounded; `mu`, `phi` make the summaries."""

    of: e.EvaAttention
    mu: Array
    phi: Array

    def emit(self, out: Output) -> None:
        """One launch."""
        y, dtype = self.of, half(self.of.k)
        number, count, width = tensor(y).shape
        ring, older = tensor(y.k).shape[1], tensor(y.sk).shape[1]
        names = ("key", "value", "summary_key", "summary_value")
        args = self.inputs.given(out) | {"start": out.value(y.start, "i64")}
        args |= {name: out.state(s) for name, s in zip(names, self.states, strict=True)}
        args |= {"mu": out.array(self.mu), "phi": out.array(self.phi)}
        args["y"] = out.make(self.root, dtype)
        kernel = eva_attend(
            out.name(), batch=out.graph.batch, count=count, heads=number, width=width, ring=ring,
            older=older, angles=self.inputs.angles, positions=self.inputs.positions,
            scale=y.scale, window=y.window, chunk=y.chunk, dtype=dtype,
            gpu=out.graph.gpu,
        )  # fmt: skip
        row = 2 * out.graph.batch * number * width * 2
        moved = {"kv_row": row, "kv_rows": min(ring, y.window), "kv_chunk": y.chunk}
        moved["weights"] = 2 * (count * self.inputs.angles + number * width) * 4
        out.launch(kernel, args, self.root, bytes=moved)


def eva(op: Op, graph: Graph) -> Eva | None:
    """Match merged heads of EVA attention whose rings and summaries this pass writes.

    Equal because the summaries are exactly those of `pcc.models.evabyte` (built again here and
    compared), and a query reads a summary only once all keys of its chunk are written.
    """
    y = merged(op, graph)
    if not isinstance(y, e.EvaAttention) or y.chunk > MOST_CHUNK:
        return None
    if not fits(graph.gpu, count=tensor(y).shape[1], width=tensor(y).shape[2], chunk=y.chunk):
        return None
    first = t.FloorDiv(y.start, y.chunk)
    key = cache(y.k, e.RingWrite, y.start, graph)
    value = cache(y.v, e.RingWrite, y.start, graph)
    older_key = cache(y.sk, nn.CacheWrite, first, graph)
    older_value = cache(y.sv, nn.CacheWrite, first, graph)
    if key is None or value is None or older_key is None or older_value is None:
        return None
    pools = _pools(y, key, value, older_key.update, older_value.update)
    inputs = heads(y.q, key.update, value.update, y.start)
    if pools is None or inputs is None or only_multiplied(op, graph) != half(key):
        return None
    return Eva(op, inputs, (key, value, older_key, older_value), y, *pools)


def _pools(
    y: e.EvaAttention, key: Op, value: Op, older_key: Op, older_value: Op
) -> tuple[Array, Array] | None:
    """Return `mu` and `phi` where the two updates are the summaries that they make."""
    mu, phi = _first(_score(older_key)), _first(_first(_score(older_value)))
    width, chunks = tensor(key).shape[2], e.chunk_count(tensor(y.q).shape[1], y.chunk)
    if not isinstance(mu, t.Const) or not isinstance(phi, t.Const):
        return None
    want = (tensor(key).shape[0], 1, 1, width)
    if {tensor(mu).shape, tensor(phi).shape} != {want} or {tensor(mu).dtype, tensor(phi).dtype} != {
        "f32"
    }:
        return None
    k = e.RingChunks(key, y.start, y.chunk, chunks)
    v = e.RingChunks(value, y.start, y.chunk, chunks)
    half_scale = constant(np.full((1, 1, 1, 1), 0.5 / np.sqrt(width), np.float32))
    near = t.Mul(t.Sub(phi, t.Mul(k, half_scale)), k)
    same = older_key is pooled(t.Mul(mu, k), k) and older_value is pooled(near, v)
    return (mu.value, phi.value) if same else None


def _score(update: Op) -> Op | None:
    """Return the score whose softmax weighs the rows of a summary."""
    x: Op | None = update
    for kind, field in (
        (t.ReduceSum, "x"), (t.Mul, "a"), (t.Reshape, "x"), (t.Softmax, "x"), (t.ReduceSum, "x"),
    ):  # fmt: skip
        x = getattr(x, field) if isinstance(x, kind) else None
    return x


def _first(x: Op | None) -> Op | None:
    """Return the left operand of a product or a difference."""
    return x.a if isinstance(x, t.Mul | t.Sub) else None
