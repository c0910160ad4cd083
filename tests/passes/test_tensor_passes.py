"""expand-query, to-tensor, contraction-order, numerics, dce: text, refusals, symbolic proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from laws import applied, const, leaf, module, outline, prove, symbols, values

import pcc
from pcc.check import stored_circuit
from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES, Query, query_inputs
from pcc.errors import PccError
from pcc.interp.queries import evaluations
from pcc.interp.run import run
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import Symbolic
from pcc.passes.contraction_order import ContractionOrder
from pcc.passes.dce import Dce
from pcc.passes.expand_query import ExpandQuery
from pcc.passes.numerics import Numerics
from pcc.passes.to_tensor import ToTensor
from pcc.tensor import ops as t


def logits(*shape: int) -> Op:
    return t.Input(f"logits{len(shape)}{shape[0]}", "f32", "c", shape)


def pair(*, trained: bool = True) -> Op:
    """Two variables with 3 and 2 values, three hidden states."""
    if trained:
        return c.Sum(c.Hadamard((leaf(0, k=3), leaf(1, k=3, v=2))), const(1, 1, 3))
    p = c.Categorical((0, 1), t.Softmax(logits(2, 3, 2)))
    return c.Sum(c.Hadamard((c.Gather(p, (0,)), c.Gather(p, (1,)))), t.Softmax(logits(1, 1, 3)))


def asked(root: Op, query: str, *cards: int) -> Module:
    ins = query_inputs(query, len(cards), 0, "i64" if all(cards) else "f32")
    outs = tuple(
        (o, Query(root, tuple(ins.values()), query, o, max(cards)))
        for o, _, _ in QUERIES[query].outputs
    )
    return Module(query, cards, outs)


def names(m: Module) -> list[str]:
    return [line.split()[2] for line in outline(m) if " = " in line and line[0] == "%"]


EXPANDED = {
    "loglik": (["q.value", "t.log"], ["q.query"]),
    "conditional": (["t.or", "q.value", "t.log", "q.value", "t.log", "t.sub"], ["q.query"]),
    "conditionals": (["q.rows", "t.log", "t.reduce_lse", "t.reshape", "t.sub"], ["q.query"]),
}


@pytest.mark.parametrize("query", EXPANDED)
def test_queries_expand_to_primitives(query: str) -> None:
    before = asked(pair(), query, 3, 2)
    after, _ = applied(ExpandQuery(), before)
    rest = ("t.input", "t.const", "c.")
    found, was = ([n for n in names(m) if not n.startswith(rest)] for m in (after, before))
    assert (found, was) == EXPANDED[query]


@pytest.mark.parametrize("query", ["prefix", "sample", "mode", "draft"])
def test_expand_query_declines_queries_with_a_pass_of_their_own(query: str) -> None:
    before = asked(pair(), query, 3, 2)
    assert applied(ExpandQuery(), before)[0].roots == before.roots


@pytest.mark.parametrize("query", ["loglik", "marginal"])
def test_the_upward_pass_is_the_circuit(query: str) -> None:
    """The exponential of the answer is the circuit's polynomial, with a symbol for every number."""
    root = pair()
    tensors, _ = applied(ToTensor(scale=False), applied(ExpandQuery(), asked(root, query, 3, 2))[0])
    assert not any(n.startswith(("c.", "q.")) for n in names(tensors))
    env = symbols(module(root, 3, 2))
    if query == "loglik":
        env["observed"] = np.ones_like(env["observed"])
    (got,) = values(tensors, env)
    (want,) = run((root,), env, Symbolic())
    for x, y in zip(got.flat, want[:, 0, 0].flat, strict=True):
        assert sympy.expand(sympy.exp(x) - y) == 0


def test_to_tensor_declines_what_has_no_answer() -> None:
    gauss = c.Gaussian((0,), const(1, 2), const(1, 2, seed=1))
    root = c.Sum(c.Hadamard((gauss, leaf(1, v=2))), const(1, 1, 2))
    with pytest.raises(PccError, match="E132"):
        applied(ToTensor(), applied(ExpandQuery(), asked(root, "conditionals", 0, 2))[0])


def test_contraction_order() -> None:
    m = asked(c.Tucker(leaf(0, k=4), leaf(1, k=3, v=2), const(1, 1, 4, 3)), "loglik", 3, 2)
    linear = applied(ToTensor(scale=False), applied(ExpandQuery(), m)[0])[0]
    after, notes = applied(ContractionOrder(), linear)
    assert any('eq="fi,foi->fo"' in line for line in outline(linear))
    assert not any('eq="fi,foi->fo"' in line for line in outline(after))
    assert [line for line in outline(after) if "fi,foij->foj" in line]
    assert "contract 4 first: 3 instead of 12 values per row" in notes[0]
    prove(linear, after)


def test_contraction_order_declines_many_outputs() -> None:
    wide = c.Tucker(leaf(0, k=2), leaf(1, k=3, v=2), const(1, 5, 2, 3))
    m = asked(c.Sum(wide, const(1, 1, 5)), "loglik", 3, 2)
    linear = applied(ToTensor(scale=False), applied(ExpandQuery(), m)[0])[0]
    after, notes = applied(ContractionOrder(), linear)
    assert after.roots == linear.roots
    assert "5 outputs for 2 inputs" in notes[0]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("query", ["loglik", "marginal", "conditionals"])
