"""Every circuit op, in every carrier, against loops over unequal sizes; what it must reject."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy

from pcc.circuit import ops as c
from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.interp.run import log_value, run
from pcc.ir.array import Array
from pcc.ir.core import OPS, Op, units
from pcc.ir.module import Module
from pcc.ir.semiring import P31, Field, LogReal, MaxPlus, Real, Semiring, Symbolic
from pcc.ir.verify import verify
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
Add = Callable[[list[Any]], Any]
RNG = np.random.default_rng(5)


def leaf(*variables: int, k: int = 2, v: int = 3) -> Op:
    return c.Categorical(
        variables, t.Input(f"p{variables}{k},{v}", "f32", "", (len(variables), k, v))
    )


def weight(*shape: int) -> Op:
    return t.Input(f"w{shape}", "f32", "", shape)


def shape_of(n: Op) -> tuple[int, int]:
    return units(n).folds, units(n).k


def array(shape: tuple[int, int], f: Callable[[int, int], Any]) -> Values:
    out = np.empty(shape, object)
    for i in np.ndindex(*shape):
        out[i] = f(*i)
    return out


@dataclass
class Case:
    """Layers with two folds and unequal unit counts; `direct(add, *operands)` loops."""

    build: Callable[[], Op]
    direct: Callable[..., Values]


def product(xs: Any) -> Any:
    return math.prod(xs)


A, B, D = leaf(0, 1, k=2), leaf(2, 3, k=2), leaf(4, 5, k=2)
E, H = leaf(2, 3, k=4), leaf(0, 1, k=2, v=5)
CASES: dict[str, Case] = {
    "c.sum": Case(
        lambda: c.Sum(A, weight(2, 3, 2)),
        lambda add, x, w: array((2, 3), lambda f, o: add([w[f, o, i] * x[f, i] for i in range(2)])),
    ),
    "c.mix": Case(
        lambda: c.Mix((A, H, A), weight(2, 2, 3)),
        lambda add, *xs: array(
            (2, 2), lambda f, k: add([xs[-1][f, k, h] * xs[h][f, k] for h in range(3)])
        ),
    ),
    "c.hadamard": Case(
        lambda: c.Hadamard((A, B, D)),
        lambda add, *xs: array((2, 2), lambda f, k: product(x[f, k] for x in xs)),
    ),
    "c.kronecker": Case(
        lambda: c.Kronecker(A, E),
        lambda add, a, b: array((2, 8), lambda f, k: a[f, k // 4] * b[f, k % 4]),
    ),
    "c.tucker": Case(
        lambda: c.Tucker(A, E, weight(2, 3, 2, 4)),
        lambda add, a, b, w: array(
            (2, 3),
            lambda f, o: add(
                [w[f, o, i, j] * a[f, i] * b[f, j] for i in range(2) for j in range(4)]
            ),
        ),
    ),
    "c.cpt": Case(
        lambda: c.Cpt((A, B), weight(2, 3, 2)),
        lambda add, a, b, w: array(
            (2, 3), lambda f, o: add([w[f, o, i] * a[f, i] * b[f, i] for i in range(2)])
        ),
    ),
    "c.cp": Case(
        lambda: c.Cp((A, E), (weight(2, 3, 2), weight(2, 3, 4))),
        lambda add, a, b, v, w: array(
            (2, 3),
            lambda f, o: (
                add([v[f, o, i] * a[f, i] for i in range(2)])
                * add([w[f, o, i] * b[f, i] for i in range(4)])
            ),
        ),
    ),
    "c.gather": Case(
        lambda: c.Gather(A, (1, 0, 1)),
        lambda add, x: array((3, 2), lambda g, k: x[(1, 0, 1)[g], k]),
    ),
    "c.concat": Case(
        lambda: c.Concat((A, leaf(7), B)),
        lambda add, a, b, d: array((5, 2), lambda f, k: [*a, *b, *d][f][k]),
    ),
}
LEAVES = ("c.categorical", "c.gaussian")


def evaluate(op: Op, s: Semiring, values: dict[Op, Values]) -> Values:
    env = {"x": np.zeros((1, 9)), "observed": np.ones((1, 9), bool)}
    with np.errstate(divide="ignore"):
        leaves = {n: s.unit(v) if n.name.startswith("c.") else v for n, v in values.items()}
    return run((op,), env, s, leaves)[0]


def drawn(op: Op, draw: Callable[[tuple[int, ...]], Values]) -> dict[Op, Values]:
    return {
        n: draw(shape_of(n) if n.name.startswith("c.") else n.type.shape)  # type: ignore[union-attr]
        for n in dict.fromkeys(op.args)
    }


def positive(shape: tuple[int, ...]) -> Values:
    return RNG.uniform(0.1, 2, shape) * (RNG.random(shape) < 0.85)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "carrier", [Semiring(), Real(), LogReal(), MaxPlus()], ids=lambda s: s.name
)
def test_real_carriers(name: str, carrier: Semiring) -> None:
    op, direct = CASES[name].build(), CASES[name].direct
    assert op.name == name
    add: Add = max if isinstance(carrier, MaxPlus) else sum
    values = drawn(op, positive)
    want = direct(add, *(values[a] for a in op.args)).astype(float)
    got = carrier.linear(evaluate(op, carrier, values))
    assert got.shape == shape_of(op)
    assert np.allclose(np.asarray(got, float), want, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_finite_field(name: str) -> None:
    """Residues close to 2^31, in Python's integers, so that an overflow would show."""
    op, direct = CASES[name].build(), CASES[name].direct
    values = drawn(op, lambda shape: RNG.integers(P31 - 1000, P31, shape))
    whole = {
        n: np.array([int(v) for v in x.flat], object).reshape(x.shape) for n, x in values.items()
    }
    want = direct(sum, *(whole[a] for a in op.args)) % P31
    assert (evaluate(op, Field(), values) == want).all()


