"""Draws through the compiled `sample` and `draft` graphs against the published joint law."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goodness import p_value, pooled
from graphs import Compiled
from oracle import REFERENCE, RUNTIME, TINY, Head, apart, load_tiny

from pcc.interp.run import log_value

Shared = Callable[[str], Path]
Record = Callable[[str, object], None]
Values = np.ndarray[Any, Any]
EVERY = pytest.mark.parametrize("name", TINY)
DRAWS, SEED, LEVEL, CHUNK = 200_000, 20_260_101, 1e-3, 250_000
# Draws at which a one-percent change of the most telling weight shows: the statistic then grows by
# N sum (p' - p)^2 / p, which is about 1e-5 N here, above the threshold's distance from its mean.
TELLING = {
    "ff-n3-r1-v4": 7_000_000,
    "cp-n3-r2-v4": 8_000_000,
    "hmm-n3-r2-v4": 10_000_000,
    "btree-n3-r2-v4": 12_000_000,
    "btree-n4-r2-v4": 10_000_000,
}


def tiny(shared: Shared, name: str) -> tuple[Head, Values, Values]:
    """A configuration, all its windows, and their published probabilities."""
    head = load_tiny(shared("oracle/sampling_tiny.npz"), name)
    log = head.data["joint_logp_f64"]
    states = np.array(list(itertools.product(range(log.shape[0]), repeat=head.n)))
    return head, states, np.exp(log.ravel())


def counts_of(graph: Compiled, head: Head, draws: int, cells: tuple[int, ...]) -> Values:
    """Count what the `sample` graph draws from seeded uniforms k / 2^24."""
    rng = np.random.default_rng(SEED)
    slots = next(i.shape[1] for i in graph.session.get_inputs() if i.name == "u")
    total = np.zeros(int(np.prod(cells)), np.int64)
    for start in range(0, draws, CHUNK):
        rows = min(CHUNK, draws - start)
        feed = {
            "u": rng.random((rows, slots), dtype=np.float32),
            "x": np.zeros((rows, head.n), np.int64),
            "observed": np.zeros((rows, head.n), bool),
            "context": head.data["e"],
        }
        index = np.ravel_multi_index(tuple(graph(feed)["x"].T), cells)
        total += np.bincount(index, minlength=len(total))
    return total


def disturbed(head: Head, states: Values, law: Values) -> tuple[Head, float]:
    """Return the head with one weight one percent larger: the one that moves the law most."""
    best: tuple[float, Head] = (0.0, head)
    for key, w in head.weights.items():
        for i in np.argsort(-np.abs(w * head.data["e"][0]), axis=None)[:6]:
            other = w.copy()
            other.flat[i] *= np.float32(1.01)
            changed = replace(head, weights={**head.weights, key: other})
            new = np.exp(log_value(changed.circuit.root, states, None, {"context": head.data["e"]}))
            shift = float(((new[:, 0, 0] - law) ** 2 / law).sum())
            best = max(best, (shift, changed), key=lambda pair: pair[0])
    return best[1], best[0]


@EVERY
def test_draws_follow_the_published_law(name: str, shared: Shared, record_property: Record) -> None:
    head, _, law = tiny(shared, name)
    counts = counts_of(head.compiled("sample"), head, DRAWS, head.data["joint_logp_f64"].shape)
    p = p_value(counts, law)
    record_property("p", p)
    assert counts.sum() == DRAWS
    assert p > LEVEL


def _power(name: str, shared: Shared, record_property: Record) -> None:
    """The same draws and the same test: the head passes, one weight 1 % larger does not."""
    head, states, law = tiny(shared, name)
    cells, draws = head.data["joint_logp_f64"].shape, TELLING[name]
    wrong, shift = disturbed(head, states, law)
    good = p_value(counts_of(head.compiled("sample"), head, draws, cells), law)
    bad = p_value(counts_of(wrong.compiled("sample"), wrong, draws, cells), law)
    for key, value in (("draws", draws), ("p", good), ("p disturbed", bad), ("shift", shift)):
        record_property(key, value)
    assert good > LEVEL
    assert bad < LEVEL


def test_one_percent_of_one_weight_shows(shared: Shared, record_property: Record) -> None:
    _power("ff-n3-r1-v4", shared, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY[1:])
def test_one_percent_of_one_weight_shows_in_every_kind(
    name: str, shared: Shared, record_property: Record
) -> None:
    _power(name, shared, record_property)


@EVERY
def test_the_compiled_joint_sums_to_one(name: str, shared: Shared, record_property: Record) -> None:
    head, states, law = tiny(shared, name)
    feed = {"x": states, "context": head.data["e"]}
    graph = head.compiled("loglik")
    exact, got = graph.meaning(feed)["log_prob"], graph(feed)["log_prob"].astype(float)
    assert apart(np.log(law), exact) <= REFERENCE
    assert apart(np.log(law), got) <= RUNTIME
    total = float(np.exp(got).sum())
    record_property("sum - 1", total - 1)
    assert abs(total - 1) < 1e-6


@EVERY
def test_drafts_follow_the_law_given_the_carry(
    name: str, shared: Shared, record_property: Record
) -> None:
    head, _, law = tiny(shared, name)
    cells = head.data["joint_logp_f64"].shape
    graph, rng = head.compiled("draft"), np.random.default_rng(SEED)
    slots = next(i.shape[1] for i in graph.session.get_inputs() if i.name == "u")
    carry = rng.integers(0, cells[0], DRAWS)
    u = rng.random((DRAWS, slots), dtype=np.float32)
    out = graph({"carry": carry, "u": u, "context": head.data["e"]})
    index = np.ravel_multi_index((carry, *out["x"].T), cells)
    counts = np.bincount(index, minlength=len(law)).reshape(cells[0], -1)
    given = law.reshape(cells[0], -1)
    for c in range(cells[0]):
        p = p_value(counts[c], given[c] / given[c].sum())
        record_property(f"p given {c}", p)
        assert p > LEVEL
    chosen = np.take_along_axis(out["q"], out["x"][..., None], axis=-1)[..., 0].astype(float)
    want = given.reshape(cells[0], -1)[carry, index % given.shape[1]] / given.sum(axis=1)[carry]
    assert apart(np.log(want), np.log(chosen).sum(axis=1)) <= RUNTIME


@EVERY
def test_the_mode_is_the_published_one(name: str, shared: Shared) -> None:
    head, states, law = tiny(shared, name)
    feed = {
        "x": np.zeros((1, head.n), np.int64),
        "observed": np.zeros((1, head.n), bool),
        "context": head.data["e"],
    }
    got = head.compiled("mode")(feed)["x"][0]
    np.testing.assert_array_equal(got, head.data["argmax_tokens"])
    if name == "btree-n4-r2-v4":  # the largest joint term need not be the most probable window
        assert got.tolist() == [1, 3, 3, 2]
        assert states[law.argmax()].tolist() == [1, 0, 3, 2]


def test_the_statistic_is_the_published_one(shared: Shared) -> None:
    """The published counts have the published chi-square, and pooling keeps every draw."""
    for name in TINY:
        head, _, law = tiny(shared, name)
        counts = head.data["counts"].ravel()
        expected = law * counts.sum()
        chi2 = ((counts - expected) ** 2 / expected).sum()
        np.testing.assert_allclose(chi2, head.data["chi2"], rtol=1e-6)
        few, more = pooled(counts, expected)
        assert few.sum() == counts.sum()
        assert more.min() >= 5.0
        np.testing.assert_allclose(more.sum(), counts.sum())
    # A quantile of the distribution: P(chi2_1 > 3.8415) = 5 %.
    off = np.sqrt(3.8415 * 240)
    assert abs(p_value(np.array([600 + off, 400 - off]), np.array([0.6, 0.4])) - 0.05) < 1e-4
