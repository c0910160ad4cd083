"""Lowering of contractions: as matrix products where the equation is one, else as Einsum."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.rules import lowers
from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.ir.semiring import split_equation
from pcc.ir.types import HALVES, INT8
from pcc.tensor import ops as t


@lowers(t.Contract)
def _(g: Graph, n: t.Contract) -> ir.Value:
    return contract(g, g.values[n.a], n.a, n.b, n.eq)


@lowers(t.ScaledContract)
def _(g: Graph, n: t.ScaledContract) -> ir.Value:
    x = g.values[n.a]
    if n.dtype in HALVES:
        x = g.cast(g.cast(x, n.dtype), "f32")
    return g("Mul", _product(g, x, n.a, n.b, n.eq), _scales(g, n))  # type: ignore[no-any-return]


def _scales(g: Graph, n: t.ScaledContract) -> ir.Value:
    """Return the scales so that they broadcast with the result."""
    _, out = split_equation(n.eq)
    sizes = dict(zip(n.kept, tensor(n.scale).shape, strict=True))
    if not isinstance(n.scale, t.Const):
        raise PccError("E411", f"'{n.name}' has scales that are computed", at=n.loc)
    order = [n.kept.index(c) for c in out if c in sizes]
    wide = n.scale.value.value.transpose(order).reshape([sizes.get(c, 1) for c in out])
    if tensor(n).batch and g.layout.position == 1 and out:
        wide = np.expand_dims(wide, 1)
    return g.const(wide)


def contract(g: Graph, x: ir.Value, a: Op, b: Op, eq: str) -> ir.Value:
    """Contract the value `x`, which has the type of `a`, with `b`.

    With a half `b` both are half, and so is the result of an ONNX product, which is then widened.
    """
    return g.wide(_product(g, g.as_stored(x, b), a, b, eq), b)


def _product(g: Graph, x: ir.Value, a: Op, b: Op, eq: str) -> ir.Value:
    (ta, tb), out = split_equation(eq)
    if len(ta) == 1 and tb[-1] == ta and out == tb[:-1] and isinstance(b, t.Const):
        return _projection(g, x, a, b)
    if len(ta) == 1 and tb[-1] == ta and out == tb[:-1] and g.layout.position == 0:
        if tensor(a).batch and tensor(b).batch:
            return _selected(g, x, b)
    if len(ta) == len(tb) == len(out) == 2 and isinstance(b, t.Const) and g.layout.position == 0:
        if tb == out[1] + ta[1] and out[0] == ta[0]:
            return g("MatMul", x, g.weight(b.value, transposed=True))  # type: ignore[no-any-return]
        if tb == ta[1] + out[1] and out[0] == ta[0]:
            return g("MatMul", x, g.weight(b.value))  # type: ignore[no-any-return]
    if tensor(b).dtype == INT8:
        return _einsum(g, x, a, b, eq)
    if len(ta) == 2 and len(tb) == 3 and len(out) == 2 and ta[0] == tb[0] == out[0]:
        if ta[1] == tb[2] and out[1] == tb[1]:
            return _rows(g, x, a, b, transposed=True)
        if ta[1] == tb[1] and out[1] == tb[2]:
            return _rows(g, x, a, b, transposed=False)
    if ta == tb and out == ta[:-1] and tensor(b).dtype not in HALVES:
        both = t.Mul(a, b)
        product = g("Mul", _lifted(g, both, a, x), g.operand(b, both))
        return g.reduce("ReduceSum", product, [g.layout.axis(both, len(ta) - 1)])
    return _einsum(g, x, a, b, eq)


def _projection(g: Graph, x: ir.Value, a: Op, b: t.Const) -> ir.Value:
    """[B,D] times a trained [..., D]: one matrix product with the weight transposed at export."""
    shape = b.value.shape
    flat = g.weight(b.value, transposed=True, stream=True)
    if not tensor(a).batch:
        return g.reshape(g("MatMul", x, flat), shape[:-1])
    if g.layout.position == 1:  # a vector per row lies as [D, B]
        x = g("Transpose", x, perm=[1, 0])
    y = g.reshape(g("MatMul", x, flat), [-1, *shape[:-1]])
    if g.layout.position == 0 or len(shape) == 1:
        return y
    perm = list(range(1, len(shape)))
    perm.insert(1, 0)
    return g("Transpose", y, perm=perm)  # type: ignore[no-any-return]


def _selected(g: Graph, x: ir.Value, b: Op) -> ir.Value:
    """[B,D] times a [B, ..., D] of each row: no transposed copy, which Einsum would make."""
    *kept, width = tensor(b).shape
    rows = g.reshape(g.values[b], [-1, math.prod(kept), width])
    y = g("MatMul", rows, g("Unsqueeze", x, g.ints(-1)))
    return g.reshape(y, [-1, *kept])


def _rows(g: Graph, x: ir.Value, a: Op, b: Op, *, transposed: bool) -> ir.Value:
    """Per fold, a row times a matrix: y[f,o] = sum_i x[f,i] w[f,i,o] (or w[f,o,i])."""
    w, f = g.values[b], tensor(a).shape[0]
    if isinstance(b, t.Const):
        array = b.value.value
        array = array.transpose(0, 2, 1) if transposed else array
        if f == 1:  # [.., 1, Ki] @ [Ki, Ko], or [1, B, Ki] @ [Ki, Ko]
            return g("MatMul", x, g.const(array[0]))  # type: ignore[no-any-return]
        if tensor(a).batch and g.layout.position == 1:
            return g("MatMul", x, g.const(array))  # type: ignore[no-any-return]
        y = g("MatMul", g("Unsqueeze", x, g.ints(-2)), g.const(array))
        return g("Squeeze", y, g.ints(-2))  # type: ignore[no-any-return]
    if g.layout.position == 1 and (tensor(a).batch or tensor(b).batch):
        eq = "fi,foi->fo" if transposed else "fi,fio->fo"
        return _einsum(g, x, a, b, eq)
    if transposed:
        y = g("MatMul", w, g("Unsqueeze", x, g.ints(-1)))
        return g("Squeeze", y, g.ints(-1))  # type: ignore[no-any-return]
    y = g("MatMul", g("Unsqueeze", x, g.ints(-2)), w)
    return g("Squeeze", y, g.ints(-2))  # type: ignore[no-any-return]


def _einsum(g: Graph, x: ir.Value, a: Op, b: Op, eq: str) -> ir.Value:
    (ta, tb), out = split_equation(eq)
    batch = bool(tensor(a).batch or tensor(b).batch)

    def term(letters: str, batched: bool) -> str:
        p = min(g.layout.position, len(letters))
        return letters[:p] + "z" + letters[p:] if batched else letters

    mixed = {tensor(a).batch, tensor(b).batch} == {"b", "c"}
    if mixed and g.layout.position == 0 and g.batch is None:
        # An ellipsis lets one context row serve every row; static graphs have as many of both.
        spec = f"...{ta},...{tb}->...{out}"
    else:
        left, right = term(ta, bool(tensor(a).batch)), term(tb, bool(tensor(b).batch))
        spec = f"{left},{right}->{term(out, batch)}"
    return g("Einsum", x, g.values[b], equation=spec)  # type: ignore[no-any-return]


@lowers(t.LogContract)
def _(g: Graph, n: t.LogContract) -> ir.Value:
    (tx, _), out = split_equation(n.eq)
    lost = [i for i, c in enumerate(tx) if c not in out]
    x = g.values[n.x]
    if not lost:
        y = contract(g, g("Exp", x), n.x, n.w, n.eq)
        return g("Log", y)  # type: ignore[no-any-return]
    axes = [g.layout.axis(n.x, i) for i in lost]
    top = g.guard(g.reduce("ReduceMax", x, axes, keepdims=1))
    scaled = g("Exp", g("Sub", x, top))
    y = g("Log", contract(g, scaled, n.x, n.w, n.eq))
    return g("Add", y, _aligned(g, n, top, tx, out))  # type: ignore[no-any-return]


def _aligned(g: Graph, n: t.LogContract, top: ir.Value, tx: str, out: str) -> ir.Value:
    """Give the shifts, which have x's axes with the lost ones of size 1, the result's axes."""
    kept = [c for c in tx if c in out]
    sizes = dict(zip(tx, tensor(n.x).shape, strict=True))
    want = [sizes[c] if c in kept else 1 for c in out]
    have = [sizes[c] if c in kept else 1 for c in tx]
    lift = not tensor(n.x).batch and bool(tensor(n).batch) and g.layout.position == 1
    if want == have and not lift and [c for c in out if c in kept] == kept:
        return top
    if tensor(n.x).batch:
        want.insert(min(g.layout.position, len(want)), -1)
    elif lift:
        want.insert(1, 1)
    return g.reshape(top, want)


@lowers(t.MaxContract)
def _(g: Graph, n: t.MaxContract) -> ir.Value:
    (tx, tw), out = split_equation(n.eq)
    x = g.values[n.x]
    missing = [i for i, c in enumerate(tw) if c not in tx]
    if missing:
        shift = 1 if tensor(n.x).batch else 0
        p = min(g.layout.position, len(tx))
        x = g("Unsqueeze", x, g.ints(*(i + shift if i >= p else i for i in missing)))
    total = g("Add", _lifted(g, n, n.x, x), _weight(g, n))
    lost = [i for i, c in enumerate(tw) if c not in out]
    p = g.layout.position if tensor(n).batch else len(tw)
    axes = [i + 1 if i >= p else i for i in lost]
    return g.largest(total, axes)


def _weight(g: Graph, n: t.MaxContract) -> ir.Value:
    if isinstance(n.w, t.Const) and tensor(n).batch and g.layout.position == 1:
        return g.const(np.expand_dims(n.w.value.value, 1))
    return _lifted(g, n, n.w, g.values[n.w])


def _lifted(g: Graph, n: Op, x: Op, value: ir.Value) -> ir.Value:
    """Give a value without a batch axis one of size 1, where the batch axis is not the first."""
    if tensor(x).batch or not tensor(n).batch or g.layout.position == 0:
        return value
    return g("Unsqueeze", value, g.ints(1))  # type: ignore[no-any-return]
