"""Every tensor op: its value against loops over unequal sizes, what it must reject, its text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import Array
from pcc.ir.core import OPS, Op
from pcc.ir.module import Module
from pcc.ir.semiring import Semiring
from pcc.ir.types import Tensor
from pcc.ir.verify import verify
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
ROWS = 3
RNG = np.random.default_rng(7)


def real(*shape: int) -> Values:
    return RNG.normal(size=shape)


EIGHT = t.Const(Array.of(RNG.integers(-127, 128, (2, 4, 3)), "i8"))
STEPS = t.Const(Array.of(RNG.uniform(1e-3, 1e-2, (2, 4))))


def scaled(x: Values) -> Values:
    q, s = EIGHT.value.value.tolist(), STEPS.value.value.tolist()
    return np.array(
        [
            [sum(x[f][i] * q[f][o][i] * s[f][o] for i in range(3)) for f in range(2)]
            for o in range(4)
        ]
    )


def mass(*shape: int) -> Values:
    return RNG.uniform(0.1, 1, shape) * (RNG.random(shape) < 0.8)


def whole(*shape: int, below: int = 5) -> Values:
    return RNG.integers(0, below, shape)


def truth(*shape: int) -> Values:
    return RNG.random(shape) < 0.5


@dataclass
class Case:
    """An op over operands of these shapes, and its value for one row, computed by loops."""

    build: Callable[..., Op]
    direct: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., Values] | tuple[Callable[..., Values], ...] = real
    special: tuple[float, ...] = field(default=())  # written over the first elements


def each(f: Callable[..., Any]) -> Callable[..., Values]:
    """Apply f element by element, axes of size 1 stretching."""

    def apply(*xs: Values) -> Values:
        shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in xs), strict=True))
        out = np.empty(shape, object)
        for i in np.ndindex(*shape):
            at = [x[tuple(0 if n == 1 else j for j, n in zip(i, x.shape, strict=True))] for x in xs]
            out[i] = f(*at)
        return np.array(out.tolist()).reshape(shape)

    return apply


def along(axis: int, f: Callable[[list[Any]], Any]) -> Callable[[Values], Values]:
    """Apply f to the list of elements along an axis; f may return a number or a list."""

    def apply(x: Values) -> Values:
        moved = np.moveaxis(x, axis, -1)
        rows = [f(list(r)) for r in moved.reshape(-1, moved.shape[-1])]
        if not isinstance(rows[0], list):
            return np.array(rows).reshape(moved.shape[:-1])
        return np.moveaxis(np.array(rows).reshape(*moved.shape[:-1], -1), -1, axis)

    return apply


def softmax(xs: list[float]) -> list[float]:
    if all(v == -math.inf for v in xs):
        return [1 / len(xs)] * len(xs)
    e = [math.exp(v) for v in xs]
    return [v / sum(e) for v in e]


def log(v: float) -> float:
    return math.log(v) if v > 0 else -math.inf


def contract(eq: str, total: Callable[[list[float]], float] = sum, join: Any = None) -> Any:
    """Sum (or `total`) of products (or `join`) over all assignments to the letters."""
    ins, out = eq.split("->")
    terms = ins.split(",")
    join = join or (lambda a, b: a * b)

    def apply(a: Values, b: Values) -> Values:
        size = {
            c: n
            for t, x in zip(terms, (a, b), strict=True)
            for c, n in zip(t, x.shape, strict=True)
        }
        gone = [c for c in size if c not in out]
        y = np.empty([size[c] for c in out])
        for i in np.ndindex(*y.shape):
            fixed, parts = dict(zip(out, i, strict=True)), []
            for j in itertools.product(*(range(size[c]) for c in gone)):
                at = {**fixed, **dict(zip(gone, j, strict=True))}
                parts.append(
                    join(*(x[tuple(at[c] for c in t)] for t, x in zip(terms, (a, b), strict=True)))
                )
            y[i] = total(parts)
        return y

    return apply


def lse(xs: list[float]) -> float:
    return log(sum(math.exp(v) for v in xs))


def inverse_cdf(m: Values, u: Values) -> Values:
    out = []
    for row, level in zip(m, u, strict=True):
        possible = [j for j, v in enumerate(row) if v > 0]
        hits = [j for j in possible if sum(row[: j + 1]) > level * sum(row)]
        out.append((hits or possible[-1:] or [0])[0])
    return np.array(out)


def followed(maps: Values, start: Values) -> list[int]:
    out, state = [], int(start[0])
    for row in maps:
        state = int(row[state])
        out.append(state)
    return out


def running(exclusive: bool) -> Callable[[list[float]], list[float]]:
    return lambda xs: [sum(xs[: j + (not exclusive)]) for j in range(len(xs))]


INF = math.inf
CASES: dict[str, Case] = {
    "t.reshape": Case(lambda x: t.Reshape(x, (3, 4)), lambda x: list(x.flat), ((2, 6),)),
    "t.transpose": Case(
        lambda x: t.Transpose(x, (2, 0, 1)),
        lambda x: [[[x[a, b, c] for b in range(3)] for a in range(2)] for c in range(4)],
        ((2, 3, 4),),
    ),
    "t.take": Case(
        lambda x: t.Take(x, 1, (2, 0, 2, 1)),
        lambda x: [[r[j] for j in (2, 0, 2, 1)] for r in x],
        ((2, 3),),
    ),
    "t.concat": Case(
        lambda a, b: t.Concat((a, b, a), 1),
        lambda a, b: [[*r, *q, *r] for r, q in zip(a, b, strict=True)],
        ((2, 3), (2, 4)),
    ),
    "t.expand": Case(
        lambda x, y: t.Expand(x, y, (2, 5)), lambda x, y: [[r[0]] * 5 for r in x], ((2, 1), (3,))
    ),
    "t.add": Case(t.Add, each(lambda a, b: a + b), ((2, 3), (1, 3))),
    "t.sub": Case(
        t.Sub,
        each(lambda a, b: -INF if a == -INF else a - b),
        ((2, 3), (2, 3)),
        special=(-INF, 2.0),
    ),
    "t.mul": Case(t.Mul, each(lambda a, b: a * b), ((2, 1), (2, 3))),
    "t.div": Case(t.Div, each(lambda a, b: a / b if b > 0 else 0), ((2, 3), (2, 3)), mass),
    "t.less": Case(t.Less, each(lambda a, b: a < b), ((2, 3), (2, 1)), whole),
    "t.equal": Case(t.Equal, each(lambda a, b: a == b), ((2, 3), (2, 1)), whole),
    "t.and": Case(t.And, each(lambda a, b: a and b), ((4, 3), (4, 3)), truth),
    "t.or": Case(t.Or, each(lambda a, b: a or b), ((4, 3), (4, 3)), truth),
    "t.not": Case(t.Not, each(lambda a: not a), ((4, 3),), truth),
    "t.exp": Case(t.Exp, each(math.exp), ((2, 3),), special=(-INF,)),
    "t.log": Case(t.Log, each(log), ((2, 5),), mass, special=(0.0,)),
    "t.softmax": Case(t.Softmax, along(-1, softmax), ((2, 3),), special=(-INF,) * 3),
    "t.log_softmax": Case(
        t.LogSoftmax, along(-1, lambda r: [v - lse(r) for v in r]), ((2, 3),), special=(-INF,)
    ),
    "t.cast": Case(lambda x: t.Cast(x, "i64"), each(int), ((2, 3),), truth),
    "t.where": Case(
        t.Where, each(lambda c, a, b: a if c else b), ((2, 3), (1, 3), (2, 1)), (truth, real, real)
    ),
    "t.reduce_sum": Case(lambda x: t.ReduceSum(x, 1), along(1, sum), ((2, 4, 3),)),
    "t.reduce_prod": Case(lambda x: t.ReduceProd(x, 0), along(0, math.prod), ((4, 3),)),
    "t.reduce_max": Case(lambda x: t.ReduceMax(x, 1), along(1, max), ((2, 4, 3),)),
    "t.reduce_lse": Case(
        lambda x: t.ReduceLse(x, 1), along(1, lse), ((2, 3),), special=(-INF, -INF, -INF, -INF)
    ),
    "t.cumsum": Case(lambda x: t.Cumsum(x, 0, True), along(0, running(True)), ((4, 3),)),
    "t.cumprod": Case(
        lambda x: t.CumProd(x, 1),
        along(1, lambda r: [math.prod(r[:j]) for j in range(len(r))]),
        ((3, 4),),
    ),
    "t.contract": Case(
        lambda a, b: t.Contract(a, b, "fi,foi->of"), contract("fi,foi->of"), ((2, 3), (2, 4, 3))
    ),
    "t.scaled_contract": Case(
        lambda x: t.ScaledContract(x, EIGHT, STEPS, "fi,foi->of", "f32"), scaled, ((2, 3),)
    ),
    "t.log_contract": Case(
        lambda x, w: t.LogContract(x, w, "fi,foi->fo"),
        contract("fi,foi->fo", lambda p: log(sum(p)), lambda x, w: w * math.exp(x)),
        ((2, 3), (2, 4, 3)),
        (real, mass),
        special=(-INF,),
    ),
    "t.max_contract": Case(
        lambda x, w: t.MaxContract(x, w, "fi,foi->of"),
        contract("fi,foi->of", max, lambda x, w: x + w),
        ((2, 3), (2, 4, 3)),
    ),
    "t.column": Case(
        lambda x: t.Column(x, 3), each(lambda v: 1 + min(max(v, -1), 3)), ((7,),), whole, (-4, 3, 9)
    ),
    "t.floor_div": Case(
        lambda x: t.FloorDiv(x, 3), each(lambda v: v // 3), ((7,),), lambda n: whole(n, below=20)
    ),
    "t.remainder": Case(
        lambda x: t.Remainder(x, 3), each(lambda v: v % 3), ((7,),), lambda n: whole(n, below=20)
    ),
    "t.lookup": Case(
        t.Lookup,
        lambda p, x: [[p[f, k, x[f]] for k in range(3)] for f in range(2)],
        ((2, 3, 5), (2,)),
        (real, whole),
    ),
    "t.select_row": Case(
        t.SelectRow,
        lambda w, s: [list(w[f, s[f]]) for f in range(2)],
        ((2, 5, 3), (2,)),
        (real, whole),
    ),
    "t.argmax": Case(
        t.ArgMax, along(-1, lambda r: r.index(max(r))), ((2, 5),), lambda *n: whole(*n, below=3)
    ),
    "t.inverse_cdf": Case(
        t.InverseCdf, inverse_cdf, ((4, 5), (4,)), (mass, lambda n: RNG.random(n)), (0,) * 5
    ),
    "t.trajectory": Case(t.Trajectory, followed, ((4, 5), (1,)), whole),
}
MORE: dict[str, Case] = {
    "t.cumsum": Case(lambda x: t.Cumsum(x, 1, False), along(1, running(False)), ((2, 4),)),
    "t.contract": Case(lambda a, b: t.Contract(a, b, "i,j->ji"), contract("i,j->ji"), ((2,), (3,))),
    "t.cast": Case(lambda x: t.Cast(x, "bool"), each(bool), ((2, 3),), whole),
    "t.add": Case(t.Add, each(lambda a, b: a + b), ((2, 3), (2, 3)), whole),
}
ALL = [*CASES.items(), *MORE.items()]
DTYPE = {"f": "f32", "i": "i64", "b": "bool"}


def operands(case: Case, rows: tuple[int | None, ...]) -> list[Values]:
    """Draw one array per operand: `rows` leading rows, or none."""
    makers = case.make if isinstance(case.make, tuple) else (case.make,) * len(case.shapes)
    out = []
    for maker, shape, r in zip(makers, case.shapes, rows, strict=True):
        x = np.stack([maker(*shape) for _ in range(r or 1)])
        if case.special:
            flat = x.reshape(len(x), -1)
            m = min(len(case.special), flat.shape[1])
            flat[0, :m] = case.special[:m]
            x = flat.reshape(x.shape)
        if x.dtype.kind == "f":
            x = x.astype(np.float32).astype(np.float64)
        out.append(x if r else x[0])
        case = Case(case.build, case.direct, case.shapes, case.make)  # the first operand only
    return out


def node(case: Case, xs: list[Values], batches: str) -> Op:
    """Build the op over constants ('-') and inputs of batch axis 'b' or 'c'."""
    made: list[Op] = []
    for i, (x, shape, batch) in enumerate(zip(xs, case.shapes, batches, strict=True)):
        dtype = DTYPE[x.dtype.kind]
        constant = batch == "-"
        made.append(t.Const(Array.of(x)) if constant else t.Input(f"x{i}", dtype, batch, shape))
    return case.build(*made)


def ways(count: int) -> list[str]:
    return ["-" * count, "b" * count, "c" * count, *(["b-", "-b", "cb"] if count == 2 else [])]


@pytest.mark.parametrize(("name", "case"), ALL, ids=[f"{k}-{i}" for i, (k, _) in enumerate(ALL)])
def test_value(name: str, case: Case) -> None:
    for batches in ways(len(case.shapes)):
        rows = tuple({"-": None, "b": ROWS, "c": 1}[b] for b in batches)
        xs = operands(case, rows)
        op = node(case, xs, batches)
        assert op.name == name
        env = {f"x{i}": x for i, (x, r) in enumerate(zip(xs, rows, strict=True)) if r}
        (got,) = run((op,), env, Semiring())
        kind = op.type
        assert isinstance(kind, Tensor)
        assert got.shape[got.ndim - len(kind.shape) :] == kind.shape
        assert DTYPE[got.dtype.kind] == kind.dtype
        assert kind.batch == max(batches, key="-cb".index).replace("-", "")
        for r in range(max(k or 1 for k in rows)):
            pick = [x if k is None else x[r % k] for x, k in zip(xs, rows, strict=True)]
            want = np.array(case.direct(*pick)).reshape(kind.shape)
            at = got if not kind.batch else got[r]
            assert np.allclose(at, want, rtol=1e-12, atol=1e-15), (batches, r)


@pytest.mark.parametrize(("name", "case"), ALL, ids=[f"{k}-{i}" for i, (k, _) in enumerate(ALL)])
def test_text_and_back(name: str, case: Case) -> None:
    for batches in ways(len(case.shapes)):
        xs = operands(case, tuple(None if b == "-" else 1 for b in batches))
        m = Module("m", (), (("y", node(case, xs, batches)),))
        verify(m)
        again = parse(show(m), resources=resources(m))
        assert again.roots[0] is m.roots[0]
        assert name in show(m)


def test_leaves() -> None:
    value = real(2, 3).astype(np.float32)
    const = t.Const(Array.of(value))
    assert np.array_equal(run((const,), {}, Semiring())[0], value)
    x = t.Input("x", "f32", "b", (3,))
    assert np.array_equal(run((x,), {"x": value}, Semiring())[0], value)
    for wrong in ({}, {"x": value[0]}, {"x": value[:, :2]}):
        with pytest.raises(PccError, match="E403"):
            run((x,), wrong, Semiring())


def test_every_op_of_the_level_is_covered() -> None:
    here = {name for name, op in OPS.items() if vars(t).get(op.__name__) is op}
    assert set(CASES) | {"t.const", "t.input"} == here


def test_a_value_beyond_memory_is_refused() -> None:
    one = t.Const(Array.of(np.ones(1, np.float32)))
    row = t.Input("x", "f32", "b", (1,))
    wide = t.Exp(t.Expand(row, row, (1 << 40,)))
    for huge in (t.Exp(t.Expand(one, one, (1 << 40,))), wide):
        with pytest.raises(PccError, match="E405") as e:
            run((huge,), {"x": np.ones((2, 1))}, Semiring())
        assert e.value.hint
