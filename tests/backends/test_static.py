"""Graphs of GPU targets, run on a CPU: fixed sizes, weights as inputs, halves; same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from verifiers import KINDS, WINDOW, bundle

from pcc.backends.onnx import graph
from pcc.backends.onnx.lower import lower
from pcc.bundle import read_manifest
from pcc.interp.run import run
from pcc.ir.array import Array, dtype_of
from pcc.ir.module import Module
from pcc.ir.semiring import LogReal
from pcc.stored import Stages
from pcc.targets import HALF_OF, TARGETS
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
# First operands for which ONNX Runtime 1.31 has CUDA kernels (its docs/OperatorKernels.md), of what
# pcc emits. There is none for ArgMax of integers, Where of booleans, Einsum of bf16.
FLOATS, ANY = {"FLOAT", "FLOAT16", "BFLOAT16"}, {"FLOAT", "FLOAT16", "BFLOAT16", "INT64", "BOOL"}
NUMBERS = {"FLOAT", "INT64"}
KERNELS = {
    "Add": NUMBERS, "And": {"BOOL"}, "ArgMax": {"FLOAT"}, "Attention": FLOATS,
    "Cast": ANY | {"INT32", "INT8"}, "Clip": NUMBERS, "Concat": ANY, "CumSum": NUMBERS,
    "Div": NUMBERS, "Einsum": {"FLOAT", "FLOAT16"}, "Equal": NUMBERS | {"BOOL"},
    "Exp": {"FLOAT"}, "Expand": ANY, "Gather": ANY, "Greater": NUMBERS,
    "GreaterOrEqual": NUMBERS, "Identity": ANY,
    "Less": NUMBERS, "LessOrEqual": NUMBERS, "Log": {"FLOAT"}, "LogSoftmax": {"FLOAT"},
    "MatMul": FLOATS, "Max": NUMBERS, "Min": NUMBERS, "Mod": {"INT64"}, "Mul": NUMBERS,
    "Not": {"BOOL"}, "Or": {"BOOL"}, "RMSNormalization": FLOATS, "ReduceMax": NUMBERS,
    "ReduceMin": NUMBERS | {"INT32"}, "ReduceProd": {"FLOAT"}, "ReduceSum": NUMBERS,
    "Relu": FLOATS, "Reshape": ANY, "RotaryEmbedding": FLOATS, "ScatterElements": ANY,
    "Sigmoid": FLOATS, "Slice": ANY, "Softmax": FLOATS, "Split": ANY, "Squeeze": ANY,
    "Sub": NUMBERS, "TensorScatter": ANY, "TopK": NUMBERS, "Transpose": ANY, "Unsqueeze": ANY,
    "Where": {"BOOL"},
}  # fmt: skip
DYNAMIC = {"Shape", "Range", "If", "Loop", "Size", "NonZero"}
LENGTH = WINDOW - 2  # committed tokens: EvaByte's window edge lies within the pass
CASES = [
    *((kind, 1, "fp16") for kind in KINDS), ("llama", 1, "fp32"), ("evabyte", 1, "fp32"),
    ("llama", 3, "fp16"), ("evabyte", 3, "fp32"), ("byte-llama", 3, "fp32"),
]  # fmt: skip
# Of a value, relative to the largest beyond 1; margins are differences of sorted sums.
LIMITS = {"fp32": 5e-6, "fp16": 8e-3}


def inputs_of(spec: dict[str, Any], batch: int, vocab: int, seed: int) -> dict[str, Values]:
    """Return plausible inputs: ids, lengths, laws, states with noise in the rows that count."""
    rng = np.random.default_rng(seed)
    out: dict[str, Values] = {}
    for i in spec["inputs"]:
        name, shape = i["name"], [batch, *i["shape"][1:]]
        if name == "draft_q":
            out[name] = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)
        elif name == "length":
            out[name] = np.array([LENGTH, 5, 0][:batch])
        elif name == "valid":
            out[name] = np.array([3, 1, 2][:batch])
        elif name in ("window", "input_ids", "carry", "past.recent_ids"):
            out[name] = rng.integers(0, vocab, shape)
        elif i["dtype"] == "bool":
            out[name] = np.ones(shape, bool)
        elif name == "top_k":
            out[name] = np.array([0, 5, 1][:batch])
        elif name in ("temperature", "draft_temperature"):
            out[name] = np.array([1.0, 0.7, 0.0][:batch], np.float32)
        elif name in ("top_p", "draft_top_p"):
            out[name] = np.array([1.0, 0.9, 0.5][:batch], np.float32)
        elif name == "u":
            out[name] = rng.random(shape).astype(np.float32)
        else:
            out[name] = (rng.normal(size=shape) * 0.5).astype(dtype_of(i["dtype"]))
    return out


def answer(path: Path, query: str, spec: dict[str, Any], feed: dict[str, Values]) -> list[Values]:
    """Run a static graph on the CPU, its weights read from where the manifest says they lie."""
    weights = path / "graphs" / "weights.bin"
    for w in spec.get("weights", ()):
        feed[w["name"]] = np.memmap(
            weights, dtype_of(w["dtype"]), "r", w["offset"], tuple(w["shape"])
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        str(path / spec["graph"]), options, providers=["CPUExecutionProvider"]
    )
    assert {i.name for i in session.get_inputs()} == set(feed)
    assert all(isinstance(d, int) for i in session.get_inputs() for d in i.shape)
    return list(session.run([o["onnx"] for o in spec["outputs"]], feed))


def typed_ops(path: Path) -> set[str]:
    """Return the operators of a graph, whose types must agree and have kernels on CUDA."""
    model = onnx.load(path, load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type
             for v in (*graph.value_info, *graph.input, *graph.output)}  # fmt: skip
    kinds |= {i.name: i.data_type for i in graph.initializer}
    for n in graph.node:
        first = onnx.TensorProto.DataType.Name(kinds[n.input[0]])
        assert first in KERNELS[n.op_type], f"{n.op_type} of {first}"
        if n.op_type == "Where":
            assert onnx.TensorProto.DataType.Name(kinds[n.input[1]]) in NUMBERS
    return {n.op_type for n in graph.node}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-10"])
@pytest.mark.parametrize("kind", ["llama", "evabyte"])
def test_graphs_for_engine_builders_give_the_reference(
    kind: str, target: str, tmp_path: Path
) -> None:
    """What a builder reads, before it makes an engine of it."""
    path = bundle(kind, tmp_path, precision="fp16", max_seq=80, chunk=4, queries=["draft"],
                  validate=False)  # fmt: skip
    manifest = read_manifest(path)
    stages, vocab = Stages(path, manifest["files"]), manifest["generation"]["vocab"]
    for query in ("step", "prefill_greedy"):
        module, spec = stages.module(f"tensor-{query}"), manifest["queries"][query]
        rows = {i.key: i.shape for i in module.nodes() if isinstance(i, t.Input)}
        whole = {**spec, "inputs": [{**i, "shape": ["B", *rows[i["name"]]]}
                                    for i in spec["inputs"] if i["name"] in rows]}  # fmt: skip
        feed = inputs_of(whole, 2, vocab, seed=len(query) + 300)
        model = lower(module, TARGETS[target], batch=2)
        data = ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
        got = session.run(None, feed)
        agree(query, module, run(module.roots, feed, LogReal()), got, "fp16")


def agree(query: str, module: Module, want: Any, got: Any, precision: str) -> None:
    for (name, _), a, b in zip(module.outputs, want, got, strict=True):
        a = np.broadcast_to(a, b.shape)
        if b.dtype.kind in "ib":
            np.testing.assert_array_equal(a, b, err_msg=f"{query} {name}")
            continue
        scale = np.maximum(1.0, np.abs(np.where(np.isfinite(a), a, 0)).max())
        with np.errstate(invalid="ignore"):
            error = np.where(a == b, 0.0, np.abs(a - b.astype(np.float64))) / scale
        limit = LIMITS[precision] * (10 if name == "margin" else 1)
        assert float(error.max()) <= limit, f"{query} {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_graphs_are_well_typed(kind: str, tmp_path: Path) -> None:
    path = bundle(
        kind, tmp_path, target="onnx-cuda", precision="bf16", max_seq=80, chunk=4, validate=False
    )
    manifest = read_manifest(path)
    assert {"loglik", "sample", "step"} <= set(manifest["queries"])
    for spec in manifest["queries"].values():
        assert not typed_ops(path / spec["graph"]) & DYNAMIC
    past = [i["dtype"] for i in manifest["queries"]["step"]["inputs"]
            if i["name"].startswith(("past.key", "past.value", "past.summary"))]  # fmt: skip
    assert set(past) == {"bf16"}


def test_what_is_moved_between_half_products_is_not_cast() -> None:
    x = t.Input("x", "f32", "b", (2, 6))
    w = t.Const(Array.of(np.random.default_rng(0).normal(size=(6, 6)), "f16"))
    turned = t.Transpose(t.Contract(x, w, "nd,dk->nk"), (1, 0))
    y = t.Contract(t.Reshape(turned, (2, 6)), w, "nd,dk->nk")
    model = lower(Module("m", (), (("y", y),)), TARGETS["onnx-cuda"], batch=1)
    ops = [n.op_type for n in model.graph]
    assert ops.count("Cast") == 2  # before the first product and after the last
    assert ops.count("Transpose") > 0


@pytest.fixture(autouse=True)
def small_weights_are_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "STREAMED", 2048)


@pytest.mark.parametrize(("kind", "batch", "precision"), CASES)
def test_static_graphs_give_the_reference(
    kind: str, precision: str, batch: int, tmp_path: Path
) -> None:
    path = bundle(
        kind, tmp_path, target="onnx-cuda", precision=precision, batch=batch, max_seq=80, chunk=4,
        queries=["draft"], validate=False,
    )  # fmt: skip
    manifest = read_manifest(path)
    assert manifest["precision"].get("verifier", "fp32") == precision
    assert len(manifest["generation"]["buckets"]) == 1
    stages, vocab = Stages(path, manifest["files"]), manifest["generation"]["vocab"]
    bound: list[dict[str, Any]] = []
    for query, spec in manifest["queries"].items():
        assert not typed_ops(path / spec["graph"]) & DYNAMIC, query
        assert spec["batch"] == batch
        bound += spec.get("weights", ())
        feed = inputs_of(spec, batch, vocab, seed=len(query) + 300)
        module = stages.module(f"tensor-{query}")
        want = run(module.roots, feed, LogReal())
        got = answer(path, query, spec, dict(feed))
        agree(query, module, want, got, precision)
    assert {HALF_OF[precision]} <= {w["dtype"] for w in bound} <= {HALF_OF[precision], "f32"}


@pytest.mark.parametrize(
    ("kind", "precision"), [("llama", "fp16"), ("evabyte", "fp32"), ("lora", "bf16")]
)
def test_graphs_with_8_bit_weights(kind: str, precision: str, tmp_path: Path) -> None:
    """Integers are no inputs but numbers of the graph, so that they are widened when it is loaded.

    Every operator has a CUDA kernel for its types; numbers are those of the evaluator, where a CPU
    has the precision.
    """
    path = bundle(
        kind, tmp_path, target="onnx-cuda", precision=precision, int8="all", max_seq=80, chunk=4,
        queries=["draft"], validate=False,
    )  # fmt: skip
    manifest = read_manifest(path)
    assert manifest["precision"]["verifier"] == f"{precision}+int8"
    stages, vocab = Stages(path, manifest["files"]), manifest["generation"]["vocab"]
    for query, spec in manifest["queries"].items():
        assert not typed_ops(path / spec["graph"]) & DYNAMIC, query
        assert "i8" not in {w["dtype"] for w in spec.get("weights", ())}
        held = onnx.load(path / spec["graph"], load_external_data=False).graph.initializer
        integers = [i for i in held if i.data_type == onnx.TensorProto.INT8]
        module = stages.module(f"tensor-{query}")
        products = {n.b for n in module.nodes() if isinstance(n, t.ScaledContract)}
        assert len(integers) == len(products) > 0, query
        if precision != "bf16":
            feed = inputs_of(spec, 1, vocab, seed=len(query) + 300)
            want = run(module.roots, feed, LogReal())
            agree(query, module, want, answer(path, query, spec, dict(feed)), precision)


@pytest.mark.parametrize("kind", ["llama", "evabyte", "gpt", "lora"])
def test_nodes_say_which_layer_they_are_of(kind: str, tmp_path: Path) -> None:
    """Of the model: what a profiler of any runtime says of a node can be told by it."""
    made = bundle(kind, tmp_path, target="onnx-cuda")
    model = onnx.load(made / "graphs/verify.onnx", load_external_data=False)
    layers = [p.value for n in model.graph.node for p in n.metadata_props if p.key == "pcc.layer"]
    named = {x for x in layers if x in ("embedding", "norm", "lm_head") or x.startswith("layers.")}
    assert named >= {"embedding", "norm", "lm_head"}
    assert named >= {f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")}
    assert sum(x in named for x in layers) > 0.8 * len(layers)
