"""A verifier's graph as a chain of engines of a few layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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


def check_chain(whole: ir.Model, pieces: list[ir.Model], name: str) -> None:
    """Need the bits of the whole graph, each layer in one piece, and floats alone handed on."""
    have: dict[str, Any] = random_feed(whole, RUNTIMES[name], seed=1)
    want, read = session(whole).run(None, have), list[str]()
    for piece in pieces:
        reads = [str(v.name) for v in piece.graph.inputs]
        gives = [str(v.name) for v in piece.graph.outputs]
        got = session(piece).run(None, {k: have[k] for k in reads})
        assert not set(gives) & set(have)
        have |= dict(zip(gives, got, strict=True))
        read += [k for k in reads if k.startswith("past.")]
    for v, a in zip(whole.graph.outputs, want, strict=True):
        assert a.tobytes() == have[str(v.name)].tobytes(), v.name
    assert sorted(read) == sorted({str(v.name) for v in whole.graph.inputs} & set(read))
    width = next(v for v in whole.graph.outputs if v.name == "hidden").shape
    for piece in pieces[1:]:  # the residual, and angles
        handed = [v for v in piece.graph.inputs if str(v.name).startswith("handed/")]
        assert 1 <= len(handed) <= 3
        assert {v.dtype for v in handed} == {ir.DataType.FLOAT}
        assert any(v.shape == width for v in handed)


def passes(made: Any, name: str) -> ir.Model:
    r = RUNTIMES[name]
    return prepare(lower(made.module, TARGETS[r.target], batch=2, inputs=made.inputs), r)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("evabyte", "8.6"), ("byte-llama", "8.6"), ("gpt", "rtx"), ("lora", "8.6")],
)
def test_a_chain_is_the_whole_graph(tmp_path: Path, kind: str, name: str) -> None:
    made = steps(kind, tmp_path).passed(4)
    whole = passes(made, name)
    assert layers_in(whole) == 2
    pieces = cut(passes(made, name), 1)
    assert len(pieces) == 2
    check_chain(whole, pieces, name)


@pytest.mark.parametrize(
    ("kind", "name", "layers", "count"),
    [("llama", "8.6", 1, 5), ("evabyte", "8.6", 2, 3), ("llama", "rtx", 2, 3)],
)
def test_a_long_chain_is_the_whole_graph(
    tmp_path: Path, kind: str, name: str, layers: int, count: int
) -> None:
    """What the first piece makes is handed on to the last, through all between."""
    made = steps(kind, tmp_path, size=replace(models.TINY, layers=5)).passed(4)
    pieces = cut(passes(made, name), layers)
    assert len(pieces) == count
    check_chain(passes(made, name), pieces, name)
    if RUNTIMES[name] == OLD:  # angles are made by the first alone
        first = {str(v.name) for v in pieces[0].graph.outputs}
        for piece in pieces[1:]:
            assert len({str(v.name) for v in piece.graph.inputs} & first) >= 2


def test_few_layers_are_one_graph(tmp_path: Path) -> None:
    made = steps("llama", tmp_path).passed(4)
    whole = prepare(lower(made.module, TARGETS[OLD.target], inputs=made.inputs, batch=1), OLD)
    assert cut(whole, 2) == [whole]


def drawn(nodes: list[tuple[str, str, str]], ins: str, outs: str) -> ir.Model:
    """Return a graph of floats: nodes by operator, what they read, what they give."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node(op, reads.split(), [gives], name=gives) for op, reads, gives in nodes],
        "g", [value(k, TensorProto.FLOAT, [3]) for k in ins.split()],
        [value(k, TensorProto.FLOAT, None) for k in outs.split()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    for v in model.graph.outputs:
        v.shape = ir.Shape([3])
    return prepare(model, RTX)


def test_integers_that_depend_on_layers_are_not_handed_on() -> None:
    nodes = [("ArgMax", "x", "i"), ("Add", "x past.key.0", "a"), ("Add", "a past.key.1", "c"),
             ("Gather", "c i", "d"), ("Add", "c d", "y")]  # fmt: skip
    with pytest.raises(PccError, match="before layer 1") as found:
        cut(drawn(nodes, "x past.key.0 past.key.1", "y"), 1)
    assert found.value.code == "E430"


@pytest.mark.parametrize(
    ("layers", "nodes", "ins"),
    [
        # a state of no layer, which the first piece writes
        (1, [("Add", "x past.s", "present.s"), ("Add", "x past.k.0", "a"),
             ("Add", "a past.k.1", "c"), ("Add", "c past.s", "y")], "past.s past.k.0 past.k.1"),
        # the same, two layers later
        (2, [("Add", "x past.s", "present.s"), ("Add", "present.s past.k.0", "a"),
             ("Add", "a past.k.1", "b"), ("Add", "b past.k.2", "c"), ("Add", "c past.s", "y")],
         "past.s past.k.0 past.k.1 past.k.2"),
    ],
)  # fmt: skip
def test_a_state_is_not_read_after_it_is_written(
    layers: int, nodes: list[tuple[str, str, str]], ins: str
) -> None:
    """In one engine it is written at the end; in a chain at the end of its piece."""
    with pytest.raises(PccError, match=r"'past\.s' is read after it is written") as found:
        cut(drawn(nodes, f"x {ins}", "y present.s"), layers)
    assert found.value.code == "E430"


def test_names_of_what_is_handed_on_are_new() -> None:
    nodes = [
        ("Add", "x past.k.0", "a"), ("Exp", "a", "handed/a"), ("Exp", "handed/a", "a~made"),
        ("Add", "a~made past.k.1", "c"), ("Add", "c a", "d"), ("Add", "d handed/a", "y"),
    ]  # fmt: skip
    whole = drawn(nodes, "x past.k.0 past.k.1", "y")
    feed = {k: np.arange(3, dtype=np.float32) / 8 for k in ("x", "past.k.0", "past.k.1")}
    (want,) = session(whole).run(None, feed)
    one, two = cut(drawn(nodes, "x past.k.0 past.k.1", "y"), 1)
    gives = [str(v.name) for v in one.graph.outputs]
    assert gives == ["handed/a~"]
    have: dict[str, Any] = feed | dict(
        zip(gives, session(one).run(None, {k: feed[k] for k in ("x", "past.k.0")}), strict=True)
    )
    (got,) = session(two).run(None, {str(v.name): have[str(v.name)] for v in two.graph.inputs})
    assert got.tobytes() == want.tobytes()


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
