"""The verifier's pass as one engine with a profile for each width; what follows it apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fake_tensorrt import stand_in
from onnx import TensorProto, helper
from tensorrt_graphs import PROMPT, check_texts, compiled, random_feed, session, steps

import pcc
from pcc.backends.onnx.lower import lower
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.merge import merge
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.conformance import models
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError
from pcc.generation import Request, build
from pcc.interp.run import run
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.passes.manager import Manager
from pcc.runtime.device.driver import Device
from pcc.runtime.device.parts import select
from pcc.runtime.measure_gpu import graph_times
from pcc.targets import TARGETS

OLD, RTX = RUNTIMES["8.6"], RUNTIMES["rtx"]
WIDTHS = (1, 4, 33)


@pytest.mark.parametrize(
    ("kind", "name", "batch"),
    [("llama", "8.6", 1), ("llama", "8.6", 2), ("llama", "rtx", 2), ("gpt", "8.6", 1),
     ("byte-llama", "rtx", 1), ("byte-llama", "rtx", 2), ("evabyte", "8.6", 1),
     ("evabyte", "8.6", 2), ("evabyte", "rtx", 1), ("lora", "8.6", 1)],
)  # fmt: skip
def test_at_each_width_the_merged_graph_is_the_static_one(
    tmp_path: Path, kind: str, name: str, batch: int
) -> None:
    r, work = RUNTIMES[name], steps(kind, tmp_path)

    def lowered() -> list[ir.Model]:
        graphs = [work.passed(w) for w in WIDTHS]
        target = TARGETS[r.target]
        return [prepare(lower(g.module, target, batch=batch, inputs=g.inputs), r) for g in graphs]

    merged = merge(lowered(), wide=r.wide)
    assert set(merged.sizes.values()) >= {WIDTHS}
    assert merged.tables
    whole = session(merged.model)
    assert [i.name for i in whole.get_inputs()][-1] in merged.tables
    for at, static in enumerate(lowered()):
        feed = random_feed(static, r, seed=at)
        want = session(static).run(None, feed)
        got = whole.run(None, feed | {k: v[at] for k, v in merged.tables.items()})
        for a, b in zip(want, got, strict=True):
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def answers(module: Module, feed: Mapping[str, Any]) -> dict[str, Any]:
    values = run(module.roots, feed, Real())
    return dict(zip([name for name, _ in module.outputs], values, strict=True))


def test_pass_and_rest_are_the_round(tmp_path: Path) -> None:
    """In the float64 evaluator, whatever the graph, its two halves give what it gives."""
    source, folder = KINDS["byte-llama"](tmp_path)
    made = build(Request(folder, 32, chunk=3, static=True), source, Manager(), lambda _: None)
    rng = np.random.default_rng(0)
    for name, graph in made.graphs.items():
        feed: dict[str, Any] = {}
        for i in graph.inputs:
            shape = (2, *i.shape)
            x: Any = rng.random(shape)
            if i.dtype == "i64":
                x = rng.integers(0, 4 if i.key == "valid" else 9, shape)
            elif i.dtype == "bool":
                x = np.array([True, False])
            feed[i.key] = x
        feed |= {"draft_q": np.full_like(feed["draft_q"], 1 / 268)} if "draft_q" in feed else {}
        whole = answers(graph.module, feed)
        have = dict(feed)
        first, *rest = made.parts(name)
        assert (first.name, first.size) == ("pass", graph.inputs[0].shape[0])
        got: dict[str, Any] = {}
        for part in (first, *rest):
            given = {i.key: have[part.arrays.get(i.key, i.key)] for i in part.emission.inputs}
            outs = answers(part.emission.module, given)
            for local, value in outs.items():
                have[part.arrays.get(local, local)] = got[part.arrays.get(local, local)] = value
        for o, value in whole.items():
            assert np.array_equal(got[o], value), (name, o)
        read = {i.key for p in rest for i in p.emission.inputs}
        assert not any(k.startswith("past.key") for k in read)
        assert bool(rest)  # recent ids, at least


# ---------------------------------------------------------------- what cannot be merged


def graph(nodes: list[Any], sizes: Mapping[str, Any], shape: list[int], out: list[int]) -> ir.Model:
    value = helper.make_tensor_value_info
    initial = []
    for name, x in sizes.items():
        a = np.asarray(x)
        kind = TensorProto.INT64 if a.dtype.kind == "i" else TensorProto.FLOAT
        a = a.astype(np.int64 if a.dtype.kind == "i" else np.float32)
        initial.append(helper.make_tensor(name, kind, a.shape, a.tobytes(), raw=True))
    made = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, out)],
        initial,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    return prepare(model, RTX)


def one(op: str, *xs: str, **attributes: Any) -> list[Any]:
    return [helper.make_node(op, ["x", *xs], ["y"], name=op, **attributes)]


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (graph(one("Neg"), {}, [2], [2]), graph(one("Abs"), {}, [3], [3]), "differ"),
        (graph(one("Softmax", axis=0), {}, [2, 2], [2, 2]),
         graph(one("Softmax", axis=1), {}, [3, 2], [3, 2]), "differ"),
        (graph([*one("Neg")], {}, [2], [2]),
         graph([helper.make_node("Neg", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])],
               {}, [3], [3]), "numbers of nodes"),
        (graph(one("Slice", "s", "e"), {"s": [0], "e": [1]}, [4], [1]),
         graph(one("Slice", "s", "e"), {"s": [0], "e": [2]}, [5], [2]), "sizes that differ"),
        (graph(one("Expand", "s"), {"s": [2, 4]}, [1, 4], [2, 4]),
         graph(one("Expand", "s"), {"s": [3, 4]}, [1, 4], [3, 4]), "repeats"),
        (graph(one("Reshape", "s"), {"s": [2, 3]}, [6], [2, 3]),
         graph(one("Reshape", "s"), {"s": [3, 4]}, [12], [3, 4]), "2 sizes that differ"),
        (graph(one("Add", "k"), {"k": [1.0]}, [2], [2]),
         graph(one("Add", "k"), {"k": [[1.0]]}, [3], [1, 3]), "numbers of axes"),
        (graph(one("Sub", "x"), {}, [2], [2]),
         graph(one("Sub", "k"), {"k": [1.0, 2.0, 3.0]}, [3], [3]), "same kind"),
    ],
)  # fmt: skip
def test_graphs_that_are_not_one_are_refused(a: ir.Model, b: ir.Model, says: str) -> None:
    with pytest.raises(PccError, match=says) as found:
        merge([a.clone(), b.clone()], wide=True)
    assert found.value.code == "E436"


def test_wiring_is_compared() -> None:
    def pair(first: str, second: str, size: int) -> ir.Model:
        nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"]),
                 helper.make_node("Sub", [first, second], ["y"])]  # fmt: skip
        return graph(nodes, {}, [size], [size])

    assert merge([pair("a", "b", 2), pair("a", "b", 3)], wide=True).sizes == {"n_2_3": (2, 3)}
    with pytest.raises(PccError, match="unlike places"):
        merge([pair("a", "b", 2), pair("b", "a", 3)], wide=True)


def test_tables_beyond_32_bits_are_refused_where_there_are_none() -> None:
    def added(size: int) -> ir.Model:
        nodes = [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
                 helper.make_node("Add", ["i", "k"], ["j"]),
                 helper.make_node("Cast", ["j"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
        return graph(nodes, {"k": np.arange(size) + (1 << 31)}, [size], [size])

    assert merge([added(2), added(3)], wide=True).tables["table.0"][1].dtype == np.int64
    with pytest.raises(PccError, match="64-bit"):
        merge([added(2), added(3)], wide=False)


# ---------------------------------------------------------------- a bundle, and its texts


@pytest.mark.parametrize("kind", ["llama", "evabyte", "lora"])
def test_texts_through_profiles_are_those_of_the_host(
    tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled(kind, OLD, tmp_path)
    check_texts(kind, made, tmp_path)
    # One engine for the pass: rounds and prompts have contexts of their own, of their profile.
    assert set(trt.engines) == {"pass", "step", "prefill", "step_greedy", "prefill_greedy"}
    ran = sorted(c.profile for c in trt.engines["pass"].contexts if c.runs)
    assert ran == [0, 0, 1, 1]
    assert trt.cu.calls["cuGraphLaunch"] > 10


@pytest.mark.parametrize("chunk", [1, 4])
def test_passes_of_one_width_have_no_profiles(tmp_path: Path, monkeypatch: Any, chunk: int) -> None:
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path, chunk=chunk)
    assert "profiles" not in made.manifest["variants"][0]
    source, model = KINDS["llama"](tmp_path / "again")
    how: dict[str, Any] = {"max_seq": 128, "chunk": chunk, "queries": ["draft"]}
    pcc.compile(source, verifier=model, out=tmp_path / "host.pcc", **how)
    host = pcc.load(tmp_path / "host.pcc", threads=1)
    engine = pcc.load(made.path, provider="tensorrt")
    want, got = (e.session(greedy=True).generate(PROMPT, 40) for e in (host, engine))
    assert got.bytes == want.bytes
    # A prompt that is read token by token is an engine of its own, as `decode` is.
    whole = {"prefill_greedy"} if chunk == 1 else {"pass"}
    assert set(trt.engines) == {"pass", "step_greedy", "prefill_greedy"} | whole


def test_the_manifest_names_profiles(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path)
    (variant,) = made.manifest["variants"]
    ((plan, profiles),) = variant["profiles"].items()
    assert plan == "engines/tensorrt-sm_90/pass.plan"
    assert [p["tokens"] for p in profiles] == [4, 8]
    assert [p["shapes"]["input_ids"] for p in profiles] == [[1, 4, 2], [1, 8, 2]]
    queries = made.manifest["queries"]
    at = {q: [p.get("profile") for p in spec.get("parts", ())] for q, spec in queries.items()}
    assert at == {"draft": [], "step": [0, None], "step_greedy": [0, None],
                  "prefill": [1, None], "prefill_greedy": [1, None], "verify": [0],
                  "decode": []}  # fmt: skip
    assert not (made.path / "graphs/verify.onnx").exists()


def test_only_some_queries(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path, only="step_greedy,prefill_greedy")
    plans = {p.name for p in made.path.glob("engines/*/*.plan")}
    assert plans == {"pass.plan", "step_greedy.plan", "prefill_greedy.plan"}
    engine = pcc.load(made.path, provider="tensorrt")
    assert len(engine.session(greedy=True).generate(PROMPT, 9).bytes) == 9
    with pytest.raises(PccError, match="'step' has no engine"):
        engine.executor("step")


def test_a_head_alone_has_no_pass(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    with pytest.raises(PccError, match="no verifier") as found:
        pcc.compile(models.head("hmm", 4, 3, vocab=40), target="tensorrt", queries=["draft"],
                    out=tmp_path / "m.pcc", engine={"profiles": True})  # fmt: skip
    assert found.value.code == "E430"


def test_a_profile_of_ranges_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path)
    engine = pcc.load(made.path, provider="tensorrt")
    engine.executor("verify")
    found = trt.engines["pass"]
    plain = found.get_tensor_profile_shape
    found.get_tensor_profile_shape = lambda n, p: [(1, 2, 2), *plain(n, p)[1:]]
    with pytest.raises(PccError, match="has sizes") as refused:
        engine.executor("step_greedy")
    assert refused.value.code == "X334"
    found.get_tensor_profile_shape = plain
    context = found.create_execution_context()
    context.set_optimization_profile_async = lambda p, s: False
    with pytest.raises(PccError, match="refuses profile 0"):
        select(found, context, 0, engine.runner.device, 0, "verify")


def raising() -> list[str]:
    raise RuntimeError("no\nshapes")


@pytest.mark.parametrize(
    ("infer", "says"),
    [(lambda: ["table.0"], "wants more of 'table.0'"), (raising, "profile 1: no shapes")],
)
def test_shapes_that_do_not_follow_are_refused(
    tmp_path: Path, monkeypatch: Any, infer: Any, says: str
) -> None:
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    engine = pcc.load(compiled("llama", OLD, tmp_path).path, provider="tensorrt")
    engine.executor("verify")
    found = trt.engines["pass"]
    context = found.create_execution_context()
    context.infer_shapes = infer
    with pytest.raises(PccError, match=says) as refused:
        select(found, context, 1, engine.runner.device, 0, "prefill")
    assert refused.value.code == "X334"


def test_sizes_are_those_of_the_context(tmp_path: Path, monkeypatch: Any) -> None:
    """An engine gives of an output the sizes of its first profile; a second one has others."""
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    engine = pcc.load(compiled("llama", OLD, tmp_path).path, provider="tensorrt")
    sizes = {}
    for query in ("verify", "prefill"):
        _, run = engine.executor(query)
        sizes[query] = run.runs[0].sizes["logits"]
    assert trt.engines["pass"].get_tensor_shape("logits") == (1, 4, 258)
    assert sizes == {"verify": 4 * 258 * 4, "prefill": 8 * 258 * 4}


def test_a_round_whose_prompts_are_as_wide_has_one_pass_and_is_timed(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """What large models are timed with: one copy of the verifier, and no other engines beside."""
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path, chunk=4, only="step,prefill,draft")
    plans = {p.name for p in made.path.glob("engines/*/*.plan")}
    assert plans == {"pass.plan", "step.plan", "prefill.plan", "draft.plan"}
    engine = pcc.load(made.path, provider="tensorrt")
    monkeypatch.setattr(Device, "elapsed", lambda *_: 1.0)  # no clock is stood in for
    times = graph_times(engine, "step", 5, 1, 5, 1.0)
    assert set(times) == {"step", "verify", "draft"}  # `verify` is nothing but the pass
    assert times["step"]["session"]["p50"] > 0
    assert set(trt.engines) == {"pass", "step", "prefill", "draft"}
