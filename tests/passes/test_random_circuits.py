"""Random circuits through random pipelines: passes validated, queries against enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import circuits, contexts, evidence

from pcc.circuit import text
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.driver import query_module
from pcc.interp.brute import Joint, brute
from pcc.interp.queries import Evaluations
from pcc.interp.run import run
from pcc.ir.core import Op
from pcc.ir.semiring import Real
from pcc.ir.text import resources
from pcc.passes.manager import Manager
from pcc.passes.messages import expand_fused
from pcc.passes.pipelines import tensor_pipeline
from pcc.passes.registry import make
from pcc.passes.to_tensor import slots_of
from pcc.passes.unfold import unfold

CIRCUIT_PASSES = (
    "canonicalize", "prune-zero", "prune-unreachable", "layerize", "sum-collapse", "fold-leaf-sums",
    "fold-layers", "fuse-tucker", "fuse-cpt", "fuse-cp", "fold-constants", "dce",
)  # fmt: skip
EXACT = ("loglik", "marginal", "conditional", "prefix", "conditionals", "univariate", "mode")
ROWS = 6
pipelines = st.lists(st.sampled_from(CIRCUIT_PASSES), min_size=1, max_size=8)
quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def questions(c: Circuit, root: Op, query: str, seed: int) -> dict[str, Any]:
    """Inputs of a query, with impossible values, and rows of a context each."""
    rng, (x, seen) = np.random.default_rng(seed), evidence(c, ROWS, seed)
    x[0, 0] = c.cards[0] + 3  # outside the variable's range
    x[1, -1] = -1
    return {
        "x": x,
        "observed": seen,
        "target": rng.random(x.shape) < 0.5,
        "carry": x[:, 0],
        "u": rng.random((ROWS, len(slots_of(root, query)))),
        **contexts(c, ROWS, seed),
    }


@quick
@given(circuits(), pipelines, st.integers(0, 1000))
def test_random_pipelines_keep_every_query(c: Circuit, names: list[str], seed: int) -> None:
    module = c.module()
    after = Manager().run(module, [make(n) for n in names])
    again = text.parse(text.show(after), resources=resources(after))
    assert again.roots == after.roots
    query = EXACT[seed % len(EXACT)]
    passes = [make(n) for n in names if make(n).keeps_max] if query == "mode" else None
    root = after.roots[0] if passes is None else Manager().run(module, passes).roots[0]
    check_query(c, root, query, seed)


def check_query(c: Circuit, root: Op, query: str, seed: int) -> None:
    compiled = Manager().run(query_module(c, root, query)[0], tensor_pipeline())
    env = questions(c, root, query, seed)
    got = dict(zip([n for n, _ in compiled.outputs], run(compiled.roots, env, Real()), strict=True))
    want = brute(c, query, env)
    for name, value in want.items():
        found = np.broadcast_to(np.asarray(got[name], float), value.shape)
        assert not np.isnan(found).any()
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
        assert (np.isneginf(found) == np.isneginf(value)).all()


@settings(quick, max_examples=8)
@given(circuits(max_vars=4), st.sampled_from(["sample", "draft"]), st.integers(0, 1000))
def test_draws_are_possible_and_rows_are_conditionals(c: Circuit, query: str, seed: int) -> None:
    if c.n < 2:
        return
    compiled = Manager().run(query_module(c, c.root, query)[0], tensor_pipeline())
    env = questions(c, c.root, query, seed)
    got = dict(zip([n for n, _ in compiled.outputs], run(compiled.roots, env, Real()), strict=True))
    assert not any(np.isnan(np.asarray(v, float)).any() for v in got.values())
    joint = Joint(c, env)
    if query == "sample":
        x, p = got["x"], joint.marginal(got["x"], np.ones(got["x"].shape, bool))
        assert (x[env["observed"]] == env["x"][env["observed"]]).all()
        possible = joint.marginal(env["x"], env["observed"]) > 0
        assert (p[possible] > 0).all()
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(got["log_prob"].astype(float), np.log(p), atol=1e-5)
        return
    x = np.concatenate([env["carry"][:, None], got["x"]], axis=1)
    order = np.arange(c.n)
    seen = (order == 0) & (joint.marginal(x, order == 0) > 0)[:, None]
    for i in range(1, c.n):
        rows = joint.open(x, seen | ((order > 0) & (order < i)), i)
        rows = rows / rows.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(got["q"][:, i - 1].astype(float), rows, atol=1e-5)


@quick
@given(circuits(), st.integers(0, 1000))
def test_one_evaluation_per_unit_is_one_per_value(c: Circuit, seed: int) -> None:
    """The evaluator that judges `q.rows` agrees with counting the states."""
    x, seen = evidence(c, ROWS, seed)
    env = {"x": x, "observed": seen, **contexts(c, ROWS, seed)}
    m, joint = Evaluations(c.root, env), Joint(c, env)
    rows = np.exp(m.rows(x, seen, max(c.cards), prefix=False))
    for i in range(c.n):
        np.testing.assert_allclose(rows[:, i], joint.open(x, seen, i), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(np.exp(m.value(x, seen)), joint.marginal(x, seen), rtol=1e-9)


@quick
@given(circuits(), st.integers(0, 1000))
def test_unfolding_keeps_the_circuit(c: Circuit, seed: int) -> None:
    flat = unfold(expand_fused(c.root))
    env = questions(c, c.root, "loglik", seed)
    a = brute(c, "loglik", env)
    b = brute(Circuit(flat, c.cards), "loglik", env)
    np.testing.assert_allclose(a["log_prob"], b["log_prob"], rtol=1e-12)


def test_every_query_is_tested() -> None:
    assert set(EXACT) | {"sample", "draft"} == set(QUERIES)
