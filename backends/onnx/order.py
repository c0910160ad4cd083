"""Sorting of rows, largest first, equal elements in their order, on runtimes whose TopK is not so.

Such a TopK is not asked in rows of up to `PAIRS` elements: there the rank of an element is the
number of larger ones and of equal ones before it. In wider rows its order is put right by a second
TopK, whose keys are unequal integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.ir.core import Op, tensor
from pcc.targets import ORDER

PAIRS = 1024  # of 16 rows 16 million comparisons


def ordered(g: Graph, x: ir.Value, n: Op) -> tuple[ir.Value, ir.Value]:
    """Return the rows of `x`, of the type of `n`, in descending order, and where each stood."""
    width = tensor(n).shape[-1]
    if ORDER not in g.target.faults:
        best, order = g("TopK", x, g.ints(width), outputs=2, axis=-1)
        return best, order
    if width > PAIRS:
        return _repaired(g, x, width)
    rank = _counted(g, x, width)
    blank = g("Expand", g.const(np.float32(0)), _shape_of(g, n, x))
    return g("ScatterElements", blank, rank, x, axis=-1), _inverse(g, rank, n)


def ranked(g: Graph, x: ir.Value, n: Op) -> ir.Value:
    """Return the rank of each element of `x` in its row, the largest having rank 0."""
    if ORDER in g.target.faults and tensor(n).shape[-1] <= PAIRS:
        return _counted(g, x, tensor(n).shape[-1])
    return _inverse(g, ordered(g, x, n)[1], n)


def _inverse(g: Graph, order: ir.Value, n: Op) -> ir.Value:
    """Return the inverse of the permutation of each row."""
    count = g("Expand", g.const(np.arange(tensor(n).shape[-1])), _shape_of(g, n, order))
    return g("ScatterElements", order, order, count, axis=-1)  # type: ignore[no-any-return]


def _shape_of(g: Graph, x: Op, value: ir.Value) -> ir.Value:
    if tensor(x).batch:
        return g.full_shape(value, tensor(x).shape)
    return g.ints(*tensor(x).shape)


def _counted(g: Graph, x: ir.Value, width: int) -> ir.Value:
    """rank_i = #{j: x_j > x_i} + #{j < i: x_j = x_i}, counted in f32, which holds it."""
    mine, other = g("Unsqueeze", x, g.ints(-1)), g("Unsqueeze", x, g.ints(-2))
    earlier = g.const(np.tri(width, k=-1, dtype=np.bool_), "bool")
    tie = g("And", g("Equal", other, mine), earlier)
    before = g.cast(g("Or", g("Greater", other, mine), tie), "f32")
    return g.cast(g.reduce("ReduceSum", before, [-1]), "i64")


def _repaired(g: Graph, x: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """Sort twice: by value, and then by (how many smaller values came before, index)."""
    best, order = g("TopK", g.guard(x), g.ints(width), outputs=2, axis=-1)
    left, right = (g("Slice", best, g.ints(i), g.ints(width - 1 + i), g.ints(-1)) for i in (0, 1))
    first = g("Slice", order, g.ints(0), g.ints(1), g.ints(-1))
    step = g("Concat", g("Mul", first, g.const(np.int64(0))), g.cast(g("Less", right, left), "i64"),
             axis=-1)  # fmt: skip
    place = g("Mul", g("CumSum", step, g.const(np.int64(-1))), g.const(np.int64(width)))
    key = g("Sub", g.const(np.int64(width * width - 1)), g("Add", place, order))
    sorted_key, _ = g("TopK", key, g.ints(width), outputs=2, axis=-1)
    order = g("Sub", g.const(np.int64(width - 1)),
              g("Mod", sorted_key, g.const(np.int64(width))))  # fmt: skip
    return best, order
