"""Lowering of `pcc.tensor.nn`: the operators of opset 24, or what they are made of.

The batch axis lies first. No rule holds the number of rows of a cache, so that one graph serves
every length of buffer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.order import ranked
from pcc.backends.onnx.rules import lowers
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor.ops import LOWEST, Input

LOW = {"f32": LOWEST, "f16": -65504.0, "bf16": -3.38e38}  # finite in each dtype
FUSED = 24  # from this opset on there are operators for norms, rotations and cache writes


def with_rows(g: Graph, x: Op, result: Op) -> ir.Value:
    """Return `x` with a leading batch axis: that of `result`, or one of size 1."""
    batch = tensor(result).batch
    if not batch:
        return g("Unsqueeze", g.values[x], g.ints(0))  # type: ignore[no-any-return]
    return g.expanded(x, batch, tensor(x).shape)


def settled(g: Graph, y: ir.Value, result: Op) -> ir.Value:
    """Drop the axis that `with_rows` gave to a result without batch axis."""
    return y if tensor(result).batch else g("Squeeze", y, g.ints(0))


def _scalar(g: Graph, value: float) -> ir.Value:
    return g.const(np.float32(value))


# ---------------------------------------------------------------- norms and activations


@lowers(nn.RmsNorm)
def _(g: Graph, n: nn.RmsNorm) -> ir.Value:
    x, w = g.values[n.x], g.values[n.w]
    if g.opset >= FUSED:
        return g("RMSNormalization", x, w, axis=-1, epsilon=n.eps)  # type: ignore[no-any-return]
    mean = g.reduce("ReduceMean", g("Mul", x, x), [-1], keepdims=1)
    spread = g("Sqrt", g("Add", mean, _scalar(g, n.eps)))
    return g("Mul", g("Div", x, spread), w)  # type: ignore[no-any-return]


@lowers(nn.LayerNorm)
def _(g: Graph, n: nn.LayerNorm) -> ir.Value:
    x, w, b = (g.values[a] for a in n.args)
    return g("LayerNormalization", x, w, b, axis=-1, epsilon=n.eps)  # type: ignore[no-any-return]


@lowers(nn.Silu)
def _(g: Graph, n: nn.Silu) -> ir.Value:
    # Two nodes: ONNX Runtime fuses them, and runs them faster than its Swish.
    return g("Mul", g.values[n.x], g("Sigmoid", g.values[n.x]))  # type: ignore[no-any-return]


@lowers(nn.Gelu)
def _(g: Graph, n: nn.Gelu) -> ir.Value:
    x = g.values[n.x]
    if g.opset >= 20:
        return g("Gelu", x)  # type: ignore[no-any-return]
    share = g("Add", g("Erf", g("Mul", x, _scalar(g, 0.5**0.5))), _scalar(g, 1.0))
    return g("Mul", g("Mul", x, share), _scalar(g, 0.5))  # type: ignore[no-any-return]


@lowers(nn.Relu)
def _(g: Graph, n: nn.Relu) -> ir.Value:
    return g("Relu", g.values[n.x])  # type: ignore[no-any-return]


# ---------------------------------------------------------------- tables


@lowers(nn.Embedding)
def _(g: Graph, n: nn.Embedding) -> ir.Value:
    return g.wide(g("Gather", g.values[n.table], g.values[n.ids], axis=0), n.table)


@lowers(nn.Rotary)
def _(g: Graph, n: nn.Rotary) -> ir.Value:
    x, width, turned = with_rows(g, n.x, n), tensor(n.x).shape[2], 2 * tensor(n.cos).shape[1]
    if g.opset >= FUSED:
        at, part = with_rows(g, n.positions, n), turned if turned < width else 0
        tables = g.values[n.cos], g.values[n.sin]
        y = g("RotaryEmbedding", x, *tables, at, rotary_embedding_dim=part)
        return settled(g, y, n)
    c, s = _angles(g, n, n.cos), _angles(g, n, n.sin)
    sizes = [turned // 2, turned // 2, *([width - turned] if turned < width else [])]
    a, b, *rest = g("Split", x, g.ints(*sizes), outputs=len(sizes), axis=-1)
    left = g("Sub", g("Mul", a, c), g("Mul", b, s))
    right = g("Add", g("Mul", b, c), g("Mul", a, s))
    return settled(g, g("Concat", left, right, *rest, axis=-1), n)


def _angles(g: Graph, n: nn.Rotary, table: Op) -> ir.Value:
    """Return the table's rows at the positions, for all heads: [B,1,N,r]."""
    key: object = ("angles", n.positions, table, tensor(n).batch)
    if key not in g.memo:
        rows = g("Gather", g.values[table], with_rows(g, n.positions, n), axis=0)
        g.memo[key] = g("Unsqueeze", rows, g.ints(1))
    return g.memo[key]


# ---------------------------------------------------------------- caches and attention


