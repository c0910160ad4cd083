"""Plans of the CUDA engine: what they compute, how few launches, where their arrays lie."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_plans import (
    CASES,
    HALF,
    Case,
    case_of,
    check,
    compare,
    meaning,
    plan_of,
    random_inputs,
    simulated,
)

from pcc.backends.cuda import builder as building
from pcc.backends.cuda import emit, nvcc
from pcc.backends.cuda.codegen.generate import Generated
from pcc.backends.cuda.memory import Span, place
from pcc.backends.cuda.partition import partition
from pcc.backends.cuda.plan import ALIGN
from pcc.backends.cuda.weights import WeightFile
from pcc.conformance.models import WIDE
from pcc.emission import Emission, Order, listed
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.runtime.device.plan import read_plan
from pcc.tensor import nn
from pcc.tensor import ops as t

pytestmark = pytest.mark.skipif(nvcc.shutil.which("g++") is None, reason="no g++ is here")
MORE: list[Case] = [
    (name, options, precision, batch, ("step", "step_greedy", "prefill", "verify", "decode"))
    for name, options in (
        ("llama", {"kind": "cp", "size": WIDE}), ("llama", {"kind": "ff", "n": 2}),
        ("evabyte", {}), ("evabyte", {"kind": "hmm", "size": WIDE}), ("byte_llama", {"n": 8}),
        ("gpt", {}), ("lora", {}),
    )
    for precision, batch in (("fp32", 3), ("fp16", 1), ("fp16", 3), ("bf16", 1))
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
def test_plans_compute_what_the_evaluator_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = case_of(case, tmp_path, monkeypatch)
    for query in case[-1]:
        check(order.emissions[query], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda c: "-".join(map(str, c[:4])))
def test_every_graph_of_every_verifier(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = case_of(case, tmp_path, monkeypatch)
    for query in case[-1]:
        check(order.emissions[query], case)


def test_what_a_query_takes_and_gives_under_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`x` of `sample` and `mode` goes in and comes out: two buffers, bound by the graph's names."""
    case: Case = ("llama", {"kind": "cp"}, "fp32", 2, ())
    order = case_of(case, tmp_path, monkeypatch, queries=["sample", "mode"])
    for query in ("sample", "mode"):
        e = order.emissions[query]
        check(e, case)
        plan = plan_of(e, 2).plan("")
        bound = [(b.name, b.kind) for b in plan.buffers if b.kind in ("input", "output")]
        assert ("x", "input") in bound
        assert ("x_out", "output") in bound
        assert len({b.name for b in plan.buffers}) == len(plan.buffers)
    made = plan_of(e, 2)
    made.buffers.append(made.buffers[0])
    with pytest.raises(PccError, match="E189"):
        made.plan("")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
def test_the_runtime_takes_what_is_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, kinds, types and sizes of every graph's plan are those that the reader wants."""
    queries = ["draft", "loglik", *(["sample", "mode"] if case[0] == "llama" else [])]
    order, batch = case_of(case, tmp_path, monkeypatch, queries=queries), case[3]
    (tmp_path / "engines/cuda").mkdir(parents=True)
    for q, e in order.emissions.items():
        builder = partition(e.module, e.inputs, batch, WeightFile(), q)
        weights = tmp_path / "engines/cuda/weights.bin"
        weights.unlink(missing_ok=True)
        builder.weights.write(weights)
        (tmp_path / "p.json").write_bytes(builder.plan("c").dumps())
        spec: dict[str, Any] = {"graph": "p.json", "batch": batch, **listed(e)}
        past = [(i["name"][5:], i) for i in spec["inputs"] if i["name"].startswith("past.")]
        states = [
            {"name": n, "shape": i["shape"][1:], "rows_axis": 1 if "." in n else None}
            for n, i in past
        ]
        assert read_plan(tmp_path, q, spec, states).launches


def test_rings_that_have_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions beyond the ring's rows: slots are taken modulo its size."""
    case: Case = ("evabyte", {"size": WIDE}, "fp16", 2, ())
    order = case_of(case, tmp_path, monkeypatch, max_seq=450)
    e = order.emissions["verify"]
    ring = next(x for x in e.inputs if x.key == "past.key.0").shape[1]
    feed = random_inputs(e, 2, np.random.default_rng(0), 320)
    feed["length"] = np.array([ring + 57, ring - 2], np.int64)
    compare(meaning(e, feed), simulated(plan_of(e, 2), feed), tolerance=HALF)


