"""One lowering rule per tensor op: element-wise ops, movement, reductions and index ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.ir.core import Op, tensor
from pcc.targets import INFINITE_MAX, LOG_SOFTMAX, SUBNORMAL
from pcc.tensor import ops as t

Rule = Callable[[Graph, Any], ir.Value]
RULES: dict[type[Op], Rule] = {}
CHAIN = 32  # terms from which a sum by halves pays for its nodes: one by one, each rounds the total
R = TypeVar("R", bound=Rule)


def lowers(*ops: type[Op]) -> Callable[[R], R]:
    """Register the rule for ops. A second rule for the same op is a bug, not an override."""

    def register(rule: R) -> R:
        for op in ops:
            if op in RULES:
                raise TypeError(f"'{op.name}' already lowers to ONNX in {RULES[op].__module__}")
            RULES[op] = rule
        return rule

    return register


# ---------------------------------------------------------------- element-wise

PLAIN: dict[type[Op], str] = {
    t.Add: "Add",
    t.Mul: "Mul",
    t.Less: "Less",
    t.Equal: "Equal",
    t.And: "And",
    t.Or: "Or",
}


@lowers(*PLAIN)
def _(g: Graph, n: t.Binary) -> ir.Value:
    return g(PLAIN[type(n)], g.operand(n.a, n), g.operand(n.b, n))  # type: ignore[no-any-return]


def may_be_log_zero(x: Op) -> bool:
    """Whether `x` may hold -inf (constants are looked at, logits are taken as finite)."""
    while isinstance(x, t.Reshape | t.Take | t.Transpose):
        x = x.x
    if isinstance(x, t.Const):
        return bool(np.isneginf(x.value.value).any())
    return not isinstance(
        x, t.Input | t.Contract | t.ScaledContract | t.Softmax | t.Mul | t.Div | t.LogSoftmax
    )


def may_reach_log_zero(x: Op) -> bool:
    """Whether `x` may hold -inf, inputs included."""
    return may_be_log_zero(x) or isinstance(x, t.Input)


@lowers(t.Sub)
def _(g: Graph, n: t.Sub) -> ir.Value:
    b = g.operand(n.b, n)
    if tensor(n).dtype == "f32" and may_reach_log_zero(n.b):
        b = g.guard(b)
    return g("Sub", g.operand(n.a, n), b)  # type: ignore[no-any-return]


@lowers(t.Div)
def _(g: Graph, n: t.Div) -> ir.Value:
    a, b = g.operand(n.a, n), g.operand(n.b, n)
    if isinstance(n.b, t.Const) and (n.b.value.value > 0).all():
        return g("Div", a, b)  # type: ignore[no-any-return]
    positive = g("Greater", b, g.const(np.float32(0)))
    ratio = g("Div", a, b)  # what a zero makes of it is not chosen
    return g("Where", positive, ratio, g.const(np.float32(0)))  # type: ignore[no-any-return]


@lowers(t.Not, t.Exp, t.Log)
def _(g: Graph, n: t.Unary) -> ir.Value:
    op = {t.Not: "Not", t.Exp: "Exp", t.Log: "Log"}[type(n)]
    return g(op, g.values[n.x])  # type: ignore[no-any-return]


@lowers(t.Softmax)
def _(g: Graph, n: t.Softmax) -> ir.Value:
    x = g.values[n.x]
    x = g.guard(x) if may_be_log_zero(n.x) else x
    return g("Softmax", x, axis=g.layout.axis(n.x, len(tensor(n).shape) - 1))  # type: ignore[no-any-return]


@lowers(t.LogSoftmax)
def _(g: Graph, n: t.LogSoftmax) -> ir.Value:
    x, axis = g.values[n.x], g.layout.axis(n.x, len(tensor(n).shape) - 1)
    if LOG_SOFTMAX not in g.target.faults:
        return g("LogSoftmax", x, axis=axis)  # type: ignore[no-any-return]
    lowered = g("Sub", x, g.reduce("ReduceMax", x, [axis], keepdims=1))
    total = g.reduce("ReduceSum", g("Exp", lowered), [axis], keepdims=1)
    return g("Sub", lowered, g("Log", total))  # type: ignore[no-any-return]


@lowers(t.Cast)
def _(g: Graph, n: t.Cast) -> ir.Value:
    return g.cast(g.values[n.x], n.dtype)


@lowers(t.Where)
def _(g: Graph, n: t.Where) -> ir.Value:
    cond, a, b = (g.operand(x, n) for x in (n.cond, n.a, n.b))
    if tensor(n).dtype == "bool":  # GPUs have no Where of booleans
        return g("Or", g("And", cond, a), g("And", g("Not", cond), b))  # type: ignore[no-any-return]
    return g("Where", cond, a, b)  # type: ignore[no-any-return]


@lowers(t.Column)
def _(g: Graph, n: t.Column) -> ir.Value:
    clipped = g("Clip", g.values[n.x], g.const(np.int64(-1)), g.const(np.int64(n.card)))
    return g("Add", clipped, g.const(np.int64(1)))  # type: ignore[no-any-return]


@lowers(t.FloorDiv)
def _(g: Graph, n: t.FloorDiv) -> ir.Value:
    return g("Div", g.values[n.x], g.const(np.int64(n.by)))  # type: ignore[no-any-return]


@lowers(t.Remainder)
def _(g: Graph, n: t.Remainder) -> ir.Value:
    return g("Mod", g.values[n.x], g.const(np.int64(n.by)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- movement


@lowers(t.Reshape)
def _(g: Graph, n: t.Reshape) -> ir.Value:
    x, old, new = g.values[n.x], tensor(n.x).shape, n.shape
    if not tensor(n).batch:
        return g.reshape(x, new)
    leading = [s[0] if s else 1 for s in (old, new)]
    if g.layout.position == 0 or leading[0] == leading[1]:
        return g.reshape(x, g.layout.shape(n, new))
    rows_first = g("Transpose", x, perm=_batch_first(g, n.x)) if leading[0] != 1 else x
    flat = g.reshape(rows_first, [-1, *new])
    if leading[1] == 1:
        return g.reshape(flat, g.layout.shape(n, new))
    back = list(range(1, len(new) + 1))
    back.insert(g.layout.at(n), 0)
    return g("Transpose", flat, perm=back)  # type: ignore[no-any-return]


def _batch_first(g: Graph, x: Op) -> list[int]:
    p = g.layout.at(x)
    return [p, *(a for a in range(len(tensor(x).shape) + 1) if a != p)]


@lowers(t.Transpose)
def _(g: Graph, n: t.Transpose) -> ir.Value:
    perm = [g.layout.axis(n.x, a) for a in n.perm]
    if tensor(n).batch:
        perm.insert(g.layout.at(n), g.layout.at(n.x))
    return g("Transpose", g.values[n.x], perm=perm)  # type: ignore[no-any-return]


@lowers(t.Take)
def _(g: Graph, n: t.Take) -> ir.Value:
    axis, first, rows = g.layout.axis(n.x, n.axis), n.indices[0], n.indices
    if list(rows) == list(range(first, first + len(rows))):
        ends = (g.ints(first), g.ints(first + len(rows)), g.ints(axis))
        return g("Slice", g.values[n.x], *ends)  # type: ignore[no-any-return]
    return g("Gather", g.values[n.x], g.ints(*rows), axis=axis)  # type: ignore[no-any-return]


@lowers(t.Concat)
def _(g: Graph, n: t.Concat) -> ir.Value:
    parts = [g.expanded(x, tensor(n).batch, tensor(x).shape) for x in n.xs]
    return g("Concat", *parts, axis=g.layout.axis(n, n.axis))  # type: ignore[no-any-return]


@lowers(t.Expand)
def _(g: Graph, n: t.Expand) -> ir.Value:
    return g.expanded(n.x, tensor(n).batch, n.shape)


# ---------------------------------------------------------------- reductions


@lowers(t.ReduceProd)
def _(g: Graph, n: t.ReduceProd) -> ir.Value:
    return _halved(g, n, "ReduceProd", "Mul")


@lowers(t.ReduceSum)
def _(g: Graph, n: t.ReduceSum) -> ir.Value:
    folds = tensor(n.x).batch and n.axis == 0
    if folds and (g.layout.position == 1 or tensor(n.x).shape[0] >= CHAIN):
        return _halved(g, n, "ReduceSum", "Add")
    return _settle(g, n, g.reduce("ReduceSum", g.values[n.x], [g.layout.axis(n.x, n.axis)]))


@lowers(t.ReduceMax)
def _(g: Graph, n: t.ReduceMax) -> ir.Value:
    x, axes = g.values[n.x], [g.layout.axis(n.x, n.axis)]
    if tensor(n.x).dtype == "f32" and may_reach_log_zero(n.x):
        return _settle(g, n, g.largest(x, axes))
    return _settle(g, n, g.reduce("ReduceMax", x, axes))


def _halved(g: Graph, n: t.Reduction, op: str, pair: str) -> ir.Value:
    """Combine halves: reductions over the first axis are several times slower in ONNX Runtime."""
    x, axis = g.values[n.x], g.layout.axis(n.x, n.axis)
    size = tensor(n.x).shape[n.axis]
    while size > 1 and size % 2 == 0 and tensor(n.x).dtype == "f32":
        size //= 2
        left, right = g("Split", x, g.ints(size, size), outputs=2, axis=axis)
        x = g(pair, left, right)
    if size > 1:
        return _settle(g, n, g.reduce(op, x, [axis]))
    return _settle(g, n, g("Squeeze", x, g.ints(axis)))


def _settle(g: Graph, n: t.Reduction, y: ir.Value) -> ir.Value:
    """Move the batch axis to its place if the fold axis before it was reduced away."""
    if not tensor(n).batch or g.layout.position == 0 or n.axis != 0 or not tensor(n).shape:
        return y
    perm = list(range(len(tensor(n).shape) + 1))
    perm[0], perm[1] = 1, 0
    return g("Transpose", y, perm=perm)  # type: ignore[no-any-return]


@lowers(t.ReduceLse)
def _(g: Graph, n: t.ReduceLse) -> ir.Value:
    x, axis = g.values[n.x], g.layout.axis(n.x, n.axis)
    top = g.guard(g.reduce("ReduceMax", x, [axis], keepdims=1))
    total = g.reduce("ReduceSum", g("Exp", g("Sub", x, top)), [axis])
    y = g("Add", g("Log", total), g("Squeeze", top, g.ints(axis)))
    return _settle(g, n, y)


@lowers(t.Cumsum)
def _(g: Graph, n: t.Cumsum) -> ir.Value:
    axis = g.const(np.int64(g.layout.axis(n.x, n.axis)))
    return g("CumSum", g.values[n.x], axis, exclusive=int(n.exclusive))  # type: ignore[no-any-return]


@lowers(t.CumProd)
def _(g: Graph, n: t.CumProd) -> ir.Value:
    # A running product op exists from opset 26 only; zeros survive as exp(-inf).
    axis = g.const(np.int64(g.layout.axis(n.x, n.axis)))
    return g("Exp", g("CumSum", g("Log", g.values[n.x]), axis, exclusive=1))  # type: ignore[no-any-return]


@lowers(t.ArgMax)
def _(g: Graph, n: t.ArgMax) -> ir.Value:
    x, axis = g.values[n.x], g.layout.axis(n.x, len(tensor(n.x).shape) - 1)
    if INFINITE_MAX in g.target.faults and may_reach_log_zero(n.x):
        x = g.guard(x)  # no number lies between -inf and the guard
    return g("ArgMax", x, axis=axis, keepdims=0)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- index ops


def _offset_index(g: Graph, table: Op, x: Op, stride: int, result: Op) -> ir.Value:
    """Return `x[f] + f * stride` (+ the row's offset): rows of a table flattened over folds."""
    folds = tensor(x).shape[0]
    index = g.operand(x, result)
    if folds > 1:
        offset = np.arange(folds, dtype=np.int64) * stride
        lift = tensor(result).batch and g.layout.position == 1
        index = g("Add", index, g.const(offset[:, None] if lift else offset))
    rows = g.rows(table, result, folds * stride, 1)
    return index if rows is None else g("Add", index, rows)


@lowers(t.Lookup)
def _(g: Graph, n: t.Lookup) -> ir.Value:
    f, k, v = tensor(n.table).shape
    if isinstance(n.table, t.Const):
        flat = g.const(n.table.value.value.transpose(0, 2, 1).reshape(f * v, k))
        return g("Gather", flat, _offset_index(g, n.table, n.x, v, n), axis=0)  # type: ignore[no-any-return]
    if not tensor(n.table).batch:
        columns = g.reshape(g("Transpose", g.values[n.table], perm=[0, 2, 1]), [f * v, k])
        return g("Gather", columns, _offset_index(g, n.table, n.x, v, n), axis=0)  # type: ignore[no-any-return]
    return _elements(g, n)


def _elements(g: Graph, n: t.Lookup) -> ir.Value:
    """Take elements of the flattened table of each row: no transposed copy of a large table."""
    f, k, v = tensor(n.table).shape
    at = np.arange(f * k, dtype=np.int64).reshape(f, k) * v
    table = g.values[n.table]
    if g.layout.position == 1:  # folds lie first: [F, B, K, V]
        table = g("Transpose", table, perm=_batch_first(g, n.table))
        at = at[:, None]
    x = g.operand(n.x, n)
    index = g("Add", g("Unsqueeze", x, g.ints(-1)), g.const(at))
    rows = g.rows(n.table, n, f * k * v, 2)
    if rows is not None:
        index = g("Add", index, rows)
    return g("Gather", g.reshape(table, [-1]), index, axis=0)  # type: ignore[no-any-return]


@lowers(t.SelectRow)
def _(g: Graph, n: t.SelectRow) -> ir.Value:
    f, o, i = tensor(n.w).shape
    if isinstance(n.w, t.Const):
        flat = g.weight(n.w.value.reshaped((f * o, i)))
    elif tensor(n.w).batch and g.layout.position == 1:
        rows_first = g("Transpose", g.values[n.w], perm=_batch_first(g, n.w))
        flat = g.reshape(rows_first, [-1, i])
    else:
        flat = g.reshape(g.values[n.w], [-1, i])
    index = _offset_index(g, n.w, n.sel, o, n)
    return g.wide(g("Gather", flat, index, axis=0), n.w)


@lowers(t.InverseCdf)
def _(g: Graph, n: t.InverseCdf) -> ir.Value:
    # The first j with cumsum_j > u * total has positive mass, since cumsum rises only there. One
    # exists if total > 0: in float32, u <= 1 - 2^-24 makes u * total < total for normal numbers.
    v = tensor(n.mass).shape[1]
    mass, faint = g.operand(n.mass, n), may_be_subnormal(n.mass)
    if faint and SUBNORMAL in g.target.faults:
        mass, faint = _raised(g, mass), False
    cum = g("CumSum", mass, g.const(np.int64(-1)))
    total = g("Slice", cum, g.ints(v - 1), g.ints(v), g.ints(-1))
    level = g("Mul", g("Unsqueeze", g.operand(n.u, n), g.ints(-1)), total)
    if faint:  # there u * total may round up to total: step below it
        level = g("Min", level, g("Sub", total, g.const(np.float32(2.0**-149))))
    hit = g.cast(g("Greater", cum, level), "f32")  # GPUs have no ArgMax of integers
    return g("ArgMax", hit, axis=-1, keepdims=0)  # type: ignore[no-any-return]


def _raised(g: Graph, mass: ir.Value) -> ir.Value:
    """Return 2^40 mass in rows below 2^64: sums are normal numbers, and compare as they did."""
    top = g.reduce("ReduceMax", mass, [-1], keepdims=1)
    low = g("Less", top, g.const(np.float32(2.0**64)))
    scale = g("Where", low, g.const(np.float32(2.0**40)), g.const(np.float32(1)))
    return g("Mul", mass, scale)  # type: ignore[no-any-return]


@lowers(t.Trajectory)
def _(g: Graph, n: t.Trajectory) -> ir.Value:
    count, k = tensor(n.maps).shape
    maps = g.values[n.maps]
    if tensor(n.maps).batch and g.layout.position == 1:
        maps = g("Transpose", maps, perm=_batch_first(g, n.maps))
    flat, state, states = g.reshape(maps, [-1]), g.operand(n.start, n), []
    rows = g.rows(n.maps, n, count * k, 1)
    for step in range(count):
        index = g("Add", state, g.const(np.int64(step * k))) if step else state
        index = index if rows is None else g("Add", index, rows)
        state = g("Gather", flat, index, axis=0)
        states.append(state)
    return g("Concat", *states, axis=g.layout.axis(n, 0)) if count > 1 else state


def may_be_subnormal(mass: Op) -> bool:
    """Whether the total of a row of `mass` may be a subnormal number (softmaxes sum to one)."""
    x = mass
    while isinstance(x, t.Take | t.SelectRow | t.Reshape):
        if tensor(x).shape[-1] != tensor(x.args[0]).shape[-1]:
            return True
        x = x.args[0]
    if isinstance(x, t.Const):
        return bool((x.value.value.sum(axis=-1) < 2.0**-100).any())
    return not isinstance(x, t.Softmax)
