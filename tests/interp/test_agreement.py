"""The evaluators agree: enumeration, the naive reference, log and linear float, field, symbols."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sympy
from strategies import contexts, evidence, random_circuit

from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.frontends.builder import Builder
from pcc.interp.brute import brute, states
from pcc.interp.reference import gap, reference
from pcc.interp.run import log_value, run
from pcc.ir.semiring import P31, Field, Real, Symbolic

QUERIES = ("loglik", "marginal", "conditional", "prefix", "conditionals", "univariate", "mode")


@pytest.mark.parametrize("seed", range(25))
def test_enumeration_against_masked_evaluation(seed: int) -> None:
    circuit = random_circuit(seed, max_vars=4)
    rows = 4
    x, seen = evidence(circuit, rows, seed)
    target = np.random.default_rng(seed).random(x.shape) < 0.5
    for context in (contexts(circuit, 1, seed), contexts(circuit, rows, seed)):
        given = {"x": x, "observed": seen, "target": target, **context}
        for query in QUERIES:
            want, got = brute(circuit, query, given), reference(circuit, query, given)
            assert want.keys() == got.keys()
            for name, value in want.items():
                assert gap(value, got[name]) < 1e-10, (query, name)


@pytest.mark.parametrize("seed", range(25))
def test_linear_against_logarithms(seed: int) -> None:
    circuit = random_circuit(seed, continuous=True)
    x, seen = evidence(circuit, 5, seed)
    params = contexts(circuit, 5, seed)
    env = {"x": x, "observed": seen, **params}
    (linear,) = run((circuit.root,), env, Real())
    logs = log_value(circuit.root, x, seen, params)
    with np.errstate(divide="ignore"):
        assert gap(np.log(linear.astype(float)).ravel(), logs.ravel()) < 1e-11


def small() -> Circuit:
    """A circuit with shared parts, a mixture, and unequal cardinalities: 12 states."""
    b = Builder([2, 3, 2])
    x = b.categorical(0, [[0.2, 0.7], [0.5, 0.3]])
    y = b.categorical(1, [[0.1, 0.3, 0.9], [0.4, 0.35, 0.6]])
    z = b.bernoulli(2, [0.25])
    both = b.sum(b.product(x, y), [[0.15, 0.85]])
    other = b.sum(b.kronecker(x, y), [[0.11, 0.21, 0.31, 0.41]])
    return b.circuit(b.product(b.sum([both, other], [0.45, 0.55]), z))


def test_symbols_sum_to_what_one_marginal_evaluation_gives() -> None:
    circuit = small()
    x, s = states(circuit.cards), Symbolic()
    (each,) = run((circuit.root,), {"x": x, "observed": np.ones(x.shape, bool)}, s)
    (total,) = run((circuit.root,), {"x": x[:1], "observed": np.zeros((1, 3), bool)}, s)
    assert sympy.expand(sum(each.ravel()) - total.ravel()[0]) == 0
    assert len(total.ravel()[0].free_symbols) > 10


def test_symbols_evaluate_to_the_floats() -> None:
    circuit = small()
    x = states(circuit.cards)
    (exprs,) = run((circuit.root,), {"x": x, "observed": np.ones(x.shape, bool)}, Symbolic())
    (floats,) = run((circuit.root,), {"x": x, "observed": np.ones(x.shape, bool)}, Real())
    for expr, want in zip(exprs.ravel(), floats.ravel(), strict=True):
        values = {v: float.fromhex(v.name.removeprefix("w_")) for v in expr.free_symbols}
        assert abs(float(expr.subs(values)) - float(want)) < 1e-15


def test_field_sums_to_what_one_marginal_evaluation_gives() -> None:
    for seed in range(25):
        circuit = random_circuit(seed, max_vars=4, context=False)
        x, s = states(circuit.cards), Field(seed)
        (each,) = run((circuit.root,), {"x": x, "observed": np.ones(x.shape, bool)}, s)
        none = {"x": x[:1], "observed": np.zeros((1, circuit.n), bool)}
        (total,) = run((circuit.root,), none, s)
        assert int(each.astype(object).sum() % P31) == int(total.ravel()[0])


def test_symbols_map_into_the_field() -> None:
    """The same circuit in both exact carriers: substitute residues for symbols."""
    circuit, s = small(), Field(3)
    x = states(circuit.cards)
    env = {"x": x, "observed": np.ones(x.shape, bool)}
    (exprs,), (field,) = (run((circuit.root,), env, carrier) for carrier in (Symbolic(), s))
    for expr, want in zip(exprs.ravel(), field.ravel(), strict=True):
        floats = {v: float.fromhex(v.name.removeprefix("w_")) for v in expr.free_symbols}
        residues = {v: int(s.const(np.array([f]), "")[0]) for v, f in floats.items()}
        assert int(expr.subs(residues)) % P31 == int(want)


@pytest.mark.parametrize("context", [0, 3])
def test_zero_probabilities(context: int) -> None:
    """Evidence that cannot be: ratios are zero, nothing is NaN, on both sides."""
    b = Builder([3, 3])
    x, y = b.categorical(0, [[1, 0, 0], [0, 1, 0]]), b.categorical(1, [[0, 0, 1], [1, 0, 0]])
    circuit = b.circuit(b.sum(b.product(x, y), [[1, 0]]))
    if context:
        circuit = templates.cp(2, 2, 3, context=context)
    x_ = np.array(list(itertools.product(range(3), repeat=2)))
    params = {"context": np.full((1, context), 80.0)} if context else {}
    for seen in itertools.product([False, True], repeat=2):
        given = {"x": x_, "observed": np.tile(seen, (9, 1)), **params}
        for query in ("marginal", "prefix", "conditionals", "univariate", "mode"):
            want, got = brute(circuit, query, given), reference(circuit, query, given)
            for name, value in want.items():
                assert not np.isnan(value).any()
                assert gap(value, got[name]) < 1e-9, query


def test_what_cannot_be_enumerated() -> None:
    with pytest.raises(PccError, match="E132"):
        states((2, 0))
    with pytest.raises(PccError, match="E151") as e:
        states((2,) * 17)
    assert "reference" in e.value.hint
    with pytest.raises(PccError, match="E150"):
        brute(small(), "sample", {"x": np.zeros((1, 3), int)})
    with pytest.raises(PccError, match="E130"):
        reference(small(), "everything", {"x": np.zeros((1, 3), int)})
