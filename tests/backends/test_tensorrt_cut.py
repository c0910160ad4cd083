"""A verifier's graph as a chain of engines of a few layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from fake_tensorrt import stand_in
from onnx import TensorProto, helper
from tensorrt_graphs import check_texts, compiled, random_feed, session, steps

import pcc
from pcc.backends.onnx.lower import lower
from pcc.backends.tensorrt.cut import cut, layers_in
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.conformance import models
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError
from pcc.targets import TARGETS

OLD, RTX = RUNTIMES["8.6"], RUNTIMES["rtx"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("evabyte", "8.6"), ("byte-llama", "8.6"), ("gpt", "rtx"), ("lora", "8.6")],
)
def test_a_chain_is_the_whole_graph(tmp_path: Path, kind: str, name: str) -> None:
    r = RUNTIMES[name]
    made = steps(kind, tmp_path).passed(4)

    def lowered() -> ir.Model:
        return prepare(lower(made.module, TARGETS[r.target], batch=2, inputs=made.inputs), r)

    whole = lowered()
    assert layers_in(whole) == 2
    have: dict[str, Any] = random_feed(whole, r, seed=1)
    want = session(whole).run(None, have)
    pieces = cut(lowered(), 1)
    assert len(pieces) == 2
    for piece in pieces:
        reads = [str(v.name) for v in piece.graph.inputs]
        gives = [str(v.name) for v in piece.graph.outputs]
        got = session(piece).run(None, {k: have[k] for k in reads})
        assert not set(gives) & set(have)
        have |= dict(zip(gives, got, strict=True))
    for v, a in zip(whole.graph.outputs, want, strict=True):
        assert a.tobytes() == have[str(v.name)].tobytes(), v.name
    # Layers are each in one of them, and floats alone are handed on: the residual, and angles.
    assert {k for p in pieces for v in p.graph.inputs if (k := str(v.name)).endswith(".1")} == {
        str(v.name) for v in pieces[1].graph.inputs if str(v.name).startswith("past.")
    }
    handed = [v for v in pieces[1].graph.inputs if str(v.name).startswith("handed/")]
    assert 1 <= len(handed) <= 3
    assert {v.dtype for v in handed} == {ir.DataType.FLOAT}
    width = next(v for v in whole.graph.outputs if v.name == "hidden").shape
    assert any(v.shape == width for v in handed)


def test_few_layers_are_one_graph(tmp_path: Path) -> None:
    made = steps("llama", tmp_path).passed(4)
    whole = prepare(lower(made.module, TARGETS[OLD.target], inputs=made.inputs, batch=1), OLD)
    assert cut(whole, 2) == [whole]


def test_integers_that_depend_on_layers_are_not_handed_on() -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], name="i", axis=0),
        helper.make_node("Add", ["x", "past.key.0"], ["a"], name="a"),
        helper.make_node("Add", ["a", "past.key.1"], ["c"], name="c"),
        helper.make_node("Gather", ["c", "i"], ["y"], name="y"),
    ]
    entries = [value(k, TensorProto.FLOAT, [3]) for k in ("x", "past.key.0", "past.key.1")]
    made = helper.make_graph(nodes, "g", entries, [value("y", TensorProto.FLOAT, [1])])
    model = ir.from_proto(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    )
    with pytest.raises(PccError, match="before layer 1") as found:
        cut(prepare(model, RTX), 1)
    assert found.value.code == "E430"


@pytest.mark.parametrize(("kind", "profiles"), [("evabyte", True), ("byte-llama", False)])
def test_texts_through_chains_are_those_of_the_host(
    tmp_path: Path, monkeypatch: Any, kind: str, *, profiles: bool
) -> None:
    trt = stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled(kind, OLD, tmp_path, profiles=profiles, layers="1")
    check_texts(kind, made, tmp_path)
    queries = ("step", "prefill", "step_greedy", "prefill_greedy")
    chains = (
        {f"pass-{i}" for i in (0, 1)} | set(queries)
        if profiles
        else {f"{q}-{i}" for q in queries for i in (0, 1)}
    )
    assert set(trt.engines) == chains
    listed = made.manifest["queries"]["decode"]["parts"]
    assert [Path(p["graph"]).stem for p in listed] == ["decode-0", "decode-1"]
    handed = [o for o in listed[0]["outputs"] if o["name"].startswith("handed/")]
    assert handed
    assert all(o["dtype"] == "f32" for o in handed)


def test_chains_take_other_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """`pcc refit` compares, and fills, each engine of a chain."""
    stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    made = compiled("llama", OLD, tmp_path, layers=1, refit="refit", only="step_greedy")
    source, model = KINDS["llama"](tmp_path / "again")
    again = pcc.refit(made.path, source, model, tmp_path / "n.pcc")
    (variant,) = again.manifest["variants"]
    assert {Path(f).stem for f in variant["engines"]} == {"pass-0", "pass-1", "step_greedy"}
    refit = json.loads(next(Path(again.path).glob("engines/*/refit.json")).read_text())
    assert set(refit) == {"pass-0", "pass-1", "step_greedy"}
    assert not any(w["changed"] for listed in refit.values() for w in listed)


def test_a_head_alone_has_no_layers(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "m.pcc")
    with pytest.raises(PccError, match="this bundle has none") as found:
        pcc.compile(models.head("hmm", 4, 3, vocab=40), target="tensorrt", queries=["draft"],
                    out=tmp_path / "m.pcc", engine={"layers": 1})  # fmt: skip
    assert found.value.code == "E430"