@pytest.mark.parametrize("name", ["llama", "evabyte"])
def test_a_layer_is_five_launches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, residuals, gates, rotations and cache writes are parts of products and attention."""
    case: Case = (name, {"kind": "btree", "n": 4, "size": WIDE}, "fp16", 1, ())
    order = case_of(case, tmp_path, monkeypatch)
    weights = WeightFile()
    made = {q: partition(e.module, e.inputs, 1, weights, q) for q, e in order.emissions.items()}
    parts = ("qkv", "attention", "out", "gate_up", "down")
    layers = [f"layers.{i}.{p}" for i in range(WIDE.layers) for p in parts]
    for query in ("step", "step_greedy", "prefill", "verify", "decode"):
        names = [x.layer for x in made[query].launches]
        assert names[1 : 1 + len(layers)] == layers, query
    generated = [isinstance(x.kernel, Generated) for x in made["step"].launches]
    assert sum(generated) == 2, "decisions, then the draft"
    assert not any(isinstance(x.kernel, Generated) for x in made["decode"].launches)
    again = WeightFile()
    partition(order.emissions["verify"].module, order.emissions["verify"].inputs, 1, again)
    partition(order.emissions["decode"].module, order.emissions["decode"].inputs, 1, again)
    alone = WeightFile()
    partition(order.emissions["verify"].module, order.emissions["verify"].inputs, 1, alone)
    assert again.size == alone.size, "packed weights serve any number of rows"


def test_launches_have_the_names_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model and of the circuit: a round's time can be told by them."""
    names: dict[str, list[str]] = {}

    def look(order: Order) -> None:
        for q in ("step", "decode"):
            names[q] = [x.layer for x in plan_of(order.emissions[q], 1).launches]

    case: Case = ("evabyte", {"kind": "btree", "n": 4, "size": WIDE}, "bf16", 1, ())
    case_of(case, tmp_path, monkeypatch, look=look)
    assert names["decode"][0] == "embedding"
    assert names["decode"][-2:] == ["lm_head", "norm"]
    head, decisions, weights, draft = names["step"][1 + 5 * WIDE.layers :]
    assert head == "lm_head"
    assert re.fullmatch(r"\d+ ops of acceptance", decisions)
    assert weights == "c.sum {0-3}, c.categorical {0-3}"
    assert re.fullmatch(r"\d+ ops of c\.categorical \{0-3\}, c\.sum \{0-3\}, acceptance", draft)


def test_equal_launches_share_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = ("llama", {"size": WIDE}, "fp16", 1, ())
    made = plan_of(case_of(case, tmp_path, monkeypatch).emissions["decode"], 1)
    kernels = {x.layer: x.kernel.name for x in made.launches}
    assert kernels["layers.0.attention"] == kernels["layers.1.attention"]
    assert made.source().count('extern "C"') == len({x.kernel.name for x in made.launches})


# ---------------------------------------------------------------- faults that must show


def _broken_places(spans: list[Span]) -> tuple[list[int], int]:
    return [0] * len(spans), max(x.size for x in spans) + ALIGN


def _stale(self: building.Builder, old: Any, new: Any) -> int:
    """Update in place whoever reads the old value later."""
    at = self.value(old, "f32")
    self._values[new, "f32"] = at
    return at


