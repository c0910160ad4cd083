"""Heads built by hand: what expressions mean, what they refuse, and that they draft."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest

import pcc
from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.frontends.builder import Builder
from pcc.runtime.measure import compare_greedy
from pcc.tensor import ops as t

D, H, K, V, N = engines.WIDTH, 5, 3, 258, 3
Values = np.ndarray[Any, Any]
DOCS = Path(__file__).parents[2] / "docs" / "runtime.md"


def weights(seed: int, *shape: int) -> Values:
    return np.random.default_rng(seed).normal(size=shape) * 2 / np.sqrt(shape[-1])


def softmax(x: Values) -> Values:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ACTIVATIONS: dict[str, Callable[[Values], Values]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.array([math.erf(v) for v in x / 2**0.5])) / 2,
}


def head(activation: str, cards: tuple[int, ...]) -> pcc.Circuit:
    """Two mixtures of products over an MLP, mixed: tables, weights of a sum, weights of a list."""
    b = Builder(cards, context=D)
    h = getattr(b, activation)(b.linear(b.context(), weights(1, H, D), weights(2, H)))
    h = b.add(h, b.linear(h, weights(3, H, H)))
    slots = [
        b.categorical(i, b.softmax(b.linear(h, weights(4 + i, K, v, H), weights(20 + i, K, v))))
        for i, v in enumerate(cards)
    ]
    sums = [b.sum(b.product(*slots), b.softmax(b.linear(h, weights(s, 1, K, H)))) for s in (7, 8)]
    return b.circuit(b.sum(sums, b.softmax(b.linear(h, weights(9, 1, 2, H)))), name=activation)


def value(activation: str, cards: tuple[int, ...], context: Values, x: Values) -> float:
    """The same in NumPy, for one row."""
    h = ACTIVATIONS[activation](weights(1, H, D) @ context + weights(2, H))
    h = h + weights(3, H, H) @ h
    p = np.ones(K)
    for i, v in enumerate(cards):
        p *= softmax(weights(4 + i, K, v, H) @ h + weights(20 + i, K, v))[:, x[i]]
    both = [float(softmax(weights(s, 1, K, H) @ h)[0] @ p) for s in (7, 8)]
    return float(softmax(weights(9, 1, 2, H) @ h)[0] @ both)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_head_is_what_its_equation_says(activation: str, tmp_path: Path) -> None:
    cards, rng = (4, 2, 3), np.random.default_rng(5)
    pcc.compile(head(activation, cards), out=tmp_path / "m.pcc", queries=["loglik"])
    context = rng.normal(size=(6, D)).astype(np.float32)
    x = rng.integers(0, cards, (6, 3))
    found = pcc.load(tmp_path / "m.pcc", threads=1).run("loglik", x=x, context=context)
    want = [value(activation, cards, e, row) for e, row in zip(context, x, strict=True)]
    np.testing.assert_allclose(np.exp(found["log_prob"]), want, rtol=1e-4)


def test_one_row_of_a_table() -> None:
    """`[V]` is one unit, `[Ki]` one unit of a sum; the fold axis goes into the constants."""
    b = Builder([4], context=D)
    row = b.softmax(b.linear(b.context(), weights(1, 4, D), weights(2, 4)))
    leaf = b.categorical(0, row)
    assert isinstance(leaf, c.Categorical)
    assert not any(isinstance(n, t.Reshape) for n in b.circuit(leaf).module().nodes())
    wide = b.categorical(0, b.softmax(b.linear(b.context(), weights(3, K, 4, D))))
    b.circuit(b.sum(wide, b.softmax(b.linear(b.context(), weights(4, K, D)))))


@pytest.mark.parametrize("proposal", ["full", "latent-first"])
def test_a_head_drafts(proposal: str, tmp_path: Path) -> None:
    """Greedy text is autoregressive, every graph agrees with float64, samples come out."""
    model = engines.llama_folder(tmp_path / "model")
    pcc.compile(
        head("silu", (V,) * N), verifier=model, out=tmp_path / "m.pcc", max_seq=64, chunk=8,
        queries=["draft"], proposal=proposal,
    )  # fmt: skip
    assert pcc.verify(tmp_path / "m.pcc").ok
    engine = pcc.load(tmp_path / "m.pcc", threads=1)
    compared, _ = compare_greedy(engine, [[256, 97], [5, 6, 7]], 40, lambda _: None)
    assert compared.identical + compared.near_ties == 2
    assert len(engine.session(seed=1).generate(b"ab", 20).bytes) == 20


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"## Your own head\n.*?```python\n(.*?)```", DOCS.read_text(), re.S)
    engines.llama_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, str(DOCS), "exec"), names)
    assert len(names["result"].bytes) == 40


def other_circuit(b: Builder) -> Any:
    return b.softmax(b.categorical(0, np.full(4, 0.25)))


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda b: Builder([4]).context(), "B105"),
        (lambda b: Builder([4], context=-1), "B105"),
        (lambda b: Builder([4], context=2.0), "B105"),
        (lambda b: Builder([4], context=10**9), "B105"),
        (lambda b: b.linear(b.context(), weights(1, 4, D + 1)), "B102"),
        (lambda b: b.linear(b.context(), weights(1, D)), "B102"),
        (lambda b: b.linear(b.context(), weights(1, 2, 2, 4, D)), "B102"),
        (lambda b: b.linear(b.context(), np.zeros((0, D))), "B102"),
        (lambda b: b.linear(b.context(), "abc"), "B102"),
        (lambda b: b.linear(b.context(), np.full((4, D), np.nan)), "B103"),
        (lambda b: b.linear(b.context(), np.full((4, D), 1e300)), "B103"),
        (lambda b: b.linear(b.context(), weights(1, 4, D), np.zeros(5)), "B102"),
        (lambda b: b.linear(np.zeros(D), weights(1, 4, D)), "B105"),
        (lambda b: b.add(b.context(), b.linear(b.context(), weights(1, 4, D))), "B102"),
        (lambda b: b.relu([1.0]), "B105"),
        (other_circuit, "B105"),
        (lambda b: b.categorical(0, b.linear(b.context(), weights(1, 4, D))), "B105"),
        (lambda b: b.categorical(0, b.softmax(b.linear(b.context(), weights(1, 5, D)))), "B102"),
        (lambda b: b.sum(b.categorical(0, np.full((2, 4), 0.25)),
                         b.softmax(b.linear(b.context(), weights(1, 3, D)))), "B102"),
        (lambda b: b.sum([b.categorical(0, np.full(4, 0.25))] * 2,
                         b.softmax(b.linear(b.context(), weights(1, 3, D)))), "B102"),
        (lambda b: b.bernoulli(1, b.softmax(b.context())), "B102"),
    ],
)  # fmt: skip
def test_expressions_refuse(call: Callable[[Builder], Any], code: str) -> None:
    with pytest.raises(PccError, match=code):
        call(Builder([4, 2], context=D))
