"""8-bit weights in plans: which launches, how many bytes, and the text of whole generations."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_plans import ordered, plan_of

import pcc
from pcc.backends.cuda import nvcc
from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.simulator import Simulator, host_dtype
from pcc.circuit.text import show
from pcc.conformance import verifiers
from pcc.conformance.models import WIDE
from pcc.ir.core import tensor
from pcc.runtime.traffic import read
from pcc.tensor import ops as t

pytestmark = pytest.mark.skipif(nvcc.shutil.which("g++") is None, reason="no g++ is here")
CHUNK, TOKENS = 8, 48


def products(builder: Builder) -> list[dict[str, str]]:
    """Return the dtypes of the arguments of each product, by name."""
    return [{a.name: a.dtype for a in x.kernel.args} for x in builder.launches
            if re.match(r'#include "(linear|narrow).cuh"', x.kernel.source)]  # fmt: skip


@pytest.mark.parametrize("int8", [None, "head", "verifier", "all"])
def test_products_read_half_the_bytes(
    int8: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = verifiers.llama(tmp_path, kind="btree", n=8, size=WIDE)
    how: dict[str, Any] = {"precision": "bf16", "queries": ["draft"]}
    e = ordered(source, folder, monkeypatch, int8=int8, **how).emissions["step"]
    builder = plan_of(e, 1)
    found = products(builder)
    integers = [a for a in found if a["w"] == "u8"]
    assert all(a["scales"] == "f32" for a in integers)
    layers, head = 4 * WIDE.layers, 1
    expect = {"head": head, "verifier": layers, "all": head + layers}
    assert len(integers) == expect.get(int8 or "", 0)
    assert len(found) == layers + head + 1  # and the logits: as many launches as in halves
    moved = sum(x.bytes["weights"] for x in builder.launches)
    text = read(show(e.module))
    assert abs(moved - sum(text.weights.values())) < 0.1 * moved  # what a bound is made of


def test_a_graph_counts_integers_once_and_halves_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = verifiers.llama(tmp_path, size=WIDE)
    how: dict[str, Any] = {"precision": "bf16", "queries": ["draft"]}
    modules = [
        ordered(source, folder, monkeypatch, int8=x, **how).emissions["verify"].module
        for x in (None, "verifier")
    ]
    half, integers = (sum(read(show(m)).weights.values()) for m in modules)
    scaled = [n for n in modules[1].nodes() if isinstance(n, t.ScaledContract)]
    saved = sum(math.prod(tensor(n.b).shape) - 4 * tensor(n.scale).shape[0] for n in scaled)
    assert len(scaled) == 4 * WIDE.layers
    assert half - integers == saved


def rounds(order: Any, prompt: list[int]) -> list[int]:
    """Return the greedy text that the plans make, a graph at a time, states in place."""
    names = ("prefill_greedy", "step_greedy")
    plans = {q: Simulator(plan_of(order.emissions[q], 1)) for q in names}
    e = order.emissions["step_greedy"]
    states = {x.key: np.zeros((1, *x.shape), host_dtype(x.dtype))
              for x in e.inputs if x.key.startswith("past.")}  # fmt: skip
    out: list[int] = []
    for at in range(0, len(prompt), CHUNK):
        part = prompt[at : at + CHUNK]
        ids = np.zeros((1, CHUNK), np.int64)
        ids[0, : len(part)] = part
        feed = {"input_ids": ids, "valid": np.array([len(part)]), "length": np.array([at])}
        got = plans["prefill_greedy"].run(feed | states)
        after(states, got)
    window, length = got["next_window"], got["next_length"]
    out += got["emitted"][0].tolist()
    while len(out) < TOKENS:
        feed = {"window": window, "length": length, "active": np.ones(1, bool)}
        got = plans["step_greedy"].run(feed | states)
        after(states, got)
        window, length = got["next_window"], got["next_length"]
        out += got["emitted"][0, : int(got["n_emit"][0])].tolist()
    return out[:TOKENS]


def after(states: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    """Take over the states that a graph gives."""
    for name in states:
        states[name] = got[f"present.{name.removeprefix('past.')}"]


@pytest.mark.parametrize("int8", ["head", "all"])
def test_the_text_is_that_of_the_bundle_for_a_cpu(
    int8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = verifiers.llama(tmp_path, kind="btree", n=4, size=WIDE)
    how: dict[str, Any] = {"max_seq": 128, "chunk": CHUNK, "queries": ["draft"]}
    how |= {"precision": "fp16", "int8": int8}
    made = pcc.compile(source, verifier=folder, out=tmp_path / "m.pcc", validate=False, **how)
    assert made.manifest["precision"]["head"] == "fp16+int8"
    session = pcc.load(made.path, threads=1).session(greedy=True)
    prompt = [256, 10, 90, 33, 7, 200, 41, 5, 66, 120]
    want = session.generate_ids(prompt, TOKENS)
    order = ordered(source, folder, monkeypatch, **how)
    assert rounds(order, prompt) == want[:TOKENS]