@pytest.mark.parametrize(
    ("where", "what", "fault"),
    [(building, "place", _broken_places), (building.Builder, "updated", _stale)],
    ids=["scratch that overlaps", "a residual that others still read"],
)
def test_faults_are_caught(
    where: Any, what: str, fault: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case: Case = ("lora", {}, "fp16", 1, ())
    e = case_of(case, tmp_path, monkeypatch).emissions["step_greedy"]
    monkeypatch.setattr(where, what, fault)
    with pytest.raises(AssertionError):
        check(e, case)


# ---------------------------------------------------------------- small modules


def ran(outputs: dict[str, Any], feed: dict[str, Any], batch: int = 2) -> list[str]:
    """Check a module against the evaluator; return the names of its launches' ops."""
    module = Module("m", (), tuple(outputs.items()))
    e = Emission(module, tuple(n for n in module.nodes() if isinstance(n, t.Input)))
    made = plan_of(e, batch)
    compare(meaning(e, feed), simulated(made, feed), tolerance=2e-3)
    return [x.op.name for x in made.launches]


def weight(*shape: int, dtype: str = "f16") -> t.Const:
    rng = np.random.default_rng(sum(shape))
    return t.Const(Array.of(rng.normal(size=shape) / 8, dtype))


def rows(n: int, k: int, batch: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).normal(size=(batch, n, k)).astype(np.float32)


def test_sums_of_products() -> None:
    """Bias, residual and a factored product are one sum; a residual read later is copied."""
    x, y = t.Input("x", "f32", "b", (3, 40)), t.Input("y", "f32", "b", (3, 56))
    thin = t.Contract(t.Contract(x, weight(40, 4), "nd,dk->nk"), weight(4, 56), "nd,dk->nk")
    bias = t.Const(Array.of(np.linspace(-1, 1, 56).reshape(1, 56), "f32"))
    full = t.Add(t.Contract(x, weight(40, 56), "nd,dk->nk"), bias)
    base = t.Exp(y)
    total = t.Add(base, t.Add(full, thin))
    feed = {"x": rows(3, 40), "y": rows(3, 56)}
    ops = ran({"total": total, "base": t.Mul(base, base)}, feed)
    assert ops.count("t.contract") == 1
    assert ops.count("t.add") == 3, "a copy, and two products that add to it"
    ran({"total": total}, feed)


def test_a_residual_that_is_also_multiplied() -> None:
    """A residual x of x W is not updated in place: blocks would read what others have written."""
    x = t.Exp(t.Input("x", "f32", "b", (3, 48)))
    ran({"y": t.Add(x, t.Contract(x, weight(48, 48), "nd,dk->nk"))}, {"x": rows(3, 48)})


def test_projections_of_one_row() -> None:
    """Weights with their lost axis last, a head's, are packed without being turned in memory."""
    e = t.Input("e", "f32", "b", (40,))
    y = t.Contract(e, weight(3, 5, 37, 40), "d,abcd->abc")
    ops = ran({"y": t.LogSoftmax(y)}, {"e": rows(1, 40)[:, 0]})
    assert ops[0] == "t.contract"


def test_projections_of_one_vector_are_one_launch() -> None:
    """Several layers of a head read the same features: their matrices lie one below another."""
    e = t.Input("e", "f32", "b", (40,))
    heads = [t.Contract(e, weight(*shape, 40), "d,abd->ab") for shape in ((3, 5), (2, 33), (1, 7))]
    outs = {f"y{i}": t.Softmax(h) for i, h in enumerate(heads)}
    ops = ran(outs, {"e": rows(1, 40)[:, 0]})
    assert ops.count("t.contract") == 1


def test_the_norm_of_a_chosen_row() -> None:
    """Row s of norm(x) is norm(row s): the other rows are not normed."""
    x, s = t.Input("x", "f32", "b", (5, 96)), t.Input("length", "i64", "b", (1,))
    gain = t.Const(Array.of(np.linspace(0.5, 2, 96).astype(np.float32)))
    table = t.Reshape(nn.RmsNorm(t.Exp(x), gain, 1e-5), (1, 5, 96))
    ops = ran({"y": t.SelectRow(table, s)}, {"x": rows(5, 96), "length": np.array([[4], [1]])})
    assert ops == ["t.rms_norm"]


def test_outputs_that_are_no_values_of_their_own() -> None:
    x = t.Input("x", "f32", "b", (3, 4))
    y = t.Add(x, x)
    ran({"same": x, "a": y, "b": y, "flat": t.Reshape(y, (12,))}, {"x": rows(3, 4)})


def test_a_state_that_is_read_as_it_was_has_two_buffers() -> None:
    past = t.Input("past.key.0", "f32", "b", (2, 8, 16))
    start, new = t.Input("length", "i64", "b", ()), t.Input("x", "f32", "b", (2, 3, 16))
    written = nn.CacheWrite(past, new, start)
    feed = {
        "past.key.0": np.ones((2, 2, 8, 16), np.float32), "length": np.array([1, 4]),
        "x": rows(6, 16).reshape(2, 2, 3, 16),
    }  # fmt: skip
    outs = {"present.key.0": written, "old": t.ReduceSum(past, 1)}
    ran(outs, feed)
    ran({"present.key.0": written}, feed)


# ---------------------------------------------------------------- memory, files, errors


@pytest.mark.parametrize("seed", range(5))
def test_scratch_never_overlaps_while_alive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans = []
    for _ in range(200):
        first = int(rng.integers(0, 100))
        spans.append(Span(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 12))))
    offsets, total = place(spans)
    for i, (a, x) in enumerate(zip(spans, offsets, strict=True)):
        assert x % ALIGN == 0
        assert x + a.size <= total
        for b, y in zip(spans[:i], offsets[:i], strict=True):
            if a.first <= b.last and b.first <= a.last:
                assert x + a.size <= y or y + b.size <= x
    busiest = max(sum(s.size for s in spans if s.first <= i <= s.last) for i in range(112))
    assert total < 1.5 * busiest + ALIGN * 40, "memory is used again"


