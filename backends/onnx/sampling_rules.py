"""Lowering of `pcc.tensor.sampling`: an `If` skips the work where every row's setting is neutral.

Targets without branches do the work always.

Sorting all rows of a head is dear (n r rows of V), and most calls ask for no truncation. A row with
a neutral setting keeps its operand bit for bit in either branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.order import ordered
from pcc.backends.onnx.rules import lowers, may_be_log_zero
from pcc.ir.core import Op, tensor
from pcc.tensor import sampling as s
from pcc.tensor.ops import Softmax


def _column(g: Graph, setting: Op, rank: int) -> ir.Value:
    """Give a scalar per row trailing axes of size 1."""
    lead = [-1] if tensor(setting).batch else []
    return g.reshape(g.values[setting], [*lead, *([1] * rank)])


def _every(g: Graph, flags: ir.Value) -> ir.Value:
    """Whether all flags hold, as one boolean."""
    least = g("ReduceMin", g("Cast", flags, to=ir.DataType.INT32), keepdims=0)
    return g("Cast", least, to=ir.DataType.BOOL)  # type: ignore[no-any-return]


def _branch(g: Graph, name: str, emit: Callable[[], ir.Value]) -> ir.Graph:
    outer, g.nodes = g.nodes, []
    try:
        out = emit()
        if out.producer() not in g.nodes:  # it is made outside: a branch cannot return it as it is
            out = g("Identity", out)
        return ir.Graph([], [out], nodes=g.nodes, name=name)
    finally:
        g.nodes = outer


def _unless(
    g: Graph, neutral: ir.Value, plain: Callable[[], ir.Value], n: Op, emit: Callable[[], ir.Value]
) -> ir.Value:
    """What `plain` makes if `neutral`, else `emit`; with the batch axis of `n` in both branches.

    Where graphs cannot branch it is `emit`, which leaves neutral rows as they are.
    """
    if not g.target.branches:
        return emit()
    kind = tensor(n)
    branches: dict[str, Any] = {
        "then_branch": _branch(g, "neutral", plain),
        "else_branch": _branch(g, "active", emit),
    }
    y: ir.Value = g("If", neutral, **branches)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    lead: list[int | str | None] = [None] if kind.batch else []
    y.shape = ir.Shape([*lead, *kind.shape])
    return y


def _operand(g: Graph, x: Op, n: Op) -> ir.Value:
    return g.expanded(x, tensor(n).batch, tensor(x).shape)


@lowers(s.Temper)
def _(g: Graph, n: s.Temper) -> ir.Value:
    setting = _column(g, n.temperature, len(tensor(n).shape))
    return _tempered(g, n, _operand(g, n.x, n), setting)


def _tempered(g: Graph, n: s.Temper, x: ir.Value, setting: ir.Value) -> ir.Value:
    one, zero = g.const(np.float32(1)), g.const(np.float32(0))
    plain = g("Equal", setting, one)

    def emit() -> ir.Value:
        top = g.reduce("ReduceMax", x, [-1], keepdims=1)
        lowered = g("Sub", x, g.guard(top))
        warm = g("Greater", setting, zero)
        soft = g("Div", lowered, g("Where", warm, setting, one))
        best = g("ArgMax", x, axis=-1, keepdims=1)
        index = g.const(np.arange(tensor(n).shape[-1], dtype=np.int64))
        none = g.const(np.float32(-np.inf))
        hard = g("Where", g("Equal", index, best), zero, none)
        return g("Where", plain, x, g("Where", warm, soft, hard))  # type: ignore[no-any-return]

    return _unless(g, _every(g, plain), lambda: x, n, emit)


@lowers(s.Truncate)
def _(g: Graph, n: s.Truncate) -> ir.Value:
    rank = len(tensor(n).shape)
    count, mass = _column(g, n.top_k, rank), _column(g, n.top_p, rank)
    whole = g("Greater", g.const(np.int64(1)), count)
    wide = g("GreaterOrEqual", mass, g.const(np.float32(1)))
    plain = g("And", whole, wide)
    soft = n.p
    if isinstance(soft, Softmax) and isinstance(soft.x, s.Temper) and g.alone(soft, soft.x):
        return _law(g, n, soft.x, (count, mass, whole, wide, plain))
    return _truncated(g, n, _operand(g, n.p, n), (count, mass, whole, wide, plain))


def _law(g: Graph, n: s.Truncate, hot: s.Temper, settings: tuple[ir.Value, ...]) -> ir.Value:
    """Temper, softmax and truncate in one `If`: where all are neutral, a softmax and no copy."""
    x = _operand(g, hot.x, n)
    setting = _column(g, hot.temperature, len(tensor(n).shape))
    warm = _every(g, g("Equal", setting, g.const(np.float32(1))))
    neutral = g("And", warm, _every(g, settings[-1]))

    def soft(logits: ir.Value) -> ir.Value:
        return g("Softmax", logits, axis=-1)  # type: ignore[no-any-return]

    def emit() -> ir.Value:
        return _truncated(g, n, soft(g.guard(_tempered(g, hot, x, setting))), settings)

    plain = g.guard if may_be_log_zero(hot.x) else lambda v: v
    return _unless(g, neutral, lambda: soft(plain(x)), n, emit)


def _truncated(g: Graph, n: s.Truncate, p: ir.Value, settings: tuple[ir.Value, ...]) -> ir.Value:
    count, mass, whole, wide, plain = settings
    width, zero = tensor(n).shape[-1], g.const(np.float32(0))

    def emit() -> ir.Value:
        best, order = ordered(g, p, n)
        index = g.const(np.arange(width, dtype=np.int64))
        among = g("Or", whole, g("Less", index, count))
        best = g("Where", among, best, zero)
        before = g("CumSum", best, g.const(np.int64(-1)), exclusive=1)
        total = g.reduce("ReduceSum", best, [-1], keepdims=1)
        level = g("Mul", g("Max", mass, zero), total)
        stays = g("And", among, g("Or", wide, g("LessOrEqual", before, level)))
        kept = g("Where", stays, best, zero)
        kept = g("Div", kept, g.reduce("ReduceSum", kept, [-1], keepdims=1))
        blank = g("Mul", p, zero)
        back = g("ScatterElements", blank, order, kept, axis=-1)
        return g("Where", plain, p, back)  # type: ignore[no-any-return]

    return _unless(g, _every(g, plain), lambda: p, n, emit)