@pytest.mark.parametrize("name", CASES)
def test_symbols(name: str) -> None:
    op, direct, count = CASES[name].build(), CASES[name].direct, itertools.count()

    def symbols(shape: tuple[int, ...]) -> Values:
        size = math.prod(shape)
        return np.array([sympy.Symbol(f"v{next(count)}") for _ in range(size)], object).reshape(
            shape
        )

    values = drawn(op, symbols)
    want = direct(sum, *(values[a] for a in op.args))
    got = evaluate(op, Symbolic(), values)
    assert all(sympy.expand(a - b) == 0 for a, b in zip(got.flat, want.flat, strict=True))


@pytest.mark.parametrize("name", ["c.tucker", "c.cpt", "c.cp"])
def test_fused_layers_are_their_expansion(name: str) -> None:
    op = CASES[name].build()
    plain = c.expand(op)
    assert plain is not op
    assert plain.type == op.type
    values = drawn(op, lambda shape: RNG.integers(0, P31, shape))
    assert (evaluate(op, Field(), values) == evaluate(plain, Field(), values)).all()


def test_categorical() -> None:
    p = RNG.uniform(size=(2, 3, 4)).astype(np.float32)
    op = c.Categorical((2, 0), t.Const(Array.of(p)))
    x = np.array([[0, 9, 3], [1, 0, 2], [3, 0, 0], [0, 0, 7], [-1, 0, 0]])
    seen = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 0, 1]], bool)
    (got,) = run((op,), {"x": x, "observed": seen}, Semiring())
    for r, f, k in np.ndindex(5, 2, 3):
        v = (2, 0)[f]
        possible = 0 <= x[r, v] < 4
        entry = float(p[f, k, x[r, v]]) if possible else 0.0
        want = entry if seen[r, v] else math.fsum(float(u) for u in p[f, k])
        assert math.isclose(got[r, f, k], want, rel_tol=1e-12), (r, f, k)


def test_gaussian() -> None:
    mu, sigma = RNG.normal(size=(2, 3)), RNG.uniform(0.5, 2, (2, 3))
    op = c.Gaussian((1, 0), t.Const(Array.of(mu)), t.Const(Array.of(sigma)))
    mu, sigma = mu.astype(np.float32).astype(float), sigma.astype(np.float32).astype(float)
    x, seen = RNG.normal(size=(3, 2)), np.array([[1, 1], [0, 1], [1, 0]], bool)
    got = log_value(op, x, seen)
    for r, f, k in np.ndindex(3, 2, 3):
        v = (1, 0)[f]
        z = (x[r, v] - mu[f, k]) / sigma[f, k]
        want = -z * z / 2 - math.log(sigma[f, k] * math.sqrt(2 * math.pi)) if seen[r, v] else 0.0
        assert math.isclose(got[r, f, k], want, rel_tol=1e-12, abs_tol=1e-12)


def every() -> dict[str, Op]:
    gaussian = c.Gaussian((6,), weight(1, 3), t.Input("s", "f32", "", (1, 3)))
    return {n: x.build() for n, x in CASES.items()} | dict(zip(LEAVES, (A, gaussian), strict=True))