@lowers(nn.CacheWrite)
def _(g: Graph, n: nn.CacheWrite) -> ir.Value:
    cache, update, start = (with_rows(g, a, n) for a in n.args)
    update = g.as_stored(update, n.cache)
    if g.target.kv == "scatter" or (g.target.kv == "scatter_io" and _in_place(g, n)):
        y = g("TensorScatter", cache, update, start, axis=-2, mode="linear")
    else:
        y = g("ScatterND", cache, _places(g, n, start), update)
    return settled(g, y, n)


def _in_place(g: Graph, n: nn.CacheWrite) -> bool:
    """Return whether a cache comes from the caller, nothing else reads it, and goes back."""
    own = isinstance(n.cache, Input) and n.cache.batch == tensor(n).batch != ""
    return own and g.alone(n.cache) and n in g.roots


def _places(g: Graph, n: nn.CacheWrite, start: ir.Value) -> ir.Value:
    """Return (row of the batch, head, row of the cache) of every row written: i64[B,H,N,3]."""
    heads, count, _ = tensor(n.update).shape
    key: object = ("places", n.start, heads, count, tensor(n).batch)
    if key not in g.memo:
        size = g.size(tensor(n).batch) if tensor(n).batch else g.ints(1)
        full = g("Concat", size, g.ints(heads, count, 1), axis=0)
        batch = g.steps(size)
        head = g.const(np.arange(heads).reshape(1, heads, 1, 1))
        row = g("Add", g.reshape(start, [-1, 1, 1, 1]), g.const(np.arange(count).reshape(-1, 1)))
        parts = (g.reshape(batch, [-1, 1, 1, 1]), head, row)
        g.memo[key] = g("Concat", *(g("Expand", p, full) for p in parts), axis=-1)
    return g.memo[key]


@lowers(nn.CachedAttention)
def _(g: Graph, n: nn.CachedAttention) -> ir.Value:
    q, k, v, start = (with_rows(g, a, n) for a in n.args)
    if g.target.attention != "parts" and g.opset >= FUSED:
        return settled(g, g.wide(_fused(g, n, q, k, v, start), n.k), n)
    # Spelled out it runs 0.9 to 1.7 times as fast under ONNX Runtime on a CPU, the faster the more
    # heads share keys (N = 1, 8, 16, up to 4096 rows: docs/models.md).
    (heads, count, width), (shared, _, _) = tensor(n.q).shape, tensor(n.k).shape
    group = heads // shared
    scaled = g.as_stored(g("Mul", q, _scalar(g, n.scale)), n.k)  # before products may overflow f16
    if group > 1:
        scaled = g.reshape(scaled, [-1, shared, group * count, width])
    score = g.wide(g("MatMul", scaled, g("Transpose", k, perm=[0, 1, 3, 2])), n.k)
    share = g("Softmax", g("Add", score, _mask(g, n, k, start, group)), axis=-1)
    y = g.wide(g("MatMul", g.as_stored(share, n.v), v), n.v)
    if group > 1:
        y = g.reshape(y, [-1, heads, count, tensor(n.v).shape[2]])
    return settled(g, y, n)


def _fused(g: Graph, n: nn.CachedAttention, *operands: ir.Value) -> ir.Value:
    """Return ONNX's attention, in the dtype of the cache."""
    q, k, v, start = operands
    q = g.as_stored(q, n.k)
    if g.target.attention == "nonpad" and not n.window:
        # Of the first `start + N` rows, query i sees those up to start + i: causal from below.
        valid = g("Add", start, g.const(np.int64(tensor(n.q).shape[1])))
        return g("Attention", q, k, v, None, None, None, valid, is_causal=1, scale=n.scale)  # type: ignore[no-any-return]
    shift = g.as_stored(_mask(g, n, k, start, 1, LOW[tensor(n.k).dtype]), n.k)
    return g("Attention", q, k, v, shift, scale=n.scale)  # type: ignore[no-any-return]


def _mask(
    g: Graph, n: nn.CachedAttention, k: ir.Value, start: ir.Value, group: int, low: float = LOWEST
) -> ir.Value:
    """Return 0 where a query reads a row, else `low`: f32[B, 1, group * N, S]."""
    count, rows = tensor(n.q).shape[1], tensor(n.k).shape[1]
    key: object = ("mask", n.start, count, rows, n.window, group, tensor(n).batch, low)
    if key not in g.memo:
        row = g.steps(g.extent(k, n.k, -2))
        step = g.const(np.tile(np.arange(count), group).reshape(-1, 1))
        last = g("Add", g.reshape(start, [-1, 1, 1, 1]), step)
        seen = g("LessOrEqual", row, last)
        if n.window:
            first = g("Sub", last, g.const(np.int64(n.window)))
            seen = g("And", seen, g("Greater", row, first))
        g.memo[key] = g("Where", seen, _scalar(g, 0.0), _scalar(g, low))
    return g.memo[key]


# ---------------------------------------------------------------- order


@lowers(nn.SortRank)
def _(g: Graph, n: nn.SortRank) -> ir.Value:
    return ranked(g, g.values[n.x], n.x)
