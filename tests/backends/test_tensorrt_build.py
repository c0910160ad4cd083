"""Engines are built without a GPU by TensorRT-RTX; what a parser would drop is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import pcc
from pcc.backends.tensorrt.build import Builder
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.legal import causal, check_network
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.conformance import models
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError
from pcc.frontends import templates

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
RTX = RUNTIMES["rtx"]
HEADS, WIDTH, ROWS, COUNT = 2, 64, 32, 4


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder(RTX, BuildOptions())


def attention(kind: str, half: bool = True) -> ir.Model:
    """One cache update and attention over it: by mask, by lengths, or causal."""
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    row, cache = [1, HEADS, COUNT, WIDTH], [1, HEADS, ROWS, WIDTH]
    value = helper.make_tensor_value_info
    ins = [value(x, dtype, row) for x in "qkv"]
    ins += [value(f"past_{x}", dtype, cache) for x in "kv"]
    ins.append(value("start", TensorProto.INT64, [1]))
    nodes = [
        helper.make_node("TensorScatter", [f"past_{x}", x, "start"], [f"present_{x}"], axis=-2)
        for x in "kv"
    ]
    operands, attributes = ["q", "present_k", "present_v"], {}
    if kind == "mask":
        operands.append("mask")
        ins.append(value("mask", dtype, [1, 1, COUNT, ROWS]))
    elif kind == "nonpad":
        operands += ["", "", "", "valid"]
        attributes["is_causal"] = 1
        ins.append(value("valid", TensorProto.INT64, [1]))
    elif kind == "causal":
        attributes["is_causal"] = 1
    nodes.append(helper.make_node("Attention", operands, ["y"], name="attend", **attributes))
    outs = [value("y", dtype, row)] + [value(f"present_{x}", dtype, cache) for x in "kv"]
    graph = helper.make_graph(nodes, "attention", ins, outs)
    opsets = [helper.make_opsetid("", 24)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


@pytest.mark.parametrize("half", [True, False])
def test_attention_over_a_cache_with_a_mask_builds(
    builder: Builder, tmp_path: Path, half: bool
) -> None:
    model = prepare(attention("mask", half), RTX)
    made = builder.build(model, saved(model, tmp_path))
    assert made.plan.nbytes > 1000
    assert made.layers > 3
    network, _parser = builder._parse(tmp_path / "graph.onnx")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = [layer.type.name for layer in layers]
    assert kinds.count("KV_CACHE_UPDATE") == 2  # TensorScatter became the layer that aliases
    assert "ATTENTION_INPUT" in kinds
    assert {causal(layer, builder.module) for layer in layers} <= {"", "NONE"}


@pytest.mark.parametrize(
    ("kind", "says"), [("nonpad", "nonpad_kv_seqlen"), ("causal", "is_causal=1")]
)
def test_a_dropped_operand_of_attention_is_refused(
    builder: Builder, tmp_path: Path, kind: str, says: str
) -> None:
    model = prepare(attention(kind), RTX)
    with pytest.raises(PccError, match=says) as found:
        builder.build(model, saved(model, tmp_path))
    assert found.value.code == "E431"


@pytest.mark.parametrize("kind", ["nonpad", "causal"])
def test_the_parsed_network_shows_what_was_dropped(
    builder: Builder, tmp_path: Path, kind: str
) -> None:
    """Were the first check blind, the second one finds the operand or the mask in the network."""
    model = prepare(attention(kind), RTX)
    flags = 1 << int(builder.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.builder.create_network(flags)
    parser = builder.module.OnnxParser(network, builder.messages.logger)
    assert parser.parse(saved(model, tmp_path).read_bytes(), str(tmp_path / "graph.onnx"))
    builder.messages.take()
    with pytest.raises(PccError) as found:
        check_network(network, model, RTX, builder.module)
    assert found.value.code == "E432"
    assert ("valid" in str(found.value)) == (kind == "nonpad")
    assert ("UPPER_LEFT" in str(found.value)) == (kind == "causal")


def one_op(op: str, dtype: int = TensorProto.FLOAT, **attributes: Any) -> ir.Model:
    value = helper.make_tensor_value_info
    node = helper.make_node(op, ["x"], ["y"], **attributes)
    ends = [value("x", dtype, [4]), value("y", dtype, [4])]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 24)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_float64_is_refused_rather_than_narrowed(builder: Builder, tmp_path: Path) -> None:
    model = prepare(one_op("Neg", TensorProto.DOUBLE), RTX)
    with pytest.raises(PccError, match="DOUBLE"):
        builder.build(model, saved(model, tmp_path))


def test_random_operators_are_refused(builder: Builder, tmp_path: Path) -> None:
    model = prepare(one_op("RandomUniformLike", seed=1.0), RTX)
    with pytest.raises(PccError, match="RandomUniformLike"):
        builder.build(model, saved(model, tmp_path))


def test_an_input_that_the_parser_loses_is_found(builder: Builder, tmp_path: Path) -> None:
    model = prepare(attention("mask"), RTX)
    path = saved(model, tmp_path)
    network, _parser = builder._parse(path)
    extra = ir.Value(name="lost", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(extra)
    with pytest.raises(PccError, match="changed the inputs: lost"):
        check_network(network, model, RTX, builder.module)


def test_types_and_shapes_are_compared(builder: Builder, tmp_path: Path) -> None:
    model = prepare(attention("mask"), RTX)
    network, _parser = builder._parse(saved(model, tmp_path))
    check_network(network, model, RTX, builder.module)
    model.graph.inputs[0].shape = ir.Shape([1, HEADS, COUNT + 1, WIDTH])
    with pytest.raises(PccError, match=r"made 'q' HALF\[1, 2, 4, 64\]"):
        check_network(network, model, RTX, builder.module)


def test_an_open_size_is_refused() -> None:
    model = attention("mask")
    model.graph.inputs[0].shape = ir.Shape(["batch", HEADS, COUNT, WIDTH])
    with pytest.raises(PccError, match="open"):
        prepare(model, RTX)


def test_options_of_a_build(tmp_path: Path) -> None:
    model = prepare(product(), RTX)
    path = saved(model, tmp_path)
    loose = BuildOptions(version_compatible=True)
    assert Builder(RTX, loose).build(model, path).plan.nbytes > 4 * 256 * 1024
    other = Builder(RTX, BuildOptions(capability="9.9"))
    with pytest.raises(PccError, match="SM99"):
        other.build(model, path)
    with pytest.raises(PccError, match="no option refit"):
        Builder(RTX, BuildOptions(refit="refit", strip=True))


def product() -> ir.Model:
    value = helper.make_tensor_value_info
    weight = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "product", [value("x", TensorProto.FLOAT, [4, 256])],
        [value("y", TensorProto.FLOAT, [4, 1024])],
        [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


# ---------------------------------------------------------------- whole bundles


@pytest.mark.parametrize(
    "head", ["btree", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ff", "cp", "hmm"))]
)
def test_drafts_of_every_head_build(tmp_path: Path, head: str) -> None:
    shape = (8, 40) if head == "ff" else (8, 3, 40)
    circuit = getattr(templates, head)(*shape, context=48, seed=0)
    made = pcc.compile(circuit, target="tensorrt-rtx", out=tmp_path / "m.pcc", validate=False)
    assert len(made.manifest["queries"]) == 9
    check_bundle(made)
    # Written out element by element, a tree's prefixes were a plan of a gigabyte.
    assert max(p.stat().st_size for p in made.path.glob("engines/*/*.plan")) < 1 << 25


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("llama", "fp16"), ("evabyte", "bf16"), ("gpt", "fp16"), ("byte-llama", "bf16"),
        *(pytest.param(kind, precision, marks=pytest.mark.slow)
          for kind, precisions in (("llama", ("fp32", "bf16")), ("evabyte", ("fp32", "fp16")))
          for precision in precisions),
    ],
)  # fmt: skip
def test_generation_of_toy_verifiers_builds(
    builder: Builder, tmp_path: Path, kind: str, precision: str
) -> None:
    built = {"step", "prefill", "decode"}
    source, folder = KINDS[kind](tmp_path)
    made = pcc.compile(
        source, verifier=folder, out=tmp_path / "m.pcc", queries=["draft"], max_seq=64, chunk=8,
        target="tensorrt-rtx", precision=precision, validate=False,
        engine={"only": ",".join(built)},
    )  # fmt: skip
    check_bundle(made, built)
    (variant,) = made.manifest["variants"]
    assert variant["precision"] == precision
    network, _parser = builder._parse(made.path / "graphs/step.onnx")
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    fused = kind != "evabyte" and precision != "fp32"
    assert kinds.count("ATTENTION_INPUT") == (2 if fused else 0)  # one for each layer
    assert kinds.count("KV_CACHE_UPDATE") == 4


@pytest.mark.parametrize(
    ("kind", "precision"), [("llama", "fp32"), ("llama", "bf16"), ("evabyte", "fp16"),
                            ("byte-llama", "fp16")],
)  # fmt: skip
def test_the_pass_builds_with_a_profile_for_each_width(
    builder: Builder, tmp_path: Path, kind: str, precision: str
) -> None:
    source, folder = KINDS[kind](tmp_path)
    made = pcc.compile(
        source, verifier=folder, out=tmp_path / "m.pcc", queries=["draft"], max_seq=64, chunk=16,
        target="tensorrt-rtx", precision=precision, validate=False,
        engine={"profiles": True, "only": "step"},
    )  # fmt: skip
    (variant,) = made.manifest["variants"]
    assert variant["said"] == []
    ((plan, profiles),) = variant["profiles"].items()
    assert (made.path / plan).stat().st_size > 1000
    assert [p["tokens"] for p in profiles] == [8 if kind == "byte-llama" else 4, 16]
    network, _parser = builder._parse(made.path / "graphs/pass.onnx")
    ids = next(network.get_input(i) for i in range(network.num_inputs)
               if network.get_input(i).name == "input_ids")  # fmt: skip
    assert tuple(ids.shape) == (1, -1)
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert kinds.count("KV_CACHE_UPDATE") == 4  # in place, with an open axis too


def test_profiles_share_the_weights(builder: Builder, tmp_path: Path) -> None:
    size = models.Size(256, 4, 4, 704, 0.25)
    folder = models.llama_folder(tmp_path / "model", noise=0.25, size=size)
    head = models.head("hmm", 4, 3, size=size)
    plans = []
    for profiles in (False, True):
        made = pcc.compile(
            head, verifier=folder, out=tmp_path / f"{profiles}.pcc", queries=["draft"], max_seq=64,
            chunk=16, target="tensorrt-rtx", precision="fp16", validate=False,
            engine={"profiles": profiles, "only": "verify"},
        )  # fmt: skip
        (plan,) = made.path.glob("engines/*/*.plan")
        plans.append(plan.stat().st_size)
    layers = 2 * 4 * (3 * 704 * 256 + 3 * 256 * 256)  # bytes of weights, about
    assert plans[0] > layers
    assert plans[1] - plans[0] < layers / 2


def check_bundle(made: Any, built: set[str] | None = None) -> None:
    """Engines are there, and the manifest says what they need."""
    (variant,) = made.manifest["variants"]
    assert (variant["provider"], variant["runtime"]) == ("tensorrt", "rtx")
    assert variant["gpu"] == "sm_89"
    assert variant["said"] == []
    for q, spec in made.manifest["queries"].items():
        assert spec["batch"] == 1
        if built is not None and q not in built:
            assert spec["graph"] == f"graphs/{q}.onnx"
            continue
        assert spec["graph"].startswith("engines/tensorrt-rtx-sm_89/")
        assert (made.path / spec["graph"]).stat().st_size > 1000


def test_what_is_missing_is_one_line_and_exit_3(tmp_path: Path) -> None:
    circuit = templates.cp(3, 2, 8, context=8, seed=0)
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(PccError) as found:
        pcc.compile(circuit, target="tensorrt", out=tmp_path / "m.pcc")
    assert found.value.exit_code == 3
    assert not (tmp_path / "m.pcc").exists()
    with pytest.raises(PccError) as refused:
        pcc.compile(circuit, target="tensorrt", precision="bf16", out=tmp_path / "m.pcc")
    assert refused.value.code == "E141"
