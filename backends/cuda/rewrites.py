"""Identities that make a module cheaper to compute here, before anything is matched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.ir.array import Array, joined
from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import split_equation
from pcc.ir.types import HALVES
from pcc.tensor import nn
from pcc.tensor import ops as t

WIDE, PIECE = 1024, 64  # a row from which on a norm is summed in pieces, and their size
LARGEST = 128 << 20  # bytes of a matrix that joins others: larger ones lose nothing by themselves


def rewritten(module: Module) -> Module:
    """Return the module that is compiled."""
    module = module.rewrite(_norm_of_a_row)
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


def _beside(module: Module) -> Iterator[tuple[Op, Op]]:
    """Yield projections of one vector, and each as a part of their one common projection.

    W_1 e, W_2 e, .. are parts of [W_1; W_2; ..] e: a layer of a head has one for each variable, and
    a product of few megabytes takes longer to begin and end than to read its weights.
    """
    found: dict[tuple[Op, str, bool], list[t.Contract]] = {}
    for n in module.nodes():
        if isinstance(n, t.Contract) and isinstance(n.b, t.Const) and _projects(n):
            key = (n.a, n.b.value.dtype, n.b.value.recipe is None)
            found.setdefault(key, []).append(n)
    for (x, _, _), members in found.items():
        if len(members) > 1:
            yield from _parts(x, sorted(members, key=_identity))


def _projects(n: t.Contract) -> bool:
    """Whether `n` is W e for a vector e of each row and a half W whose last axis is lost."""
    assert isinstance(n.b, t.Const)
    array = n.b.value
    (left, right), out = split_equation(n.eq)
    vector = len(left) == 1 and right == out + left
    return vector and array.dtype in HALVES and array.nbytes <= LARGEST and bool(tensor(n.a).batch)


def _identity(n: t.Contract) -> str:
    """Return what orders members alike in every graph, so that graphs share the joined array."""
    assert isinstance(n.b, t.Const)
    recipe = n.b.value.recipe
    return n.b.value.ref if recipe is None else recipe.identity


def _parts(x: Op, members: list[t.Contract]) -> Iterator[tuple[Op, Op]]:
    (width,) = tensor(x).shape
    arrays = []
    for n in members:
        assert isinstance(n.b, t.Const)
        arrays.append(n.b.value.reshaped((n.b.value.size // width, width)))
    whole, at = t.Contract(x, t.Const(joined(arrays)), "d,nd->n"), 0
    for n, array in zip(members, arrays, strict=True):
        rows = tuple(range(at, at + array.shape[0]))
        yield n, t.Reshape(t.Take(whole, 0, rows), tensor(n).shape)
        at += array.shape[0]
