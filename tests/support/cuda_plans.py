"""Graphs as plans of the CUDA engine, run on the host and judged by the float64 evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc import package
from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.partition import partition
from pcc.backends.cuda.simulator import Simulator, host_dtype
from pcc.driver import compile
from pcc.emission import Emission, Order
from pcc.interp.run import run
from pcc.ir.array import widened
from pcc.ir.core import tensor
from pcc.ir.semiring import Real

Values = np.ndarray[Any, Any]


class _Ordered(Exception):  # noqa: N818
    """Carries what the driver would have given to a writer."""

    def __init__(self, order: Order) -> None:
        self.order = order


def ordered(source: Any, verifier: Path | None, monkeypatch: Any, **options: Any) -> Order:
    """Return the graphs that `compile` would have written for target cuda."""

    def caught(order: Order, *_: object) -> None:
        raise _Ordered(order)

    monkeypatch.setattr(package, "write_graphs", caught)
    options = {"max_seq": 150, "chunk": 16, "validate": False} | options
    try:
        compile(source, verifier=verifier, target="cuda", out=None, **options)
    except _Ordered as e:
        return e.order
    raise AssertionError("nothing was written")


def plan_of(e: Emission, batch: int) -> Builder:
    """Return the launches of a graph."""
    return partition(e.module, e.inputs, batch)


def random_inputs(
    e: Emission, batch: int, rng: np.random.Generator, vocab: int
) -> dict[str, Values]:
    """Return inputs of a round or a prefill in the middle of a text, rows at unlike positions."""
    out: dict[str, Values] = {}
    for x in e.inputs:
        shape = (batch, *tensor(x).shape) if tensor(x).batch else tensor(x).shape
        out[x.key] = _value(x.key, tensor(x).dtype, shape, rng, vocab)
    return out


def _value(
    key: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator, vocab: int
) -> Values:
    kind = host_dtype(dtype)
    match key:
        case "length":  # rows of a batch on both sides of a window's edge
            return rng.integers(56, 72, shape).astype(kind)
        case "valid":
            return rng.integers(1, 16, shape).astype(kind)
        case "top_k":
            return np.full(shape, 0, kind)
        case "top_p" | "temperature" | "draft_temperature" | "draft_top_p":
            return np.full(shape, 1.0, kind)
        case "draft_q":
            mass = rng.random(shape)
            return (mass / mass.sum(axis=-1, keepdims=True)).astype(kind)
        case "u":
            return rng.random(shape).astype(kind)
    if dtype == "bool":
        return np.ones(shape, kind)
    if dtype == "i64":
        return rng.integers(0, vocab, shape).astype(kind)
    return rng.normal(size=shape).astype(kind)


def simulated(builder: Builder, feed: Mapping[str, Values]) -> dict[str, Values]:
    """Return what the plan computes; `feed` is left as it is."""
    return Simulator(builder).run({k: v.copy() for k, v in feed.items()})


def meaning(e: Emission, feed: Mapping[str, Values]) -> dict[str, Values]:
    """Return what the evaluator computes in float64."""
    wide = {k: widened(v) for k, v in feed.items()}
    values = run(e.module.roots, wide, Real())
    return dict(zip((name for name, _ in e.module.outputs), values, strict=True))


def compare(
    want: Mapping[str, Values], got: Mapping[str, Values], *, tolerance: float
) -> dict[str, float]:
    """Return the largest error of each output, relative beyond 1; integers must be equal."""
    errors = {}
    assert set(got) == set(want)
    for name, g in got.items():
        exact, w = g.dtype.kind in "ib", np.broadcast_to(np.asarray(want[name]), g.shape)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert not np.isnan(g).any(), name
        assert (np.isinf(g) == np.isinf(w)).all(), name
        fine = np.isfinite(w)
        off = np.abs(g[fine] - w[fine]) / np.maximum(1.0, np.abs(w[fine]))
        errors[name] = float(off.max(initial=0.0))
        assert errors[name] <= (0.0 if exact else tolerance), (name, errors[name])
    return errors
