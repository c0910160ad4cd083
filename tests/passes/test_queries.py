"""Every query, before and after numerics, against enumeration of all states in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from pcc.circuit import ops as c
from pcc.circuit.queries import QUERIES, Query, query_inputs
from pcc.interp.run import log_value, run
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.passes.contraction_order import ContractionOrder
from pcc.passes.expand_query import ExpandQuery
from pcc.passes.manager import Notes
from pcc.passes.numerics import Numerics
from pcc.passes.to_tensor import ToTensor, slots_of
from pcc.tensor import ops as t

N, R, V, D = 4, 3, 3, 2
STATES = np.array(list(itertools.product(range(V), repeat=N)))
Values = np.ndarray[Any, Any]


def const(a: Values) -> Op:
    return t.Const(np.asarray(a, np.float32))  # type: ignore[arg-type]


class Maker:
    """Random weights, trained or a softmax of a function of the context."""

    def __init__(self, contextual: bool, *, zeros: bool = False) -> None:
        self.rng, self.contextual, self.zeros = np.random.default_rng(7), contextual, zeros

    def __call__(self, *shape: int) -> Op:
        if not self.contextual:
            p = self.rng.dirichlet(np.ones(shape[-1]), shape[:-1])
            if self.zeros:
                p[..., 0] *= self.rng.random(shape[:-1]) < 0.5
            return const(p)
        x = t.Input("context", "f32", "c", (D,))
        return t.Softmax(t.Contract(x, const(self.rng.normal(size=(*shape, D))), "d,abcd->abc"))


def mixture(w: Maker) -> Op:
    leaf = c.Categorical(tuple(range(N)), w(N, R, V))
    return c.Sum(c.Hadamard(tuple(c.Gather(leaf, (i,)) for i in range(N))), w(1, 1, R))


def hmm(w: Maker) -> Op:
    leaf = c.Categorical((3, 2, 1, 0), w(N, R, V))
    y: Op = c.Sum(c.Gather(leaf, (0,)), w(1, R, R))
    for f in (1, 2):
        y = c.Sum(c.Hadamard((c.Gather(leaf, (f,)), y)), w(1, R, R))
    return c.Sum(c.Hadamard((y, c.Gather(leaf, (3,)))), w(1, 1, R))


def tree(w: Maker) -> Op:
    leaf = c.Categorical((0, 1, 2, 3), w(N, R, V))
    pairs = c.Cpt((c.Gather(leaf, (0, 2)), c.Gather(leaf, (1, 3))), w(2, R, R))
    return c.Cpt((c.Gather(pairs, (0,)), c.Gather(pairs, (1,))), w(1, 1, R))


def shuffled(w: Maker) -> Op:
    """Two trees over the same leaves, mixed; one does not split intervals."""
    leaf = c.Categorical((0, 1, 2, 3), w(N, R, V))
    g = [c.Gather(leaf, (i,)) for i in range(N)]

    def half(i: int, j: int) -> Op:
        return c.Sum(c.Hadamard((g[i], g[j])), w(1, 2, R))

    one = c.Sum(c.Kronecker(half(0, 2), half(3, 1)), w(1, 1, 4))
    two = c.Cp((half(0, 1), half(2, 3)), (w(1, 1, 2), w(1, 1, 2)))
    return c.Mix((one, two), w(1, 1, 2))


def tucker(w: Maker) -> Op:
    leaf = c.Categorical((0, 1, 2, 3), w(N, R, V))
    a, b = c.Gather(leaf, (0, 2)), c.Gather(leaf, (1, 3))
    flat = c.Sum(c.Kronecker(a, b), w(2, 2, R * R))
    w4 = t.Reshape(flat.w, (2, 2, R, R))
    pairs = c.Tucker(a, b, w4)
    return c.Tucker(
        c.Gather(pairs, (0,)), c.Gather(pairs, (1,)), t.Reshape(w(1, 1, 4), (1, 1, 2, 2))
    )


KINDS = {"cp": mixture, "hmm": hmm, "tree": tree, "shuffled": shuffled, "tucker": tucker}


class Table:
    """The joint distribution, listed."""

    def __init__(self, root: Op, inputs: dict[str, Values]) -> None:
        self.p = np.exp(log_value(root, STATES, None, inputs)[:, 0, 0])
        best = log_value(root, STATES, None, inputs, maximise=True)
        self.best = best[:, 0, 0]

    def match(self, x: Values, seen: Values) -> Values:
        return (~seen | (STATES == x)).all(axis=1)

    def marginal(self, x: Values, seen: Values) -> float:
        return float(self.p[self.match(x, seen)].sum())

    def given(self, x: Values, seen: Values, i: int, v: int) -> float:
        y, more = x.copy(), seen.copy()
        y[i], more[i] = v, True
        den = self.marginal(x, seen & (np.arange(N) != i) | (seen & (np.arange(N) == i)))
        return self.marginal(y, more) / den if den > 0 else 0.0


def compiled(root: Op, query: str) -> list[Module]:
    slots = len(slots_of(root, query))
    ins = query_inputs(query, N, slots, "i64")
    outs = tuple(
        (o, Query(root, tuple(ins.values()), query, o, V)) for o, _, _ in QUERIES[query].outputs
    )
    stages = [Module(query, (V,) * N, outs)]
    for p in (ExpandQuery(), ToTensor(), ContractionOrder(), Numerics()):
        stages.append(p.run(stages[-1], Notes()))
    return stages[2:]


def answers(root: Op, query: str, inputs: dict[str, Values]) -> dict[str, Values]:
    """Evaluate the linear and the represented form, which must agree; return the latter."""
    first, *_, last = compiled(root, query)
    a, b = run(first.roots, inputs, Real()), run(last.roots, inputs, Real())
    for x, y in zip(a, b, strict=True):
        assert not np.isnan(y.astype(float)).any()
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=1e-9, atol=1e-12)
    names = [name for name, _ in last.outputs]
    return dict(zip(names, b, strict=True))


def case(
    kind: str, contextual: bool, query: str, *, zeros: bool = False
) -> tuple[Op, Table, dict[str, Values], dict[str, Values]]:
    root = KINDS[kind](Maker(contextual, zeros=zeros))
    rng = np.random.default_rng(3)
    extra = {"context": rng.normal(size=(1, D))} if contextual else {}
    rows = len(STATES)
    inputs = {
        "x": STATES,
        "observed": rng.random((rows, N)) < 0.5,
        "target": rng.random((rows, N)) < 0.5,
        "carry": STATES[:, 0],
        "u": rng.random((rows, len(slots_of(root, query)))),
        **extra,
    }
    return root, Table(root, extra), inputs, answers(root, query, inputs)


MODELS = [(k, ctx) for k in KINDS for ctx in (False, True)]
EVERY = pytest.mark.parametrize(("kind", "contextual"), MODELS)
ZEROS = pytest.mark.parametrize("zeros", [False, True])


@EVERY
def test_loglik_marginal_conditional(kind: str, contextual: bool) -> None:
    _, table, ins, got = case(kind, contextual, "loglik")
    np.testing.assert_allclose(np.exp(got["log_prob"].astype(float)), table.p, rtol=1e-9)
    x, seen, target = ins["x"], ins["observed"], ins["target"]
    want = np.array([table.marginal(a, s) for a, s in zip(x, seen, strict=True)])
    _, _, _, got = case(kind, contextual, "marginal")
    np.testing.assert_allclose(np.exp(got["log_prob"].astype(float)), want, rtol=1e-9)
    both = np.array([table.marginal(a, s) for a, s in zip(x, seen | target, strict=True)])
    _, _, _, got = case(kind, contextual, "conditional")
    np.testing.assert_allclose(np.exp(got["log_prob"].astype(float)), both / want, rtol=1e-9)


@EVERY
def test_prefix_and_conditionals(kind: str, contextual: bool) -> None:
    _, table, _, prefix = case(kind, contextual, "prefix")
    _, _, _, rows = case(kind, contextual, "conditionals")
    for b in range(0, len(STATES), 5):
        for i in range(N):
            seen = np.arange(N) < i
            want = np.array([table.given(STATES[b], seen, i, v) for v in range(V)])
            got = np.exp(rows["log_cond"][b, i].astype(float))
            np.testing.assert_allclose(got, want, rtol=1e-9)
            one = np.exp(float(prefix["log_cond"][b, i]))
            np.testing.assert_allclose(one, want[STATES[b, i]], rtol=1e-9)


@EVERY
def test_univariate(kind: str, contextual: bool) -> None:
    _, table, ins, got = case(kind, contextual, "univariate")
    for b in range(0, len(STATES), 5):
        seen = ins["observed"][b]
        for i in range(N):
            if seen[i]:
                want = (np.arange(V) == STATES[b, i]).astype(float)
            else:
                want = np.array([table.given(STATES[b], seen, i, v) for v in range(V)])
            have = np.exp(got["log_marg"][b, i].astype(float))
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-12)


@EVERY
def test_mode_is_the_largest_joint_term(kind: str, contextual: bool) -> None:
    root, table, ins, got = case(kind, contextual, "mode")
    seen = ins["observed"]
    want = [table.best[table.match(x, s)].max() for x, s in zip(STATES, seen, strict=True)]
    np.testing.assert_allclose(got["log_value"].astype(float), want, rtol=1e-9)
    extra = {k: v for k, v in ins.items() if k == "context"}
    reached = log_value(root, got["x"], None, extra, maximise=True)[:, 0, 0]
    np.testing.assert_allclose(reached, want, rtol=1e-9)
    assert (got["x"][seen] == STATES[seen]).all()


def frequencies(kind: str, contextual: bool, query: str, x0: int) -> tuple[Values, Values]:
    """Exact output law on a grid of uniforms is costly; draw many rows with a fixed seed."""
    rows = 15_000
    root = KINDS[kind](Maker(contextual))
    rng = np.random.default_rng(11)
    extra = {"context": rng.normal(size=(1, D))} if contextual else {}
    observed = np.zeros((rows, N), bool)
    observed[:, 0] = True
    inputs = {
        "x": np.full((rows, N), x0),
        "observed": observed,
        "carry": np.full(rows, x0),
        "u": rng.random((rows, len(slots_of(root, query)))),
        **extra,
    }
    last = compiled(root, query)[-1]
    out = dict(zip([o for o, _ in last.outputs], run(last.roots, inputs, Real()), strict=True))
    x = out["x"] if query == "draft" else out["x"][:, 1:]
    counts = np.zeros(V ** (N - 1))
    np.add.at(counts, x @ (V ** np.arange(N - 2, -1, -1)), 1)
    table = Table(root, extra)
    law = table.p.reshape((V,) * N)[x0].ravel()
    return counts, law / law.sum()


@pytest.mark.parametrize("query", ["sample", "draft"])
@EVERY
def test_draws_follow_the_posterior(kind: str, contextual: bool, query: str) -> None:
    counts, law = frequencies(kind, contextual, query, 1)
    expected = law * counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    dof = len(law) - 1
    assert chi2 < dof + 4.5 * np.sqrt(2 * dof)  # p > 1e-4
    wrong = np.roll(law, 1) * counts.sum()
    assert ((counts - wrong) ** 2 / wrong).sum() > 100 * dof  # the test can fail


@EVERY
def test_draft_rows_are_the_conditionals_of_what_was_drawn(kind: str, contextual: bool) -> None:
    _, table, ins, got = case(kind, contextual, "draft")
    for b in range(0, len(STATES), 5):
        y = np.concatenate([[ins["carry"][b]], got["x"][b]])
        for i in range(1, N):
            want = [table.given(y, np.arange(N) < i, i, v) for v in range(V)]
            np.testing.assert_allclose(got["q"][b, i - 1].astype(float), want, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query", sorted(QUERIES))
def test_zero_probability_is_minus_infinity_and_never_nan(kind: str, query: str) -> None:
    root = KINDS[kind](Maker(False, zeros=True))
    outside = STATES.copy()
    outside[::2, 0] = V + 4
    inputs = {
        "x": outside,
        "observed": np.ones(STATES.shape, bool),
        "target": np.zeros(STATES.shape, bool),
        "carry": outside[:, 0],
        "u": np.full((len(STATES), len(slots_of(root, query))), 0.5),
    }
    got = answers(root, query, inputs)
    for name in ("log_prob", "log_value"):
        if name in got and query != "conditional":
            assert np.isneginf(got[name][::2].astype(float)).all()
    if query == "univariate":
        assert np.isneginf(got["log_marg"][::2].astype(float)).all()
    if query == "draft":  # the prior stands in: rows still sum to one
        np.testing.assert_allclose(got["q"].astype(float).sum(axis=-1), 1.0, rtol=1e-6)
