"""Whole modules as one generated kernel, on a CPU: queries, rounds, verifiers of every kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from generated import Kernels, Values, dtype_of
from graphs import agree

from pcc.backends.cuda.codegen import schedule
from pcc.circuit.queries import QUERIES
from pcc.conformance.circuits import circuits, edges
from pcc.conformance.models import TINY, head
from pcc.conformance.verifiers import KINDS
from pcc.driver import compile, load_source
from pcc.frontends import templates
from pcc.generation import Request, build, own_heads
from pcc.ir.module import Module
from pcc.models.proposal import sampled
from pcc.models.step import StepGraph
from pcc.passes.manager import Manager
from pcc.runtime.engine import load
from pcc.samples import sample_inputs
from pcc.stored import Stages

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ROWS = 3
SAMPLED = 2e-5  # of laws after a dozen products in f32
STORED = 4e-3  # one more step of f16 where a sum lies between two
FAST = ("cp-contextual", "hmm-trained", "btree-forest")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in circuits()]
)
def test_every_query_of_a_circuit(name: str, tmp_path: Path) -> None:
    circuit = circuits()[name]
    compile(circuit, out=tmp_path / "m.pcc", validate=False)
    engine = load(tmp_path / "m.pcc")
    stages = Stages(tmp_path / "m.pcc", engine.manifest["files"])
    names = [q for q in QUERIES if f"tensor-{q}" in stages.names]
    kernels = Kernels([stages.module(f"tensor-{q}") for q in names], ROWS, quick=True)
    for i, query in enumerate(names):
        for seed in range(2):
            feed = edges(sample_inputs(circuit, engine.queries[query], seed, ROWS), seed)
            want, got = kernels.meaning(i, feed), kernels(i, feed, seed)
            for output, value in got.items():
                agree(want[output], value, tolerance=5e-6, what=f"{name} {query} {output}")
    assert len(names) >= 7


# ---------------------------------------------------------------- generation


def feed_of(graph: StepGraph, rows: int, vocab: int, length: int) -> dict[str, Values]:
    """Return random inputs for sequences of some length, with settings over their ranges."""
    rng = np.random.default_rng(length)
    feed: dict[str, Values] = {}
    for x in graph.inputs:
        shape = (rows, *x.shape)
        if x.key == "draft_q":
            a = rng.dirichlet(np.ones(x.shape[-1]), shape[:-1])
        elif x.key == "length":
            a = np.full(shape, length)
        elif x.key == "valid":
            a = rng.integers(1, 9, shape)
        elif "temperature" in x.key:
            a = rng.choice([0.0, 0.7, 1.0, 1.3], shape)
        elif x.dtype == "bool":
            a = rng.random(shape) < 0.8
        elif x.dtype == "i64":
            a = rng.integers(0, 5 if x.key == "top_k" else vocab, shape)
        else:
            a = rng.normal(size=shape) if x.key.startswith("past") else rng.random(shape)
        feed[x.key] = a.astype(dtype_of(x.dtype))
    return feed


def judged(kernels: Kernels, i: int, feed: dict[str, Values], seed: int, tolerance: float) -> None:
    got = kernels(i, feed, seed)
    wide = {k: v.astype(np.float32) if v.dtype.itemsize == 2 else v for k, v in feed.items()}
    for output, want in kernels.meaning(i, wide).items():
        value = got[output]
        value = value.astype(np.float32) if value.dtype.itemsize == 2 else value
        agree(want, value, tolerance=tolerance, what=f"{output} seed {seed}")


CASES = [
    ("evabyte", "fp16", ("step",)),
    ("byte-llama", "fp32", ("decode",)),
    *(
        pytest.param(kind, precision, (), marks=pytest.mark.slow)
        for kind in KINDS
        for precision in ("fp32", "fp16", "bf16")
    ),
]


@pytest.mark.parametrize(("kind", "precision", "names"), CASES)
def test_every_graph_of_a_verifier(
    kind: str, precision: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    source, folder = KINDS[kind](tmp_path)
    request = Request(folder, max_seq=150, chunk=8, precision=precision)
    circuit = load_source(source) if source is not None else own_heads(request)
    made = build(request, circuit, Manager(validate=False), lambda _: None)
    graphs = [g for n, g in made.graphs.items() if n in names or not names]
    kernels = Kernels([g.module for g in graphs], 2, quick=True)
    bound = SAMPLED if precision == "fp32" else STORED * (1 if precision == "fp16" else 8)
    for i, graph in enumerate(graphs):
        for seed, length in enumerate((131, 0, 70) if not names else (131,)):  # windows of 64
            judged(kernels, i, feed_of(graph, 2, made.model.vocab, length), seed, bound)


SLOWER = [pytest.param(k, marks=pytest.mark.slow) for k in ("ff", "cp", "hmm")]


@pytest.mark.parametrize("kind", ["btree", *SLOWER])
def test_rounds_in_all_blocks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases that are wide on a GPU only for real sizes: here nearly all are."""
    monkeypatch.setattr(schedule, "WIDE", 200)
    _, folder = KINDS["llama"](tmp_path)
    request = Request(folder, max_seq=20, chunk=4)
    circuit = head(kind, 4, 3)
    made = build(request, circuit, Manager(validate=False), lambda _: None)
    graphs = [made.graphs["step_greedy"]]
    kernels = Kernels([g.module for g in graphs], 1, quick=True, blocks=3, threads=64)
    assert kernels.made["k0"].barriers > 10
    for seed in range(3):
        judged(kernels, 0, feed_of(graphs[0], 1, 258, 5), seed, SAMPLED)