def test_files_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans name kernels that the machine code has, and weights that the file has."""
    from pcc.backends.cuda import emit

    case: Case = ("llama", {"size": WIDE}, "fp16", 1, ())
    order = case_of(case, tmp_path / "in", monkeypatch)
    kept = {q: e for q, e in order.emissions.items() if q in ("verify", "decode")}
    asked: dict[str, str] = {}

    def compiled(sources: dict[str, str], arch: str, say: Any) -> dict[str, bytes]:
        asked.update(sources)
        return {q: b"code of " + arch.encode() for q in sources}

    monkeypatch.setattr(emit, "compile_all", compiled)
    monkeypatch.setattr(emit, "find", Path)
    order = Order(order.name, kept, order.target, "fp16", 1, "sm_89")
    (tmp_path / "out").mkdir()
    written = emit.write_graphs(order, tmp_path / "out", lambda _: None)
    size = (tmp_path / "out/engines/cuda/weights.bin").stat().st_size
    assert written.variants[0]["gpu"] == "sm_89"
    for q in kept:
        plan = json.loads((tmp_path / "out" / written.specs[q]["graph"]).read_bytes())
        assert (tmp_path / "out" / plan["cubin"]).read_bytes() == b"code of sm_89"
        for b in plan["buffers"]:
            end = {"weight": size, "scratch": plan["scratch_bytes"]}.get(b["kind"])
            assert end is None or b["offset"] + b["bytes"] <= end
        for launch in plan["launches"]:
            assert f" {launch['kernel']}(" in asked[q]
            assert all(0 <= at < len(plan["buffers"]) for at in launch["args"])


@pytest.mark.wheel
def test_headers_of_the_kernels_are_installed() -> None:
    """Every header that a kernel includes lies where nvcc is told to look."""
    headers = {p.name: p.read_text() for p in nvcc.KERNELS.glob("*.cuh")}
    included = {n for text in headers.values() for n in re.findall(r'#include "(.+?)"', text)}
    assert included <= set(headers)
    assert {"linear.cuh", "attend.cuh", "rms_norm.cuh", "embedding.cuh"} <= set(headers)


@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc is here")
def test_nvcc_takes_what_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = ("llama", {"size": WIDE}, "bf16", 1, ())
    made = plan_of(case_of(case, tmp_path, monkeypatch).emissions["decode"], 1)
    said: list[str] = []
    codes = nvcc.compile_all({"a": made.source(), "b": made.source()}, "sm_90", said.append)
    assert codes["a"] == codes["b"]
    assert codes["a"][:4] == b"\x7fELF"
    assert len(said) == 1, "equal sources are compiled once"
    with pytest.raises(PccError) as caught:
        nvcc.compile_all({"a": "this is no CUDA"}, "sm_90")
    assert caught.value.code == "X403"


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.shutil, "which", lambda *_, **__: None)
    with pytest.raises(PccError) as caught:
        nvcc.find()
    assert caught.value.exit_code == 3
    assert "CUDA_HOME" in caught.value.hint


def test_architectures_that_the_compiler_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before a graph is lowered, by what nvcc lists."""
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && printf 'sm_80\\nsm_90\\n'\n")
    fake.chmod(0o755)
    for good in ("sm_80", "sm_90", "sm_90a"):
        nvcc.check_listed(fake, good)
    monkeypatch.setattr(emit, "find", lambda: fake)
    monkeypatch.setattr(emit, "partition", lambda *_: pytest.fail("it was lowered"))
    order = case_of(("llama", {}, "fp32", 1, ()), tmp_path, monkeypatch)
    with pytest.raises(PccError, match=r"E180.*does not compile for sm_100") as caught:
        emit.write_graphs(replace(order, gpu="sm_100"), tmp_path, print)
    assert "sm_80, sm_90" in caught.value.hint
