"""Identities that make a module cheaper to compute here, before anything is matched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from pcc.ir.array import Array, joined
from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.ir.places import place, places_of
from pcc.ir.semiring import split_equation
from pcc.ir.types import HALVES, NARROW
from pcc.tensor import nn
from pcc.tensor import ops as t

Projection: TypeAlias = t.Contract | t.ScaledContract
WIDE, PIECE = 1024, 64  # a row from which on a norm is summed in pieces, and their size
LARGEST = 128 << 20  # bytes of a matrix that joins others: larger ones lose nothing by themselves


def rewritten(module: Module) -> Module:
    """Return the module that is compiled."""
    module = module.rewrite(_norm_of_a_row).rewrite(_one_above_another)
    beside = dict(_beside(module))
    return module.rewrite(lambda n, _: beside.get(n)) if beside else module


def _norm_of_a_row(op: Op, _: Uses) -> Op | None:
    """Select, then norm: row s of norm(x) is norm(row s of x), and the others are not needed."""
    match op:
        case t.SelectRow(w=t.Reshape(x=nn.RmsNorm() as norm, shape=shape), sel=sel):
            if shape[-1] != tensor(norm).shape[-1]:
                return None
            row = t.SelectRow(t.Reshape(norm.x, shape), sel)
            return _in_pieces(row, norm) or nn.RmsNorm(row, norm.w, norm.eps)
        case _:
            return None


def _in_pieces(row: Op, norm: nn.RmsNorm) -> Op | None:
    """Return the norm of a wide row as sums of sums: one warp alone would hold the whole row.

    x / sqrt(m) = x exp(-log(m) / 2), m = mean(x^2) + eps.
    """
    width = tensor(row).shape[-1]
    if width < WIDE or width % PIECE:
        return None
    lead = tensor(row).shape[:-1]
    squares = t.Reshape(t.Mul(row, row), (*lead, width // PIECE, PIECE))
    total = t.ReduceSum(t.ReduceSum(squares, len(lead) + 1), len(lead))
    one = (1,) * len(lead)
    mean = t.Add(t.Mul(total, _number(1.0 / width, one)), _number(norm.eps, one))
    root = t.Exp(t.Mul(t.Log(mean), _number(-0.5, one)))
    scaled = t.Mul(row, t.Reshape(root, (*lead, 1)))
    return t.Mul(scaled, t.Reshape(norm.w, (*one, width)))


def _number(value: float, shape: tuple[int, ...]) -> Op:
    return t.Const(Array.of(np.full(shape, value, np.float32)))


def _one_above_another(op: Op, uses: Uses) -> Op | None:
    """Join: W_1 e, W_2 e, .. one above another are [W_1; W_2; ..] e, and no copies of each."""
    if not isinstance(op, t.Concat) or op.axis != 0:
        return None
    parts = [x for x in op.xs if isinstance(x, t.Contract) and uses[x] == 1 and _projects(x)]
    if len(parts) != len(op.xs) or len({(x.a, x.eq, _array(x.b).dtype) for x in parts}) > 1:
        return None
    (_, right), out = split_equation(parts[0].eq)
    arrays = [_array(x.b) for x in parts]
    if right[0] != out[0] or len({a.recipe is None for a in arrays}) > 1:
        return None
    whole = t.Contract(parts[0].a, t.Const(joined(arrays)), parts[0].eq)
    place(whole, places_of(parts))
    return whole


def _beside(module: Module) -> Iterator[tuple[Op, Op]]:
    """Yield projections of one vector, and each as a part of their one common projection.

    W_1 e, W_2 e, .. are parts of [W_1; W_2; ..] e: a layer of a head has one for each variable, and
    a product of few megabytes takes longer to begin and end than to read its weights.
    """
    found: dict[tuple[Op, str, str, bool], list[Projection]] = {}
    for n in module.nodes():
        if isinstance(n, t.Contract | t.ScaledContract) and _projects(n):
            array = _array(n.b)
            rounded = n.dtype if isinstance(n, t.ScaledContract) else array.dtype
            found.setdefault((n.a, array.dtype, rounded, array.recipe is None), []).append(n)
    for (x, *_), members in found.items():
        if len(members) > 1:
            yield from _parts(x, sorted(members, key=_identity))


def _projects(n: Projection) -> bool:
    """Whether `n` is W e for a vector e of each row and a narrow W whose last axis is lost."""
    if not isinstance(n.b, t.Const) or not tensor(n.a).batch:
        return False
    if isinstance(n, t.ScaledContract) and not isinstance(n.scale, t.Const):
        return False
    array = n.b.value
    (left, right), out = split_equation(n.eq)
    vector = len(left) == 1 and right == out + left
    return vector and array.dtype in NARROW and array.nbytes <= LARGEST


def _array(b: Op) -> Array:
    assert isinstance(b, t.Const)
    return b.value


def _identity(n: Projection) -> str:
    """Return what orders members alike in every graph, so that graphs share the joined array."""
    array = _array(n.b)
    return array.ref if array.recipe is None else array.recipe.identity


def _parts(x: Op, members: list[Projection]) -> Iterator[tuple[Op, Op]]:
    (width,) = tensor(x).shape
    arrays = [_array(n.b) for n in members]
    arrays = [a.reshaped((a.size // width, width)) for a in arrays]
    b = t.Const(joined(arrays))
    whole: Op = t.Contract(x, b, "d,nd->n") if b.value.dtype in HALVES else _scaled(x, b, members)
    place(whole, places_of(members))
    at = 0
    for n, array in zip(members, arrays, strict=True):
        rows = tuple(range(at, at + array.shape[0]))
        yield n, t.Reshape(t.Take(whole, 0, rows), tensor(n).shape)
        at += array.shape[0]


def _scaled(x: Op, b: Op, members: list[Projection]) -> Op:
    """Return the common projection of integers, each row with the scale that it had."""
    both = [(n.scale, n.dtype) for n in members if isinstance(n, t.ScaledContract)]
    scale = joined([a.reshaped((a.size,)) for a in (_array(s) for s, _ in both)])
    return t.ScaledContract(x, b, t.Const(scale), "d,nd->n", both[0][1])
