"""What each tensor op must reject, at the moment it is built."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import OPS, Op
from pcc.tensor import ops as t

F, G = t.Input("f", "f32", "b", (2, 3)), t.Input("g", "f32", "b", (2, 4))
ID, B = t.Input("i", "i64", "b", (2,)), t.Input("t", "bool", "b", (2, 3))
S, E = t.Input("s", "f32", "b", ()), t.Input("e", "f32", "b", (2, 0))
CUBE = t.Input("w", "f32", "", (2, 3, 4))
Q = t.Const(Array.of(np.ones((3, 4), int), "i8"))
K4, K3 = (t.Const(Array.of(np.ones(n))) for n in (4, 3))
REJECTED: dict[str, list[tuple[str, Callable[[], Op]]]] = {
    "t.const": [("E104", lambda: t.Const(Array.of(np.zeros(2, complex))))],
    "t.input": [
        ("E112", lambda: t.Input("x", "f64", "b", ())),
        ("E112", lambda: t.Input("x", "f32", "d", ())),
        ("E104", lambda: t.Input("x", "f32", "b", (True,))),
    ],
    "t.reshape": [("E110", lambda: t.Reshape(F, (5,)))],
    "t.transpose": [("E111", lambda: t.Transpose(F, (0, 0)))],
    "t.take": [
        ("E109", lambda: t.Take(F, 1, (3,))),
        ("E109", lambda: t.Take(F, 1, (-1,))),
        ("E109", lambda: t.Take(F, 1, ())),
        ("E111", lambda: t.Take(F, 2, (0,))),
    ],
    "t.concat": [
        ("E103", lambda: t.Concat((), 0)),
        ("E110", lambda: t.Concat((F, G), 0)),
        ("E110", lambda: t.Concat((F, B), 0)),
    ],
    "t.expand": [("E110", lambda: t.Expand(F, F, (4, 3))), ("E110", lambda: t.Expand(F, F, (3,)))],
    "t.add": [
        ("E110", lambda: t.Add(F, G)),
        ("E110", lambda: t.Add(F, S)),
        ("E112", lambda: t.Add(F, B)),
        ("E112", lambda: t.Add(B, B)),
    ],
    "t.sub": [("E110", lambda: t.Sub(F, G)), ("E112", lambda: t.Sub(B, B))],
    "t.mul": [("E110", lambda: t.Mul(F, G)), ("E112", lambda: t.Mul(B, B))],
    "t.div": [("E110", lambda: t.Div(F, G)), ("E112", lambda: t.Div(B, B))],
    "t.less": [("E110", lambda: t.Less(F, G)), ("E112", lambda: t.Less(B, B))],
    "t.equal": [("E110", lambda: t.Equal(F, G)), ("E112", lambda: t.Equal(F, B))],
    "t.and": [("E112", lambda: t.And(F, F))],
    "t.or": [("E112", lambda: t.Or(F, F))],
    "t.not": [("E112", lambda: t.Not(F))],
    "t.exp": [("E112", lambda: t.Exp(B))],
    "t.log": [("E112", lambda: t.Log(ID))],
    "t.softmax": [
        ("E112", lambda: t.Softmax(B)),
        ("E110", lambda: t.Softmax(S)),
        ("E110", lambda: t.Softmax(E)),
    ],
    "t.log_softmax": [("E112", lambda: t.LogSoftmax(B)), ("E110", lambda: t.LogSoftmax(S))],
    "t.cast": [("E112", lambda: t.Cast(F, "f16"))],
    "t.where": [
        ("E112", lambda: t.Where(F, F, F)),
        ("E112", lambda: t.Where(B, F, B)),
        ("E110", lambda: t.Where(B, F, G)),
    ],
    "t.reduce_sum": [("E111", lambda: t.ReduceSum(F, 2)), ("E112", lambda: t.ReduceSum(B, 0))],
    "t.reduce_prod": [("E111", lambda: t.ReduceProd(F, -1)), ("E110", lambda: t.ReduceProd(E, 1))],
    "t.reduce_max": [("E111", lambda: t.ReduceMax(F, 2)), ("E110", lambda: t.ReduceMax(E, 1))],
    "t.reduce_lse": [("E111", lambda: t.ReduceLse(F, 2)), ("E112", lambda: t.ReduceLse(ID, 0))],
    "t.cumsum": [("E111", lambda: t.Cumsum(F, 2, True)), ("E112", lambda: t.Cumsum(B, 0, True))],
    "t.cumprod": [("E111", lambda: t.CumProd(F, 2)), ("E112", lambda: t.CumProd(B, 0))],
    "t.contract": [
        ("E113", lambda: t.Contract(F, F, "ab")),
        ("E113", lambda: t.Contract(F, F, "ab,ab,ab->a")),
        ("E113", lambda: t.Contract(F, G, "ab,ab->a")),
        ("E113", lambda: t.Contract(F, F, "aa,ab->a")),
        ("E113", lambda: t.Contract(F, F, "abc,ab->a")),
        ("E113", lambda: t.Contract(F, F, "ab,ab->c")),
        ("E113", lambda: t.Contract(F, F, "ab,ab->aa")),
        ("E113", lambda: t.Contract(F, F, ".b,.b->b")),
        ("E112", lambda: t.Contract(B, B, "ab,ab->a")),
        ("E112", lambda: t.Contract(F, ID, "ab,a->b")),
    ],
    "t.scaled_contract": [
        ("E112", lambda: t.ScaledContract(F, F, K4, "nd,dk->nk", "f32")),
        ("E112", lambda: t.ScaledContract(ID, Q, K4, "nd,dk->nk", "f32")),
        ("E112", lambda: t.ScaledContract(F, Q, K4, "nd,dk->nk", "i8")),
        ("E112", lambda: t.ScaledContract(F, Q, ID, "nd,dk->nk", "f32")),
        ("E110", lambda: t.ScaledContract(F, Q, K3, "nd,dk->nk", "f32")),
        (
            "E110",
            lambda: t.ScaledContract(F, Q, t.Input("s", "f32", "b", (4,)), "nd,dk->nk", "f32"),
        ),
        ("E113", lambda: t.ScaledContract(F, Q, K4, "nd,kd->nk", "f32")),
    ],
    "t.log_contract": [
        ("E113", lambda: t.LogContract(F, G, "ab,ab->a")),
        ("E112", lambda: t.LogContract(F, ID, "ab,a->b")),
    ],
    "t.max_contract": [
        ("E113", lambda: t.MaxContract(F, G, "ab,ab->a")),
        ("E112", lambda: t.MaxContract(ID, ID, "a,a->a")),
    ],
    "t.column": [("E112", lambda: t.Column(F, 3)), ("E110", lambda: t.Column(ID, 0))],
    "t.floor_div": [("E112", lambda: t.FloorDiv(F, 3)), ("E110", lambda: t.FloorDiv(ID, 0))],
    "t.remainder": [("E112", lambda: t.Remainder(F, 3)), ("E110", lambda: t.Remainder(ID, 0))],
    "t.lookup": [("E110", lambda: t.Lookup(CUBE, F)), ("E110", lambda: t.Lookup(F, ID))],
    "t.select_row": [("E110", lambda: t.SelectRow(CUBE, F)), ("E110", lambda: t.SelectRow(F, ID))],
    "t.argmax": [("E110", lambda: t.ArgMax(S)), ("E110", lambda: t.ArgMax(E))],
    "t.inverse_cdf": [
        ("E110", lambda: t.InverseCdf(F, F)),
        ("E112", lambda: t.InverseCdf(F, ID)),
        ("E112", lambda: t.InverseCdf(B, S)),
    ],
    "t.trajectory": [
        ("E112", lambda: t.Trajectory(F, ID)),
        ("E110", lambda: t.Trajectory(ID, ID)),
        ("E110", lambda: t.Trajectory(t.Reshape(ID, (1, 2)), ID)),
        ("E112", lambda: t.Trajectory(t.Reshape(ID, (1, 2)), F)),
    ],
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    for code, build in REJECTED[name]:
        with pytest.raises(PccError) as e:
            build()
        assert e.value.code == code, str(e.value)


def test_every_op_rejects_something() -> None:
    assert set(REJECTED) == {name for name, op in OPS.items() if vars(t).get(op.__name__) is op}
