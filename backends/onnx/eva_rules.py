"""Lowering of EVA attention. No size of a ring or of the summaries is written into the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.rules import lowers
from pcc.ir.core import Op, tensor
from pcc.tensor import eva
from pcc.tensor import ops as t


def _size(g: Graph, x: Op) -> ir.Value:
    """Return the number of rows of a state `[H,R,hd]` as i64[1]; equal types share it."""
    key: object = ("rows of", tensor(x))
    if key not in g.memo:
        g.memo[key] = g("Shape", g.values[x], start=-2, end=-1)
    return g.memo[key]


def _range(g: Graph, size: ir.Value) -> ir.Value:
    count = g("Squeeze", size, g.ints(0))
    return g("Range", g.const(np.int64(0)), count, g.const(np.int64(1)))  # type: ignore[no-any-return]


def _positions(g: Graph, start: Op, count: int) -> ir.Value:
    """Return start + 0..count-1 as [B,count] (or [count] where `start` has no batch axis)."""
    key: object = ("positions", start, count)
    if key not in g.memo:
        column = g("Unsqueeze", g.values[start], g.ints(-1))
        g.memo[key] = g("Add", column, g.const(np.arange(count, dtype=np.int64)))
    return g.memo[key]


@lowers(eva.RingWrite)
def _(g: Graph, n: eva.RingWrite) -> ir.Value:
    cache, update = g.values[n.cache], g.values[n.update]
    key: object = ("ring slots", n.start, tensor(n.cache), tensor(n.update))
    if key not in g.memo:
        heads, count, width = tensor(n.update).shape
        slots = g("Mod", _positions(g, n.start, count), _size(g, n.cache))
        column = g("Unsqueeze", slots, g.ints(-3, -1))
        target = g("Shape", update)
        g.memo[key] = g("Expand", column, target)
    return g("ScatterElements", cache, g.memo[key], update, axis=-2)  # type: ignore[no-any-return]


@lowers(eva.RingChunks)
def _(g: Graph, n: eva.RingChunks) -> ir.Value:
    heads, _, width = tensor(n.ring).shape
    key: object = ("ring chunks", n.start, tensor(n.ring), n.chunk, n.count)
    if key not in g.memo:
        rows, size = g.values[n.ring], _size(g, n.ring)
        first = g("Mul", g("Div", g.values[n.start], g.const(np.int64(n.chunk))), g.ints(n.chunk))
        steps = g.const(np.arange(n.count * n.chunk, dtype=np.int64).reshape(1, -1))
        slots = g("Mod", g("Add", g("Reshape", first, g.ints(-1, 1)), steps), size)
        whole = g("ReduceProd", g("Shape", rows, start=0, end=-1), keepdims=0)
        step = g("Squeeze", size, g.ints(0))
        base = g("Range", g.const(np.int64(0)), whole, step)  # where the rows of a head begin
        base = g("Reshape", base, g.ints(-1, heads, 1))
        g.memo[key] = g("Add", base, g("Unsqueeze", slots, g.ints(1)))
    flat = g.reshape(g.values[n.ring], [-1, width])
    taken = g("Gather", flat, g.memo[key], axis=0)
    return g.reshape(taken, [-1, heads, n.count, n.chunk, width])


def _bias(g: Graph, n: eva.EvaAttention) -> ir.Value:
    """Return 0 where a query may read a row (rings first, then summaries), else a huge negative."""
    key: object = ("eva bias", n.start, tensor(n.q), tensor(n.k), tensor(n.sk), n.window, n.chunk)
    if key in g.memo:
        return g.memo[key]
    count = tensor(n.q).shape[1]
    p = g("Unsqueeze", _positions(g, n.start, count), g.ints(-1))  # [B,N,1]
    w = g("Sub", p, g("Mod", p, g.const(np.int64(n.window))))
    size = _size(g, n.k)
    last = g("Slice", p, g.ints(count - 1), g.ints(count), g.ints(-2))  # [B,1,1]
    # A ring row holds the newest position up to `last` that is congruent to it.
    held = g("Sub", last, g("Mod", g("Sub", last, _range(g, size)), size))
    exact = g("And", g("LessOrEqual", w, held), g("LessOrEqual", held, p))
    ends = g("Mul", g("Add", _range(g, _size(g, n.sk)), g.ints(1)), g.ints(n.chunk))
    older = g("LessOrEqual", ends, w)
    seen = g("Unsqueeze", g("Concat", exact, older, axis=-1), g.ints(-3))
    g.memo[key] = g("Where", seen, g.const(np.float32(0)), g.const(np.float32(t.LOWEST)))
    return g.memo[key]


@lowers(eva.EvaAttention)
def _(g: Graph, n: eva.EvaAttention) -> ir.Value:
    # Scores are joined, keys are not: joining keys would copy both caches in every layer.
    q = g("Mul", g.values[n.q], g.const(np.float32(n.scale)))

    def scores(keys: Op) -> ir.Value:
        rank = len(tensor(keys).shape) + bool(tensor(keys).batch)
        swap = [*range(rank - 2), rank - 1, rank - 2]
        return g("MatMul", q, g("Transpose", g.values[keys], perm=swap))  # type: ignore[no-any-return]

    joined = g("Concat", scores(n.k), scores(n.sk), axis=-1)
    weight = g("Softmax", g("Add", joined, _bias(g, n)), axis=-1)
    sizes = g("Concat", _size(g, n.k), _size(g, n.sk), axis=0)
    exact, older = g("Split", weight, sizes, outputs=2, axis=-1)
    near, far = g("MatMul", exact, g.values[n.v]), g("MatMul", older, g.values[n.sv])
    return g("Add", near, far)  # type: ignore[no-any-return]
