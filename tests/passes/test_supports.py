"""Determinism that is claimed holds at every state; circuits that have it by design are found."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcc
from pcc.circuit.circuit import Circuit
from pcc.frontends import templates
from pcc.interp.run import log_value
from pcc.ir.core import Op
from pcc.passes.supports import deterministic

Values = np.ndarray[Any, Any]


def selected(select: Values, card: int = 4) -> Circuit:
    """sum_k w_k select[k, x_0] p_k(x_1) q_k(x_2): deterministic if the rows of `select` are."""
    rng = np.random.default_rng(3)
    k = len(select)
    b = pcc.Builder([select.shape[1], card, 3])
    rest = [b.categorical(i, rng.dirichlet(np.ones(v), k)) for i, v in ((1, card), (2, 3))]
    root = b.sum(b.product(b.categorical(0, select), *rest), rng.dirichlet(np.ones(k)))
    return b.circuit(root)


def test_the_largest_term_is_the_largest_probability(tmp_path: Path) -> None:
    circuit = selected(np.eye(3))
    made = pcc.compile(circuit, out=tmp_path / "m.pcc", queries=["mode", "loglik"])
    assert made.manifest["queries"]["mode"]["exact"] is True
    states = np.array(list(itertools.product(range(3), range(4), range(3))))
    engine = pcc.load(made.path)
    every = engine.run("loglik", x=states)["log_prob"]
    got = engine.run("mode")
    np.testing.assert_array_equal(got["x"][0], states[every.argmax()])
    np.testing.assert_allclose(got["log_value"][0], every.max(), atol=1e-6)


@pytest.mark.parametrize(
    ("root", "want"),
    [
        (selected(np.eye(3)).root, True),
        (selected(np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])).root, True),
        (selected(np.array([[0.5, 0.5, 0, 0], [0, 0.1, 0.9, 0], [0, 0, 0, 1]])).root, False),
        (selected(np.full((2, 2), 0.5)).root, False),
        (templates.hmm(4, 3, 5).root, False),
        (templates.hmm(4, 3, 5, context=2).root, False),
        (templates.ff(4, 5).root, True),  # no sum has a choice
        (templates.ff(4, 5, context=2).root, True),
    ],
)
def test_known_circuits(root: Op, want: bool) -> None:
    assert deterministic(root) is want


def test_what_is_claimed_holds_at_every_state() -> None:
    """Random tables and weights with many zeros: p(x) is the largest term wherever it is proven."""
    rng, found = np.random.default_rng(5), {True: 0, False: 0}
    states = np.array(list(itertools.product(range(3), repeat=3)))
    for _ in range(150):
        b = pcc.Builder([3, 3, 3])
        first, second, third = (b.categorical(i, sparse(rng, 2, 3)) for i in range(3))
        inner = b.sum(b.product(first, second), sparse(rng, 2, 2))
        root = b.sum(b.product(inner, third), sparse(rng, 1, 2)[0])
        claim = deterministic(root)
        found[claim] += 1
        if claim:
            total, best = (log_value(root, states, maximise=m)[:, 0, 0] for m in (False, True))
            np.testing.assert_allclose(np.exp(best), np.exp(total), rtol=1e-9)
    assert min(found.values()) > 20


def sparse(rng: np.random.Generator, rows: int, columns: int) -> Values:
    w = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.5)
    w[np.arange(rows), rng.integers(0, columns, rows)] += 0.1
    return np.asarray(w / w.sum(axis=1, keepdims=True))