def test_logarithms_have_the_same_meaning(query: str, trained: bool) -> None:
    cards = (3, 2) if trained else (2, 2)
    m = asked(pair(trained=trained), query, *cards)
    linear = applied(ToTensor(scale=False), applied(ExpandQuery(), m)[0])[0]
    after, _ = applied(Numerics(linear=False), linear)
    env = symbols(linear)
    for a, b in zip(values(linear, env), values(after, env), strict=True):
        a, b = np.broadcast_arrays(a, b)
        for u, v in zip(a.flat, b.flat, strict=True):
            assert same_log(u, v)


def same_log(u: sympy.Expr, v: sympy.Expr) -> bool:
    """Compare two expressions at two rational points of all their symbols, to 30 digits."""
    never = (sympy.zoo, sympy.nan, -sympy.oo)  # log 0: a value that the variable does not have
    if u.has(*never) or v.has(*never):
        return bool(u.has(*never) and v.has(*never))
    free = sorted(u.free_symbols | v.free_symbols, key=str)
    for shift in (3, 7):
        at = {s: sympy.Rational(i + shift, 2 * shift + 3 * i) for i, s in enumerate(free)}
        if abs(sympy.N((u - v).subs(at), 40)) > sympy.Float("1e-30", 40):
            return False
    return True


def test_numerics_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    m = asked(pair(trained=False), "loglik", 2, 2)
    linear = applied(ToTensor(), applied(ExpandQuery(), m)[0])[0]
    small, _ = applied(Numerics(), linear)  # few weights of a context: term by term
    assert "t.log_softmax" in names(small)
    assert "t.log_contract" not in names(small)
    monkeypatch.setattr("pcc.passes.numerics.TERMS", 0)
    after, _ = applied(Numerics(), linear)
    assert names(linear)[-1] == "t.log"
    assert "t.log_contract" in names(after)
    assert not any("t.contract" in n for n in names(after))


def test_numerics_stays_linear_where_a_range_is_proven() -> None:
    m = asked(pair(), "loglik", 3, 2)
    linear = applied(ToTensor(), applied(ExpandQuery(), m)[0])[0]
    after, notes = applied(Numerics(), linear)
    assert any("linear: values within" in line for line in notes)
    assert "t.log_contract" not in names(after)
    narrow, _ = applied(Numerics(low=0.5, high=0.6), linear)  # no range fits: logarithms
    assert "t.log_contract" in names(narrow)


@pytest.mark.parametrize("make", [pcc.templates.cp, pcc.templates.hmm, pcc.templates.btree])
def test_a_small_weight_of_a_context_at_the_largest_term(make: Any, tmp_path: Path) -> None:
    """Logits 50 apart: a weight below the smallest float may meet the only term that counts."""
    circuit, rng = make(8, 8, 32, context=3, seed=1), np.random.default_rng(0)
    made = pcc.compile(circuit, out=tmp_path / "m.pcc", queries=["loglik"], parameters="logits")
    engine = pcc.load(made.path, threads=1)
    logits = {
        i["name"]: (rng.normal(size=(64, *i["shape"][1:])) * 50).astype(np.float32)
        for i in engine.queries["loglik"]["inputs"]
        if "logits" in i["name"]
    }
    x = rng.integers(0, 32, (64, 8))
    got = engine.run("loglik", x=x, **logits)["log_prob"]
    want = evaluations(stored_circuit(engine).root, logits).value(x, np.ones(x.shape, bool))
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_zero_weight_at_the_largest_term_in_float32(tmp_path: Path) -> None:
    """One state explains the row with certainty but has weight zero; the other has e^-1105."""
    rare = np.array([[[1.0, 0.0], [1e-12, 1.0]]] * 40, np.float32)
    x = c.Categorical(tuple(range(40)), t.Const(rare))  # type: ignore[arg-type]
    w = t.Const(np.array([[[0.0, 1.0]]], np.float32))  # type: ignore[arg-type]
    root = c.Sum(c.Hadamard(tuple(c.Gather(x, (i,)) for i in range(40))), w)
    pcc.compile(Circuit(root, (2,) * 40), queries=["loglik", "prefix"], out=tmp_path / "m.pcc")
    row = np.zeros((1, 40), np.int64)
    engine = pcc.load(tmp_path / "m.pcc")
    np.testing.assert_allclose(engine.run("loglik", x=row)["log_prob"], 40 * np.log(1e-12), 1e-5)
    np.testing.assert_allclose(engine.run("prefix", x=row)["log_cond"][0], np.log(1e-12), 1e-4)


def test_dce_joins_movements() -> None:
    x = t.Input("x", "f32", "b", (4, 3))
    two = t.Take(t.Take(x, 0, (3, 1, 0)), 0, (2, 0))
    three = t.Reshape(t.Reshape(t.Concat((two,), 0), (6,)), (3, 2))
    before = Module("movement", (), (("y", three), ("z", t.Take(x, 1, (0, 1, 2)))))
    after, notes = applied(Dce(), before)
    assert outline(after) == [
        '%0 = t.input {key="x", dtype="f32", batch="b", shape=[4 3]} : f32[b|4,3]',
        "%1 = t.take %0 {axis=0, indices=[0 3]} : f32[b|2,3]",
        "%2 = t.reshape %1 {shape=[3 2]} : f32[b|3,2]",
        "return y = %2, z = %0",
    ]
    assert "nodes fewer" in notes[0]
    prove(before, after)


def test_dce_declines_a_take_along_another_axis() -> None:
    x = t.Input("x", "f32", "b", (4, 3))
    before = Module("movement", (), (("y", t.Take(t.Take(x, 1, (2, 0)), 0, (1,))),))
    assert applied(Dce(), before)[0].roots == before.roots
