"""Every query of the published heads against the numbers that their implementation gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import HEADS, REFERENCE, RUNTIME, Head, apart, load_head

from pcc.interp.reference import reference

Shared = Callable[[str], Path]
Record = Callable[[str, object], None]
Values = np.ndarray[Any, Any]
EVERY = pytest.mark.parametrize("name", HEADS)


def flat(a: Values) -> Values:
    return a.reshape(-1, *a.shape[2:])


def rows(head: Head) -> tuple[dict[str, Values], int]:
    """The inputs of all positions and windows as rows, and how many windows a position has."""
    tokens = head.data["tokens"].astype(np.int64)
    windows = tokens.shape[1]
    return {"x": flat(tokens), "context": np.repeat(head.data["e"], windows, axis=0)}, windows


def asked(head: Head) -> list[tuple[str, str, str, dict[str, Values], Values]]:
    """What is asked and published: `(field, query, output, inputs, expected)`."""
    data = head.data
    every, _ = rows(head)
    first = {"x": every["x"][:1], "context": every["context"][:1]}
    nothing = np.zeros((1, head.n), bool)
    out = [
        ("joint", "loglik", "log_prob", every, flat(data["joint_logp_f64"])),
        ("conditionals of prefixes", "prefix", "log_cond", every, flat(data["cond_logp_f64"])),
        (
            "masked", "marginal", "log_prob",
            {**every, "observed": ~flat(data["marg_mask"])}, flat(data["masked_logp_f64"]),
        ),
    ]  # fmt: skip
    if "cond_full_logp_f64" in data:
        full, alone = data["cond_full_logp_f64"][None], data["uni_logp_f64"][None]
        out.append(("conditionals", "conditionals", "log_cond", first, full))
        seen = {**first, "observed": nothing}
        out.append(("univariate", "univariate", "log_marg", seen, alone))
    return out


@EVERY
def test_the_reference_evaluator(name: str, shared: Shared, record_property: Record) -> None:
    """Masked evaluations of the circuit in float64, and the compiled modules in float64."""
    head = load_head(shared(f"oracle/head/{name}.npz"))
    for field, query, output, inputs, want in asked(head):
        naive = apart(want, reference(head.circuit, query, inputs)[output])
        lowered = apart(want, head.compiled(query).meaning(inputs)[output])
        record_property(field, max(naive, lowered))
        assert naive <= REFERENCE, (field, naive)
        assert lowered <= REFERENCE, (field, lowered)


@EVERY
def test_the_graphs(name: str, shared: Shared, record_property: Record) -> None:
    head = load_head(shared(f"oracle/head/{name}.npz"))
    for field, query, output, inputs, want in asked(head):
        got = head.compiled(query)(inputs)[output]
        worst = apart(want, got)
        record_property(field, worst)
        assert worst <= RUNTIME, (field, worst)
        if query == "prefix":
            sums = apart(flat(head.data["prefix_logp_f64"]), np.cumsum(got.astype(float), axis=1))
            record_property("prefix", sums)
            assert sums <= RUNTIME, ("prefix", sums)


@EVERY
def test_the_most_probable_explanation(name: str, shared: Shared, record_property: Record) -> None:
    """`mode` is the published max-product draft, token by token, and its value."""
    head = load_head(shared(f"oracle/head/{name}.npz"))
    context = head.data["e"]
    inputs = {
        "x": np.zeros((len(context), head.n), np.int64),
        "observed": np.zeros((len(context), head.n), bool),
        "context": context,
    }
    mode = head.compiled("mode")
    want, score = head.data["argmax_tokens"], head.data["argmax_score_f64"]
    exact, got = mode.meaning(inputs), mode(inputs)
    np.testing.assert_array_equal(exact["x"], want)
    np.testing.assert_array_equal(got["x"], want)
    record_property("float64", apart(score, exact["log_value"]))
    record_property("fp32", apart(score, got["log_value"]))
    assert apart(score, exact["log_value"]) <= REFERENCE
    assert apart(score, got["log_value"]) <= RUNTIME


@pytest.mark.parametrize("name", ["btree-n8-r4-v320", "hmm-n8-r4-v16"])
def test_the_graphs_at_opset_17(name: str, shared: Shared, record_property: Record) -> None:
    head = load_head(shared(f"oracle/head/{name}.npz"))
    for field, query, output, inputs, want in asked(head):
        worst = apart(want, head.compiled(query, opset=17)(inputs)[output])
        record_property(field, worst)
        assert worst <= RUNTIME, (field, worst)


def test_one_context_row_serves_every_row(shared: Shared) -> None:
    head = load_head(shared("oracle/head/btree-n8-r4-v320.npz"))
    loglik, tokens = head.compiled("loglik"), head.data["tokens"].astype(np.int64)
    for s, e in enumerate(head.data["e"]):
        got = loglik({"x": tokens[s], "context": e[None]})["log_prob"]
        assert apart(head.data["joint_logp_f64"][s], got) <= RUNTIME


def test_a_wrong_wiring_is_far_off(shared: Shared) -> None:
    """These comparisons can fail: another order of the tokens is nowhere near."""
    head = load_head(shared("oracle/head/x-random-btree-n8-r4-v16.npz"))
    every, _ = rows(head)
    wrong = {**every, "x": every["x"][:, ::-1].copy()}
    got = head.compiled("loglik")(wrong)["log_prob"]
    assert apart(flat(head.data["joint_logp_f64"]), got) > 0.1