@pytest.mark.parametrize("name", [*CASES, *LEAVES])
def test_text_and_back(name: str) -> None:
    m = Module("m", (5, 5, 3, 3, 3, 3, 0, 3, 3), (("p", every()[name]),))
    text = show(m)
    assert name in text
    assert parse(text, resources=resources(m)).roots[0] is m.roots[0]


def test_sound_layers_verify() -> None:
    for op in every().values():
        verify(Module("m", (3,) * 6 + (0, 3), (("p", op),)))


X, Y = leaf(0, 1), leaf(0)
REJECTED: dict[str, list[tuple[str, Callable[[], Op]]]] = {
    "c.categorical": [
        ("E102", lambda: c.Categorical((0,), weight(2, 2, 3))),
        ("E102", lambda: c.Categorical((), weight(0, 2, 3))),
        ("E102", lambda: c.Categorical((0,), weight(1, 3))),
        ("E102", lambda: c.Categorical((0,), t.Input("i", "i64", "", (1, 2, 3)))),
        ("E106", lambda: c.Categorical((-1,), weight(1, 2, 3))),
        ("E101", lambda: c.Categorical((0,), Y)),
    ],
    "c.gaussian": [
        ("E102", lambda: c.Gaussian((0,), weight(1, 2), weight(1, 3))),
        ("E102", lambda: c.Gaussian((0, 1), weight(1, 2), weight(1, 2))),
        ("E106", lambda: c.Gaussian((-1,), weight(1, 2), weight(1, 2))),
    ],
    "c.sum": [
        ("E102", lambda: c.Sum(X, weight(1, 3, 2))),
        ("E102", lambda: c.Sum(X, weight(2, 3, 3))),
        ("E102", lambda: c.Sum(X, weight(2, 2))),
        ("E101", lambda: c.Sum(weight(2, 2), weight(2, 2))),
    ],
    "c.mix": [
        ("E103", lambda: c.Mix((), weight(1, 2, 0))),
        ("E102", lambda: c.Mix((Y, Y), weight(1, 2, 3))),
        ("E107", lambda: c.Mix((X, Y), weight(2, 2, 2))),
        ("E108", lambda: c.Mix((Y, leaf(0, k=3)), weight(1, 2, 2))),
        ("E202", lambda: c.Mix((Y, leaf(1)), weight(1, 2, 2))),
    ],
    "c.hadamard": [
        ("E103", lambda: c.Hadamard(())),
        ("E107", lambda: c.Hadamard((X, leaf(2)))),
        ("E108", lambda: c.Hadamard((Y, leaf(1, k=3)))),
        ("E201", lambda: c.Hadamard((A, B, leaf(7, 3)))),
    ],
    "c.kronecker": [("E201", lambda: c.Kronecker(Y, Y)), ("E107", lambda: c.Kronecker(X, leaf(2)))],
    "c.tucker": [
        ("E201", lambda: c.Tucker(Y, Y, weight(1, 1, 2, 2))),
        ("E102", lambda: c.Tucker(A, E, weight(2, 3, 4, 2))),
    ],
    "c.cpt": [
        ("E201", lambda: c.Cpt((Y, Y), weight(1, 1, 2))),
        ("E102", lambda: c.Cpt((A, B), weight(2, 1, 3))),
        ("E108", lambda: c.Cpt((A, E), weight(2, 1, 2))),
    ],
    "c.cp": [
        ("E103", lambda: c.Cp((A, B), (weight(2, 1, 2),))),
        ("E108", lambda: c.Cp((A, B), (weight(2, 1, 2), weight(2, 3, 2)))),
        ("E201", lambda: c.Cp((Y, Y), (weight(1, 1, 2),) * 2)),
        ("E102", lambda: c.Cp((A, E), (weight(2, 1, 2),) * 2)),
    ],
    "c.gather": [
        ("E109", lambda: c.Gather(X, (2,))),
        ("E109", lambda: c.Gather(X, (-1,))),
        ("E109", lambda: c.Gather(X, ())),
    ],
    "c.concat": [("E103", lambda: c.Concat(())), ("E108", lambda: c.Concat((Y, leaf(1, k=3))))],
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    for code, build in REJECTED[name]:
        with pytest.raises(PccError) as e:
            build()
        assert e.value.code == code, str(e.value)
        assert name in e.value.what or code == "E101"


def test_every_op_of_the_level_is_covered() -> None:
    here = {name for name, op in OPS.items() if op.__module__ == c.__name__}
    assert {*CASES, *LEAVES} == set(REJECTED) == here
