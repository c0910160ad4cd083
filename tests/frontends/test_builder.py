"""The builder: what each call means, by enumeration, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.frontends.builder import Builder
from pcc.interp.brute import Joint
from pcc.interp.run import log_value
from pcc.ir.core import Op
from pcc.ir.verify import verify


def test_a_circuit_by_hand() -> None:
    """p(x, y, z) = (0.3 a0 b0 + 0.7 a1 b1) c + ..., loop by loop."""
    b = Builder([2, 3, 2])
    pa, pb = [[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]]
    x, y, z = b.categorical(0, pa), b.categorical(1, pb), b.bernoulli(2, 0.75)
    w, v, h = [[0.25, 0.75]], [[0.125, 0.25, 0.125, 0.5]], [0.5, 0.5]
    joint = b.sum([b.sum(b.product(x, y), w), b.sum(b.kronecker(x, y), v)], h)
    circuit = b.circuit(b.product(joint, z), name="by-hand")
    verify(circuit.module(), stage="circuit")
    table = Joint(circuit)
    for s, p in zip(table.x, table.p[0], strict=True):
        i, j, k = (int(q) for q in s)
        same = sum(w[0][u] * pa[u][i] * pb[u][j] for u in range(2))
        every = sum(v[0][2 * a + c] * pa[a][i] * pb[c][j] for a in range(2) for c in range(2))
        assert math.isclose(p, (0.5 * same + 0.5 * every) * (0.25, 0.75)[k], rel_tol=1e-12)
    assert math.isclose(table.p.sum(), 1, rel_tol=1e-7)


def test_binomial() -> None:
    b = Builder([5])
    table = Joint(b.circuit(b.sum(b.binomial(0, 4, [0.25, 0.5]), [[0.5, 0.5]])))
    for v, p in enumerate(table.p[0]):
        terms = [math.comb(4, v) * q**v * (1 - q) ** (4 - v) for q in (0.25, 0.5)]
        assert math.isclose(p, sum(terms) / 2, rel_tol=1e-7)


def test_gaussian_mixture_of_mixed_variables() -> None:
    b = Builder([0, 2])
    x, y = b.gaussian(0, [0.5, -1.0], [1.0, 0.25]), b.bernoulli(1, [0.25, 0.5])
    circuit = b.circuit(b.sum(b.product(x, y), [[0.25, 0.75]]))
    for u, v in itertools.product((-1.5, 0.0, 2.0), (0, 1)):
        total = 0.0
        for w, m, s, q in ((0.25, 0.5, 1.0, 0.25), (0.75, -1.0, 0.25, 0.5)):
            density = math.exp(-((u - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))
            total += w * density * (q if v else 1 - q)
        got = log_value(circuit.root, np.array([[u, v]]))
        assert math.isclose(got[0, 0, 0], math.log(total), rel_tol=1e-12, abs_tol=1e-12)


def test_the_mixture_weights_may_differ_by_unit() -> None:
    b = Builder([2])
    p, q = b.categorical(0, [[1, 0], [0, 1]]), b.categorical(0, [[0.5, 0.5], [0.25, 0.75]])
    root = b.sum(b.sum([p, q], [[0.25, 0.75], [0.5, 0.5]]), [[0.5, 0.5]])
    table = Joint(b.circuit(root))
    want = [0.5 * (0.25 + 0.75 * 0.5) + 0.5 * (0.5 * 0.25), 0.5 * 0.75 * 0.5 + 0.5 * (0.5 + 0.375)]
    assert np.allclose(table.p[0], want, rtol=1e-12)


B = Builder([2, 3, 0])


def leaf() -> Op:
    return B.categorical(0, [[0.5, 0.5], [0.5, 0.5]])


WRONG: list[tuple[str, str, Callable[[], object]]] = [
    ("cardinality one", "B101", lambda: Builder([1])),
    ("cardinality below zero", "B101", lambda: Builder([-2])),
    ("no such variable", "B104", lambda: B.categorical(3, [1, 0])),
    ("negative variable", "B104", lambda: B.categorical(-1, [1, 0])),
    ("table of a continuous variable", "B104", lambda: B.categorical(2, [1, 0])),
    ("density of a finite variable", "B104", lambda: B.gaussian(0, 0, 1)),
    ("table too narrow", "B102", lambda: B.categorical(1, [0.5, 0.5])),
    ("table of three axes", "B102", lambda: B.categorical(0, [[[0.5, 0.5]]])),
    ("words", "B102", lambda: B.categorical(0, ["a", "b"])),
    ("ragged", "B102", lambda: B.categorical(0, [[0.5, 0.5], [1]])),
    ("negative", "B103", lambda: B.categorical(0, [1.5, -0.5])),
    ("NaN", "B103", lambda: B.categorical(0, [math.nan, 1])),
    ("beyond 32 bits", "B103", lambda: B.categorical(0, [1e39, 1])),
    ("a huge integer", "B102", lambda: B.categorical(0, [10**400, 1])),
    ("chance above one", "B103", lambda: B.bernoulli(0, 1.5)),
    ("chances of two axes", "B103", lambda: B.bernoulli(0, [[0.5, 0.5]])),
    ("no trials", "B103", lambda: B.binomial(0, 0, 0.5)),
    ("too many trials", "B103", lambda: B.binomial(0, 10**6, 0.5)),
    ("trials of another cardinality", "B102", lambda: B.binomial(1, 4, 0.5)),
    ("deviation of zero", "B103", lambda: B.gaussian(2, 0, 0)),
    ("infinite mean", "B103", lambda: B.gaussian(2, math.inf, 1)),
    ("words for a mean", "B102", lambda: B.gaussian(2, "a", 1)),
    ("unequal parameters", "B102", lambda: B.gaussian(2, [0, 1], [1, 1, 1])),
    ("parameters of two axes", "B102", lambda: B.gaussian(2, [[0]], [[1]])),
    ("no operands", "B102", lambda: B.product()),
    ("no mixture", "B102", lambda: B.sum([], [])),
    ("weights of another width", "B102", lambda: B.sum(leaf(), [[1, 1, 1]])),
    ("weights of another mixture", "B102", lambda: B.sum([leaf(), leaf()], [1, 1, 1])),
    ("a scalar weight", "B102", lambda: B.sum([leaf()], 1)),
    ("overlapping product", "E201", lambda: B.product(leaf(), leaf())),
    ("uneven mixture", "E202", lambda: B.sum([leaf(), B.bernoulli(0, [1, 1]), other()], [1, 1, 1])),
    ("root of many units", "E122", lambda: B.circuit(leaf())),
    ("root over some variables", "E122", lambda: B.circuit(B.categorical(0, [1, 1]))),
    ("a number for a layer", "B102", lambda: B.sum(3, [1])),  # type: ignore[arg-type]
    ("a number among layers", "B102", lambda: B.sum([leaf(), 3], [1, 1])),  # type: ignore[list-item]
    ("a number for a root", "E104", lambda: B.circuit(B.product(3, leaf()))),  # type: ignore[arg-type]
]


def other() -> Op:
    return B.categorical(1, np.ones((2, 3)))


@pytest.mark.parametrize(("what", "code", "build"), WRONG, ids=[w for w, _, _ in WRONG])
def test_wrong_input(what: str, code: str, build: Callable[[], object]) -> None:
    with pytest.raises(PccError) as e:
        build()
    assert e.value.code == code, str(e.value)
