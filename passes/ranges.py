"""Interval analysis of linear expressions of trained numbers.

For a node E, `(low, high)` bound its positive values: every entry is 0 or within [low, high].
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from pcc.ir.core import Op, Values, postorder, tensor
from pcc.ir.semiring import split_equation
from pcc.tensor import ops as t

Bounds: TypeAlias = tuple[float, float]
TOP = 1e300
# What leaves float32 (1.2e-38 .. 3.4e38) eight decades of headroom.
LOW, HIGH = 1e-30, 1e30


def bounds(roots: tuple[Op, ...]) -> dict[Op, Bounds]:
    """Return the bounds of every node that has some."""
    out: dict[Op, Bounds] = {}
    for n in postorder(*roots):
        b = _bounds(n, out)
        if b is not None:
            out[n] = (max(b[0], 0.0), min(b[1], TOP))
    return out


def of_array(value: Values) -> Bounds | None:
    """Return the bounds of a trained array, if it is non-negative and finite."""
    if value.dtype.kind != "f" or not np.isfinite(value).all() or (value < 0).any():
        return None
    positive = value[value > 0]
    if positive.size == 0:
        return (1.0, 1.0)  # all zero: any bounds hold
    return float(positive.min()), float(positive.max())


def _bounds(n: Op, have: dict[Op, Bounds]) -> Bounds | None:
    match n:
        case t.Const(value=array):
            # An array that is not in memory is a projection: no probability, no bounds.
            return None if array.recipe else of_array(array.value)
        case t.Mul(a=a, b=b) if a in have and b in have:
            return have[a][0] * have[b][0], have[a][1] * have[b][1]
        case t.Contract(a=a, b=t.Const(value=w), eq=eq) if a in have and not w.recipe:
            return _contract(have[a], w.value, eq)
        case t.ReduceProd(x=x, axis=axis) | t.CumProd(x=x, axis=axis) if x in have:
            lo, hi = have[x]
            size = tensor(x).shape[axis]
            return min(1.0, lo, lo**size), max(1.0, hi, min(hi, 1e10) ** min(size, 30))
        case t.ReduceSum(x=x, axis=axis) if x in have:
            return have[x][0], have[x][1] * tensor(x).shape[axis]
        case t.Where(a=a, b=b) if a in have and b in have:
            return min(have[a][0], have[b][0]), max(have[a][1], have[b][1])
        case t.Concat(xs=xs) if all(x in have for x in xs):
            return min(have[x][0] for x in xs), max(have[x][1] for x in xs)
        case t.Add(a=a, b=b) if a in have and b in have and tensor(n).dtype == "f32":
            return min(have[a][0], have[b][0]), have[a][1] + have[b][1]
        case t.Reshape(x=x) | t.Transpose(x=x) | t.Take(x=x) if x in have:
            return have[x]
        case t.Expand(x=x) if x in have:
            return have[x]
        case t.Lookup(table=table) if table in have:
            return have[table]
        case _:
            return None


def _contract(x: Bounds, w: Values, eq: str) -> Bounds | None:
    b = of_array(w)
    if b is None:
        return None
    (_, tw), out = split_equation(eq)
    gone = tuple(i for i, c in enumerate(tw) if c not in out)
    total = float(w.astype(np.float64).sum(axis=gone).max()) if gone else b[1]
    return x[0] * b[0], x[1] * max(total, b[1])
