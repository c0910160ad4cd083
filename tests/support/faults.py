"""Faults for pass outputs: one node replaced by one that a wrong rewrite might have made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.ir.core import Op, tensor, units
from pcc.ir.module import Module
from pcc.tensor import ops as t


def faults(m: Module) -> Iterator[tuple[str, Module]]:
    """Yield (what is wrong, the module with that fault), for every node and fault that fits."""
    for node in list(m.nodes()):
        for what, make in _of(node):
            try:
                wrong = make()
            except PccError:
                continue  # ill typed: the op itself refuses the fault
            if wrong is not node and wrong.type == node.type:
                try:
                    yield f"{what} at {node.name}", _replaced(m, node, wrong)
                except PccError:
                    continue  # a reader refuses it


def _replaced(m: Module, node: Op, wrong: Op) -> Module:
    # The fault may contain the node itself: replace readers' operands, not the node everywhere.
    new: dict[Op, Op] = {}
    for n in m.nodes():
        rebuilt = n.with_args(tuple(new[a] for a in n.args))
        new[n] = wrong if n is node else rebuilt
    return m.with_roots(tuple(new[r] for r in m.roots))


def _of(n: Op) -> list[tuple[str, object]]:
    def scaled(w: Op, keep: int) -> Op:
        """Zero all but `keep` entries of the last axis."""
        shape = tensor(w).shape
        mask = np.ones(shape, np.float32)
        mask[..., keep:] = 0.0
        return t.Mul(w, t.Const(mask))  # type: ignore[arg-type]

    def turned(w: Op) -> Op:
        rank = len(tensor(w).shape)
        return t.Transpose(w, (*range(rank - 2), rank - 1, rank - 2))

    def flat(w: Op) -> Op:
        return t.Const(np.ones(tensor(w).shape, np.float32))  # type: ignore[arg-type]

    match n:
        case c.Sum(x=x, w=w):
            return [
                ("wrong axis", lambda: c.Sum(x, turned(w))),
                ("dropped weight", lambda: c.Sum(x, flat(w))),
                ("zeroed branch", lambda: c.Sum(x, scaled(w, tensor(w).shape[-1] - 1))),
            ]
        case c.Cpt(xs=xs, w=w):
            return [
                ("wrong axis", lambda: c.Cpt(xs, turned(w))),
                ("dropped weight", lambda: c.Cpt(xs, flat(w))),
                ("zeroed branch", lambda: c.Cpt(xs, scaled(w, tensor(w).shape[-1] - 1))),
            ]
        case c.Cp(xs=xs, ws=ws):
            return [
                ("swapped operand", lambda: c.Cp(xs, ws[::-1])),
                ("dropped weight", lambda: c.Cp(xs, (flat(ws[0]), *ws[1:]))),
            ]
        case c.Tucker(a=a, b=b, w=w):
            return [
                ("wrong axis", lambda: c.Tucker(a, b, turned(w))),
                ("swapped operand", lambda: c.Tucker(b, a, w)),
                ("zeroed branch", lambda: c.Tucker(a, b, scaled(w, tensor(w).shape[-1] - 1))),
            ]
        case c.Kronecker(a=a, b=b):
            return [("swapped operand", lambda: c.Kronecker(b, a))]
        case c.Mix(xs=xs, w=w):
            return [
                ("swapped operand", lambda: c.Mix(xs[::-1], w)),
                ("zeroed branch", lambda: c.Mix(xs, scaled(w, len(xs) - 1))),
            ]
        case c.Categorical(vars=vs, p=p):
            return [
                ("off-by-one fold", lambda: c.Categorical(vs, _rolled(p))),
                ("swapped operand", lambda: c.Categorical(vs[1:] + vs[:1], p)),
                ("zeroed branch", lambda: c.Categorical(vs, scaled(p, 1))),
            ]
        case c.Gather(x=x, folds=fs):
            count = units(x).folds
            return [("off-by-one fold", lambda: c.Gather(x, tuple((f + 1) % count for f in fs)))]
        case _:
            return _tensor(n)


def _rolled(p: Op) -> Op:
    count = tensor(p).shape[0]
    return t.Take(p, 0, tuple((f + 1) % count for f in range(count)))


def _tensor(n: Op) -> list[tuple[str, object]]:
    match n:
        case t.Take(x=x, axis=axis, indices=rows) if tensor(n).dtype == "f32":
            size = tensor(x).shape[axis]
            up = tuple((r + 1) % size for r in rows)
            return [("off-by-one fold", lambda: t.Take(x, axis, up))]
        case t.Contract(a=a, b=b, eq=eq) | t.LogContract(x=a, w=b, eq=eq):
            kind, log = type(n), isinstance(n, t.LogContract)
            shape = tensor(b).shape
            ones = np.ones(shape, np.float32)
            less = ones.copy()
            less[..., -1] = 0.0
            swap = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
            return [
                ("wrong axis", lambda: kind(a, t.Transpose(b, swap), eq)),
                ("dropped weight", lambda: kind(a, t.Const(ones), eq)),
                ("zeroed branch", lambda: kind(a, t.Mul(b, t.Const(less)), eq)),
                (
                    "wrong log/linear",
                    lambda: kind(t.Exp(a), b, eq) if log else kind(a, t.Log(b), eq),
                ),
            ]
        case t.Mul(a=a, b=b):
            return [
                ("dropped weight", lambda: a if a.type == n.type else b),
                ("wrong log/linear", lambda: t.Add(a, b)),
            ]
        case t.Add(a=a, b=b) if tensor(n).dtype == "f32":
            return [("dropped weight", lambda: a if a.type == n.type else b)]
        case t.Sub(a=a, b=b) if tensor(n).dtype == "f32":
            return [
                ("swapped operand", lambda: t.Sub(b, a)),
                ("dropped weight", lambda: a),
            ]
        case t.Where(cond=cond, a=a, b=b) if tensor(n).dtype == "f32":
            return [("swapped operand", lambda: t.Where(cond, b, a))]
        case t.ReduceLse(x=x, axis=axis):
            return [
                ("wrong log/linear", lambda: t.ReduceSum(x, axis)),
                ("zeroed branch", lambda: t.ReduceMax(x, axis)),
            ]
        case t.ReduceProd(x=x, axis=axis):
            return [("wrong log/linear", lambda: t.ReduceSum(x, axis))]
        case t.CumProd(x=x):
            return [("off-by-one fold", lambda: x)]
        case t.Cumsum(x=x, axis=axis, exclusive=e):
            return [("off-by-one fold", lambda: t.Cumsum(x, axis, not e))]
        case t.LogSoftmax(x=x):
            return [("wrong log/linear", lambda: t.Softmax(x))]
        case t.Log(x=x):
            return [("wrong log/linear", lambda: x)]
        case t.Exp(x=x):
            return [("wrong log/linear", lambda: x)]
        case _:
            return []
