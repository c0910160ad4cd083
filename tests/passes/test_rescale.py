"""Deep circuits in linear arithmetic: the bound that allows it, what declines, zeros, accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from graphs import Compiled, agree
from hypothesis import given
from hypothesis import strategies as st

from pcc.circuit.circuit import Circuit
from pcc.driver import query_module
from pcc.frontends import templates
from pcc.ir.module import Module
from pcc.passes.manager import Manager
from pcc.passes.pipelines import circuit_pipeline, tensor_pipeline
from pcc.passes.ranges import HIGH, LOW, bounds
from pcc.passes.rescale import MIX, Spans
from pcc.tensor import ops as t

N, R, V = 24, 6, 11
Values = np.ndarray[Any, Any]


def lowered(circuit: Circuit) -> Module:
    manager = Manager()
    root = manager.run(circuit.module(), circuit_pipeline()).roots[0]
    return manager.run(query_module(circuit, root, "loglik")[0], tensor_pipeline())


def weights(seed: int = 0) -> tuple[Values, list[Values]]:
    rng = np.random.default_rng(seed)
    emissions = rng.dirichlet(np.ones(V), (N, R))
    sums = [rng.dirichlet(np.ones(R), (1, R)) for _ in range(N - 1)]
    return emissions, [*sums, rng.dirichlet(np.ones(R), (1, 1))]


def hmm(emissions: Values, sums: list[Values]) -> Circuit:
    return templates.hmm(N, R, V, weights={"emissions": emissions, "sums": sums})


def forward(emissions: Values, sums: list[Values], x: Values) -> Values:
    """Return log p(x) of rows x `[B,N]`, step by step in float64 (no underflow at this length)."""
    value = emissions[N - 1][:, x[:, N - 1]].T
    for k in range(N - 1):
        value = emissions[N - 2 - k][:, x[:, N - 2 - k]].T * (value @ sums[k][0].T)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(value @ sums[-1][0].T)[:, 0])


def elementwise_logs(m: Module) -> int:
    """How many logarithms are taken of all units of a layer."""
    return sum(isinstance(n, t.Log | t.LogContract) and n.type.shape[-1:] == (R,)  # type: ignore[attr-defined]
               for n in m.nodes())  # fmt: skip


def test_a_long_chain_takes_one_logarithm_for_each_rescaling() -> None:
    made = weights()
    module = lowered(hmm(*made))
    assert elementwise_logs(module) == 0
    x = np.random.default_rng(1).integers(0, V, (50, N))
    got = Compiled(module)({"x": x})["log_prob"]
    agree(forward(*made, x), got, tolerance=2e-6)


def test_impossible_values_are_minus_infinity() -> None:
    emissions, sums = weights(2)
    emissions[3, :, 4] = 0.0  # no state emits it
    emissions[5, :-1, 7] = 0.0  # one state does
    emissions /= emissions.sum(-1, keepdims=True)
    module = lowered(hmm(emissions, sums))
    assert elementwise_logs(module) == 0
    x = np.random.default_rng(3).integers(0, V, (40, N))
    x[:20, 3] = 4
    x[10:30, 5] = 7
    got = Compiled(module)({"x": x})["log_prob"]
    want = forward(emissions, sums, x)
    assert np.isneginf(want[:20]).all()
    agree(want, got, tolerance=2e-6)


def test_a_weight_of_zero_declines() -> None:
    emissions, sums = weights(4)
    for w in sums[:-1]:
        w[0, 1, 2] = 0.0
        w /= w.sum(-1, keepdims=True)
    module = lowered(hmm(emissions, sums))
    assert elementwise_logs(module) > 0
    x = np.random.default_rng(5).integers(0, V, (20, N))
    agree(forward(emissions, sums, x), Compiled(module)({"x": x})["log_prob"], tolerance=2e-6)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 5))
def test_a_positive_sum_is_within_its_spread(seed: int, outs: int, ins: int) -> None:
    """No input, however uneven or zero in part, leaves the bounds that the analysis states."""
    rng = np.random.default_rng(seed)
    w = rng.uniform(1e-4, 1, (3, outs, ins)).astype(np.float32)
    table = 10.0 ** rng.uniform(-29, -25, (3, ins, 4)) * (rng.random((3, ins, 4)) < 0.7)
    x = t.Lookup(_const(table), _index())
    y = t.Contract(x, _const(w), MIX)
    spans = Spans((y,), bounds((y,)), (LOW, HIGH))
    span = spans.of[y]
    value = np.einsum("fiv,foi->fov", table.astype(np.float32).astype(np.float64), w)
    top = value.max(axis=1, keepdims=True)
    share = (
        (value / np.where(top > 0, top, 1))[value > 0] if y in spans.rescaled else value[value > 0]
    )
    assert (share >= span.low * (1 - 1e-6)).all()
    assert (share <= span.high * (1 + 1e-6)).all()


def _const(a: Values) -> Any:
    from pcc.ir.array import Array

    return t.Const(Array.of(a))


def _index() -> Any:
    return t.Input("x", "i64", "b", (3,))
