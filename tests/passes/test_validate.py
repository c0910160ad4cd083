"""Comparisons judge values far below the smallest float, and see what differs there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from laws import const

import pcc
from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.driver import query_module
from pcc.frontends import templates
from pcc.interp.logs import run_logs
from pcc.interp.run import log_value, run
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import LogReal, Real
from pcc.passes.expand_query import ExpandQuery
from pcc.passes.manager import Exact, Notes
from pcc.passes.shared import SHARED, share
from pcc.passes.to_tensor import ToTensor
from pcc.passes.validate import Mismatch, cases, compare
from pcc.tensor import ops as t


def numbers(a: object) -> Op:
    return t.Const(np.asarray(a, np.float32))  # type: ignore[arg-type]


def small(n: int, p: float) -> Circuit:
    """A mixture of two products of n factors near p: p^n is no float64 for n = 40."""
    tables = numbers(np.stack([[[p, 1 - p], [p / 2, 1 - p / 2]]] * n))
    x = c.Categorical(tuple(range(n)), tables)
    root = c.Sum(c.Hadamard(tuple(c.Gather(x, (i,)) for i in range(n))), numbers([[[0.25, 0.75]]]))
    return Circuit(root, (2,) * n)


@pytest.mark.parametrize("query", ["loglik", "prefix", "conditionals", "univariate"])
def test_products_beyond_float64_are_compared(query: str) -> None:
    circuit = small(40, 1e-12)
    assert log_value(circuit.root, np.zeros((1, 40), np.int64))[0, 0, 0] < -1000
    queried = query_module(circuit, circuit.root, query)[0]
    primitive = ExpandQuery().run(queried, Notes())
    lowered = ToTensor(scale=False).run(primitive, Notes())
    env = {"x": np.zeros((3, 40), np.int64), "observed": np.ones((3, 40), bool)}
    for before, after in ((queried, primitive), (primitive, lowered)):
        if before.roots != after.roots:
            assert compare(before, after, Exact.ROUNDING, 1e-9, env) < 1e-9


def test_half_a_value_of_1e_minus_480_is_seen() -> None:
    right, wrong = small(40, 1e-12), small(40, 1e-12)
    root = wrong.root
    assert isinstance(root, c.Sum)
    wrong = Circuit(c.Sum(root.x, numbers([[[0.125, 0.75]]])), wrong.cards)
    env = {"x": np.zeros((3, 40), np.int64)}
    one, two = (query_module(m, m.root, "loglik")[0] for m in (right, wrong))
    with pytest.raises(Mismatch):
        compare(one, two, Exact.ROUNDING, 1e-9, env)


def test_logs_agree_with_linear_arithmetic_where_it_fits() -> None:
    circuit = templates.btree(4, 3, 5, context=2, repetitions=2)
    for query in ("loglik", "conditionals", "univariate", "mode", "sample", "draft"):
        m = query_module(circuit, circuit.root, query)[0]
        m = ToTensor().run(ExpandQuery().run(m, Notes()), Notes())
        env = next(cases(m, m))
        for a, b in zip(run_logs(m.roots, env), run(m.roots, env, Real()), strict=True):
            np.testing.assert_allclose(a, b.astype(a.dtype), rtol=1e-9)


def test_a_zero_weight_at_the_largest_term_hides_nothing() -> None:
    x = np.array([[[0.0, -2000.0]], [[-5.0, -6.0]], [[-np.inf, -np.inf]]])
    w = np.array([[[0.0, 1.0], [0.5, 0.5]]])
    got = LogReal().contract("foi,fi->fo", w, x)[:, 0]
    want = [[-2000.0, np.log(0.5)], [-6.0, np.log(0.5 * (np.exp(-5) + np.exp(-6)))], [-np.inf] * 2]
    np.testing.assert_allclose(got, want)


def test_affine_maps_that_both_sides_hold_become_inputs() -> None:
    circuit = templates.cp(3, 2, 4, context=5)
    m = query_module(circuit, circuit.root, "loglik")[0]
    first, second = share(m, ExpandQuery().run(m, Notes()))
    keys = {n.key for n in first.nodes() if isinstance(n, t.Input)}
    assert keys == {"x", f"{SHARED}0", f"{SHARED}1"}
    assert {n.key for n in second.nodes() if isinstance(n, t.Input)} == keys
    other = templates.cp(3, 2, 4, context=5, seed=1)  # other weights are not shared
    with pytest.raises(Mismatch):
        compare(m, query_module(other, other.root, "loglik")[0], Exact.ROUNDING, 1e-9)


def test_parameters_without_a_stand_in_are_compared_as_reals() -> None:
    z = t.Input("context", "f32", "c", (2,))

    def table(*folds: int, seed: int = 1) -> Op:
        logits = t.Reshape(t.Contract(z, const(2, 6, seed=seed), "d,dn->n"), (2, 1, 3))
        return t.Softmax(t.Take(logits, 0, folds))

    def over(p: Op) -> Module:
        return Module("m", (3, 3), (("p", c.Categorical((0, 1), p)),))

    joined = over(t.Concat((table(0), table(1)), 0))
    assert compare(over(table(0, 1)), joined, Exact.POLYNOMIAL, 1e-9) < 1e-9
    for wrong in (table(1, 0), table(0, 1, seed=2)):
        with pytest.raises(Mismatch):
            compare(over(table(0, 1)), over(wrong), Exact.POLYNOMIAL, 1e-9)


def test_an_impossible_value_and_a_context_for_each_row_are_among_the_cases() -> None:
    circuit = templates.hmm(3, 2, 4, context=2)
    m = query_module(circuit, circuit.root, "marginal")[0]
    first, second, third = cases(*share(m, m))
    assert (first["x"] == 4).any()
    assert len(first[f"{SHARED}0"]) == len(first["x"]) > len(second[f"{SHARED}0"]) == 1
    assert not second["observed"].any()
    assert third["observed"].all()
    assert np.abs(third[f"{SHARED}0"]).max() > 30


def test_max_product_of_probabilities_below_the_smallest_normal_float_is_judged() -> None:
    """e^-740 has two binary digits as a float64: its logarithm would be off by 0.05."""
    logits = np.array([[[0.0, -740.3], [0.0, -742.9]], [[-741.7, 0.0], [-0.5, 0.0]]])
    z = t.Input("logits", "f32", "c", logits.shape)
    leaf = c.Categorical((0, 1), t.Softmax(z))
    factors = c.Hadamard((c.Gather(leaf, (0,)), c.Gather(leaf, (1,))))
    circuit = Circuit(c.Sum(factors, numbers([[[0.25, 0.75]]])), (2, 2))
    queried = query_module(circuit, circuit.root, "mode")[0]
    lowered = ToTensor().run(queried, Notes())
    env = {
        "logits": logits[None],
        "x": np.array([[1, 0], [1, 1], [0, 0]]),
        "observed": np.array([[True, True], [True, False], [False, True]]),
    }
    assert compare(queried, lowered, Exact.ROUNDING, 1e-9, env) < 1e-12
    wrong = lowered.with_roots((lowered.roots[0], t.Mul(lowered.roots[1], numbers(1 + 1e-7))))
    with pytest.raises(Mismatch, match="max-product value"):
        compare(queried, wrong, Exact.ROUNDING, 1e-9, env)


def test_a_published_head_with_extreme_logits_compiles(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared("oracle/checkpoints/evabyte-tiny-btree-n-8-r-4")
    pcc.compile(folder, queries=["loglik", "conditionals"], out=tmp_path / "m.pcc")
    assert pcc.verify(tmp_path / "m.pcc").ok
