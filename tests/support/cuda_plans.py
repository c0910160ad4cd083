"""Graphs as plans of the CUDA engine, run on the host and judged by the float64 evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc import package
from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.backends.cuda.partition import partition
from pcc.backends.cuda.simulator import Simulator, host_dtype
from pcc.conformance import verifiers
from pcc.conformance.models import WIDE
from pcc.driver import compile
from pcc.emission import Emission, Order
from pcc.interp.run import run
from pcc.ir.array import widened
from pcc.ir.core import tensor
from pcc.ir.semiring import Real
from pcc.knobs import CHECK_TOLERANCE

Values = np.ndarray[Any, Any]
EXACT, HALF = CHECK_TOLERANCE["f32"], 3e-2  # a rounding of a half number may fall to the other side
VOCAB = {"evabyte": 320, "byte_llama": 268}
Case = tuple[str, dict[str, Any], str, int, tuple[str, ...]]

CASES: list[Case] = [
    ("llama", {"kind": "hmm", "size": WIDE}, "fp16", 3, ("step", "prefill")),
    ("evabyte", {"kind": "btree", "n": 8, "size": WIDE}, "bf16", 1, ("step", "verify")),
    ("byte_llama", {"n": 4}, "fp32", 3, ("step",)),
    ("lora", {}, "fp16", 1, ("step_greedy",)),
    ("gpt", {"kind": "ff"}, "fp32", 1, ("prefill_greedy", "decode")),
    ("llama", {"kind": "hmm", "size": WIDE}, "fp16+int8", 3, ("step", "prefill")),
    ("evabyte", {"kind": "btree", "n": 8, "size": WIDE}, "bf16+int8", 1, ("step", "verify")),
    ("lora", {}, "bf16+int8", 1, ("step_greedy",)),
    ("gpt", {"kind": "ff"}, "fp16+int8", 1, ("prefill_greedy",)),
]


class _Ordered(Exception):  # noqa: N818
    """Carries what the driver would have given to a writer."""

    def __init__(self, order: Order) -> None:
        self.order = order


def ordered(
    source: Any, verifier: Path | None, monkeypatch: Any,
    look: Callable[[Order], object] = lambda _: None, **options: Any,
) -> Order:  # fmt: skip
    """Return the graphs that `compile` would have written for target cuda.

    `look` is called with them while it is known where nodes come from.
    """

    def caught(order: Order, *_: object) -> None:
        look(order)
        raise _Ordered(order)

    monkeypatch.setattr(package, "write_graphs", caught)
    options = {"max_seq": 150, "chunk": 16, "validate": False} | options
    try:
        compile(source, verifier=verifier, target="cuda", out=None, **options)
    except _Ordered as e:
        return e.order
    raise AssertionError("nothing was written")


def plan_of(e: Emission, batch: int, gpu: Gpu = TUNED) -> Builder:
    """Return the launches of a graph."""
    return partition(e.module, e.inputs, batch, gpu=gpu)


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


def case_of(case: Case, tmp_path: Path, patch: Any, **options: Any) -> Order:
    """The graphs of a case."""
    name, how, precision, batch, _ = case
    source, folder = getattr(verifiers, name)(tmp_path, **how)
    half, _, int8 = precision.partition("+")
    asked = {"queries": ["draft"], "precision": half, "batch": batch} | options
    asked["int8"] = "all" if int8 else None
    return ordered(source, folder, patch, **asked)


def check(e: Emission, case: Case, gpu: Gpu = TUNED) -> None:
    """A plan computes what the evaluator does."""
    name, _, precision, batch, _ = case
    feed = random_inputs(e, batch, np.random.default_rng(0), VOCAB.get(name, 258))
    tolerance = EXACT if precision == "fp32" else HALF
    compare(meaning(e, feed), simulated(plan_of(e, batch, gpu), feed), tolerance=tolerance)