@pytest.mark.parametrize(
    ("n", "repetitions"),
    [(4, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((8, 2), (16, 3)))],
)
def test_truncated_drafts_of_a_mixture_of_trees(n: int, repetitions: int) -> None:
    """A sum finds its draw through all levels: more text than one job may have."""
    circuit = templates.btree(n, 3, 40, repetitions=repetitions, context=5, seed=1)
    module = sampled(circuit, Manager(validate=False), "full", truncation=True).module
    kernels = Kernels([module], ROWS, quick=True)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        feed = {
            x.key: rng.random((ROWS, *x.shape)).astype(np.float32) for x in kernels.inputs["k0"]
        }
        feed["carry"] = rng.integers(0, 40, ROWS)
        feed["draft_temperature"] = rng.choice(np.array([0.0, 0.7, 1.3], np.float32), ROWS)
        judged(kernels, 0, feed, seed, SAMPLED)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 1])
def test_rounds_that_draft_with_a_mixture_of_trees(shuffle: int | None, tmp_path: Path) -> None:
    _, folder = KINDS["llama"](tmp_path)
    circuit = templates.btree(8, 3, 258, repetitions=2, shuffle=shuffle, context=TINY.width, seed=1)
    request = Request(folder, max_seq=150, chunk=8, truncation=True)
    graph = build(request, circuit, Manager(validate=False), lambda _: None).graphs["step"]
    kernels = Kernels([graph.module], 2, quick=True)
    for seed, length in enumerate((131, 0, 70)):
        judged(kernels, 0, feed_of(graph, 2, 258, length), seed, SAMPLED)


def test_a_module_without_a_batch_axis() -> None:
    from pcc.ir.array import Array
    from pcc.tensor import ops as t

    x = t.Input("x", "f32", "", (3, 40))
    y = t.Softmax(t.Mul(x, t.Const(Array.of(np.arange(40, dtype=np.float32).reshape(1, 40)))))
    kernels = Kernels([Module("m", (), (("y", y), ("x", x), ("again", y)))], 5)
    feed = {"x": np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)}
    judged(kernels, 0, feed, 1, 2e-6)
