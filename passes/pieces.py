"""Small constructors of tensor expressions that keep the graph tidy while it is built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcc.ir import places
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor, units
from pcc.ir.types import show_scope
from pcc.tensor import ops as t
from pcc.tensor.sampling import Truncate

Piece = tuple[Sequence[int], Op]  # destination rows, value with that many rows


def const(value: object) -> Op:
    """Return a constant."""
    return t.Const(Array.of(np.asarray(value)))


def full(shape: tuple[int, ...], value: float) -> Op:
    """Return a constant of one value."""
    return const(np.full(shape, value, np.float32))


def take(x: Op, rows: Sequence[int], axis: int = 0) -> Op:
    """x[rows] along an axis; looks through takes and concatenations."""
    size = tensor(x).shape[axis]
    if list(rows) == list(range(size)):
        return x
    if isinstance(x, t.Take) and x.axis == axis:
        return take(x.x, [x.indices[r] for r in rows], axis)
    if isinstance(x, t.Concat) and x.axis == axis:
        start = 0
        for part in x.xs:
            stop = start + tensor(part).shape[axis]
            if all(start <= r < stop for r in rows):
                return take(part, [r - start for r in rows], axis)
            start = stop
    if isinstance(x, t.Const) and (axis == 0 or not x.value.recipe):
        if axis == 0:
            return t.Const(x.value.taken(rows))
        return t.Const(Array.of(np.take(x.value.value, list(rows), axis), x.value.dtype))
    return t.Take(x, axis, tuple(rows))


def concat(xs: Sequence[Op], axis: int = 0) -> Op:
    """Join values; one value is itself."""
    return xs[0] if len(xs) == 1 else t.Concat(tuple(xs), axis)


def joined(xs: Sequence[Op], axis: int = 0) -> Op:
    """Join values; neighbours that are one value, or are taken from one, are taken from it."""
    parts: list[tuple[Op, list[int], list[Op]]] = []  # a value, what is taken of it, as what
    for x in xs:
        of = x.x if isinstance(x, t.Take) and x.axis == axis else x
        rows = x.indices if isinstance(x, t.Take) and of is not x else range(tensor(x).shape[axis])
        if not parts or parts[-1][0] is not of:
            parts.append((of, [], []))
        parts[-1][1].extend(rows)
        parts[-1][2].append(x)
    whole = [was[0] if len(was) == 1 else take(of, rows, axis) for of, rows, was in parts]
    return concat(whole, axis)


def reshape(x: Op, shape: tuple[int, ...]) -> Op:
    """Return `x` in another shape; nothing if it has it."""
    if tensor(x).shape == shape:
        return x
    return t.Reshape(x.x if isinstance(x, t.Reshape) else x, shape)


def assemble(size: int, pieces: Sequence[Piece], default: float = 0.0) -> Op:
    """Sum pieces into `size` rows: y[r] = sum of the piece rows that go to r, else `default`."""
    rows: list[list[int]] = [[] for _ in range(size)]
    at = 0
    for dest, _ in pieces:
        for d in dest:
            rows[d].append(at)
            at += 1
    parts = [p for _, p in pieces]
    filler = (1, *tensor(parts[0]).shape[1:])
    if any(not r for r in rows):
        parts.append(_row(filler, default, tensor(parts[0]).dtype))
    joined, missing = concat(parts), at
    depth = max(map(len, rows))
    out: Op | None = None
    for level in range(max(depth, 1)):
        index = [r[level] if level < len(r) else missing for r in rows]
        if level and missing in index and len(parts) == len(pieces):
            joined = concat([*parts, _row(filler, 0.0, tensor(parts[0]).dtype)])
        part = take(joined, index)
        out = part if out is None else t.Add(out, part)
    assert out is not None
    return out


def _row(shape: tuple[int, ...], value: float, dtype: str) -> Op:
    return const(np.full(shape, value, np.int64 if dtype == "i64" else np.float32))


def product(xs: Sequence[Op | None]) -> Op | None:
    """Multiply values, leaving out those that are one (None)."""
    out: Op | None = None
    for x in xs:
        if x is not None:
            out = x if out is None else t.Mul(out, x)
    return out


def normalised(p: Op) -> bool:
    """Whether the last axis of `p` sums to one by construction (a softmax, cut or wired)."""
    while isinstance(p, t.Take | t.Reshape | t.Transpose):
        rank = len(tensor(p.x).shape)
        if isinstance(p, t.Take) and p.axis == rank - 1:
            return False
        if isinstance(p, t.Reshape) and p.shape[-1:] != tensor(p.x).shape[-1:]:
            return False
        if isinstance(p, t.Transpose) and p.perm[-1] != rank - 1:
            return False
        p = p.x
    if isinstance(p, t.Concat):
        return p.axis != len(tensor(p).shape) - 1 and all(map(normalised, p.xs))
    return isinstance(p, t.Softmax | Truncate)


def layer_name(n: Op) -> str:
    """Return what a circuit layer is called in a graph: its op and the variables below it."""
    mask = 0
    for scope in units(n).scopes:
        mask |= scope
    return f"{n.name} {show_scope(mask)}"


def place(value: Op, layer: str) -> Op:
    """Say of `value`, and of what it is made of, that they belong to `layer`, if nothing does."""
    stack = [value]
    while stack:
        n = stack.pop()
        if not n.loc and layer and not isinstance(n, t.Input | t.Const):
            places.place(n, layer)
            stack.extend(n.args)
    return value
