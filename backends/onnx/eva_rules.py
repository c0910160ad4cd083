"""Lowering of EVA attention. No size of a ring or of the summaries is written into the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.nn_rules import settled, with_rows
from pcc.backends.onnx.rules import lowers
from pcc.ir.core import Op, tensor
from pcc.tensor import eva
from pcc.tensor import ops as t


def _size(g: Graph, x: Op) -> ir.Value:
    """Return the number of rows of a state `[H,R,hd]` as i64[1]; equal types share it."""
    key: object = ("rows of", tensor(x))
    if key not in g.memo:
        g.memo[key] = g.extent(g.values[x], x, -2)
    return g.memo[key]


def _positions(g: Graph, start: Op, count: int, result: Op) -> ir.Value:
    """Return start + 0..count-1 as [B,count]."""
    key: object = ("positions", start, count, tensor(result).batch)
    if key not in g.memo:
        column = g("Unsqueeze", with_rows(g, start, result), g.ints(-1))
        g.memo[key] = g("Add", column, g.const(np.arange(count, dtype=np.int64)))
    return g.memo[key]


@lowers(eva.RingWrite)
def _(g: Graph, n: eva.RingWrite) -> ir.Value:
    cache, update = with_rows(g, n.cache, n), with_rows(g, n.update, n)
    update = g.as_stored(update, n.cache)
    if g.target.rings:  # written in place, where only the rows of the update are touched
        start = _slot(g, n)
        y = g("TensorScatter", cache, update, start, axis=-2, mode="circular")
        return settled(g, y, n)
    key: object = ("ring slots", n.start, tensor(n.cache), tensor(n.update), tensor(n).batch)
    if key not in g.memo:
        positions = _positions(g, n.start, tensor(n.update).shape[1], n)
        slots = g("Mod", positions, _size(g, n.cache))
        column = g("Unsqueeze", slots, g.ints(1, 3))
        g.memo[key] = g(
            "Expand",
            column,
            g.full_shape(update, tensor(n.update).shape)
            if tensor(n).batch
            else g.ints(1, *tensor(n.update).shape),
        )
    return settled(g, g("ScatterElements", cache, g.memo[key], update, axis=-2), n)


def _slot(g: Graph, n: eva.RingWrite) -> ir.Value:
    key: object = ("ring start", n.start, tensor(n.cache), tensor(n).batch)
    if key not in g.memo:
        g.memo[key] = g("Mod", with_rows(g, n.start, n), _size(g, n.cache))
    return g.memo[key]


@lowers(eva.RingChunks)
def _(g: Graph, n: eva.RingChunks) -> ir.Value:
    heads, _, width = tensor(n.ring).shape
    ring = with_rows(g, n.ring, n)
    key: object = ("ring chunks", n.start, tensor(n.ring), n.chunk, n.count, tensor(n).batch)
    if key not in g.memo:
        size, chunk = _size(g, n.ring), g.const(np.int64(n.chunk))
        first = g("Mul", g("Div", with_rows(g, n.start, n), chunk), chunk)
        steps = g.const(np.arange(n.count * n.chunk, dtype=np.int64))
        slots = g("Mod", g("Add", g("Unsqueeze", first, g.ints(-1)), steps), size)
        base = _bases(g, n, ring, heads)
        g.memo[key] = g("Add", base, g("Unsqueeze", slots, g.ints(1)))
    taken = g("Gather", g.reshape(ring, [-1, width]), g.memo[key], axis=0)
    taken = g.wide(taken, n.ring)
    return settled(g, g.reshape(taken, [-1, heads, n.count, n.chunk, width]), n)


def _bases(g: Graph, n: eva.RingChunks, ring: ir.Value, heads: int) -> ir.Value:
    """Return where the rows of each head of each row of the batch begin, as [B,H,1]."""
    if g.batch is not None:
        count = (g.batch if tensor(n).batch else 1) * heads
        return g.const((np.arange(count) * tensor(n.ring).shape[1]).reshape(-1, heads, 1))
    whole = g("ReduceProd", g("Shape", ring, start=0, end=-1), keepdims=0)
    step = g("Squeeze", _size(g, n.ring), g.ints(0))
    base = g("Range", g.const(np.int64(0)), whole, step)
    return g("Reshape", base, g.ints(-1, heads, 1))  # type: ignore[no-any-return]


def _bias(g: Graph, n: eva.EvaAttention) -> ir.Value:
    """Return 0 where a query may read a row (rings first, then summaries), else the lowest f32."""
    sizes = (tensor(n.q), tensor(n.k), tensor(n.sk), n.window, n.chunk, tensor(n).batch)
    key: object = ("eva bias", n.start, sizes)
    if key in g.memo:
        return g.memo[key]
    count = tensor(n.q).shape[1]
    p = g("Unsqueeze", _positions(g, n.start, count, n), g.ints(-1))  # [B,N,1]
    w = g("Sub", p, g("Mod", p, g.const(np.int64(n.window))))
    size = _size(g, n.k)
    first = g("Unsqueeze", with_rows(g, n.start, n), g.ints(-1, -2))  # [B,1,1]
    last = g("Add", first, g.const(np.int64(count - 1)))
    # A ring row holds the newest position up to `last` that is congruent to it.
    held = g("Sub", last, g("Mod", g("Sub", last, g.steps(size)), size))
    exact = g("And", g("LessOrEqual", w, held), g("LessOrEqual", held, p))
    ends = g("Mul", g("Add", g.steps(_size(g, n.sk)), g.ints(1)), g.ints(n.chunk))
    seen = g("Concat", exact, g("LessOrEqual", ends, w), axis=-1)
    bias = g("Where", seen, g.const(np.float32(0)), g.const(np.float32(t.LOWEST)))
    g.memo[key] = g("Unsqueeze", bias, g.ints(1))
    return g.memo[key]


@lowers(eva.EvaAttention)
def _(g: Graph, n: eva.EvaAttention) -> ir.Value:
    # Scores are joined, keys are not: joining keys would copy both caches in every layer.
    q, k, v, sk, sv = (with_rows(g, x, n) for x in n.args[:5])
    q = g.as_stored(g("Mul", q, g.const(np.float32(n.scale))), n.k)
    scores = [g.wide(g("MatMul", q, g("Transpose", x, perm=[0, 1, 3, 2])), n.k) for x in (k, sk)]
    joined = g("Concat", *scores, axis=-1)
    weight = g("Softmax", g("Add", joined, _bias(g, n)), axis=-1)
    weight = g.as_stored(weight, n.k)
    if g.batch is not None:
        sizes = g.ints(tensor(n.k).shape[1], tensor(n.sk).shape[1])
    else:
        sizes = g("Concat", _size(g, n.k), _size(g, n.sk), axis=0)
    exact, older = g("Split", weight, sizes, outputs=2, axis=-1)
    parts = (g.wide(g("MatMul", exact, v), n.k), g.wide(g("MatMul", older, sv), n.k))
    return settled(g, g("Add", *parts), n)
