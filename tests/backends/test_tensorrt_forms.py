"""Graphs in the forms of each TensorRT compute what they did, as ONNX Runtime shows on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import pcc
from pcc.backends.onnx.lower import lower
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.legal import check_messages, check_model, summary
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.precision import pin, types_of
from pcc.backends.tensorrt.runtimes import RUNTIMES, runtime_for, runtime_of
from pcc.backends.tensorrt.write import static_model
from pcc.conformance.verifiers import KINDS
from pcc.emission import Order
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.targets import TARGETS
from pcc.tensor import ops as t
from pcc.tensor.ngram import LongestSuffix

OLD, RTX = RUNTIMES["8.6"], RUNTIMES["rtx"]
Values = np.ndarray[Any, Any]


def order_of(tmp: Path, kind: str, target: str, precision: str, monkeypatch: Any) -> Order:
    """What the compiler hands to the writer of a target, without a build."""
    kept: list[Order] = []

    class Enough(Exception):  # noqa: N818
        pass

    def keep(order: Order, folder: Path, say: object) -> None:
        kept.append(order)
        raise Enough

    monkeypatch.setattr("pcc.package.write_graphs", keep)
    source, folder = KINDS[kind](tmp)
    with pytest.raises(Enough):
        pcc.compile(
            source, verifier=folder, out=tmp / "m.pcc", max_seq=64, chunk=8, target=target,
            precision=precision, queries=["draft"], validate=False,
        )  # fmt: skip
    return kept[0]


def session(model: ir.Model) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feed_of(s: Any) -> dict[str, Values]:
    rng, feed = np.random.default_rng(0), {}
    for i in s.get_inputs():
        if "int64" in i.type:
            feed[i.name] = rng.integers(0, 20, i.shape)
        elif "bool" in i.type:
            feed[i.name] = np.ones(i.shape, bool)
        else:
            kind = np.float16 if "float16" in i.type else np.float32
            feed[i.name] = rng.random(i.shape).astype(kind)
    return feed | {k: np.full_like(feed[k], 5) for k in ("valid", "top_k") if k in feed}


def as_pairs(value: Values) -> Values:
    """The same bytes as the engine's border sees them."""
    if value.dtype != np.int64:
        return value
    return np.ascontiguousarray(value)[..., None].view(np.int32).reshape(*value.shape, 2)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("llama", "fp32"), ("evabyte", "fp16"), ("byte-llama", "fp32"),
     *(pytest.param(*x, marks=pytest.mark.slow)
       for x in (("llama", "fp16"), ("evabyte", "fp32"), ("byte-llama", "fp16")))],
)  # fmt: skip
def test_old_forms_compute_the_same(
    tmp_path: Path, kind: str, precision: str, monkeypatch: Any
) -> None:
    order = order_of(tmp_path, kind, OLD.target, precision, monkeypatch)
    for q, e in order.emissions.items():
        plain = lower(e.module, order.target, batch=1, inputs=e.inputs)
        made = static_model(order, q, e, OLD)
        check_model(made, OLD)
        onnx.checker.check_model(ir.to_proto(made), full_check=True)
        assert {n.op_type for n in made.graph}.isdisjoint(("CumSum", "LogSoftmax", "If", "Shape"))
        a, b = session(plain), session(made)
        feed = feed_of(a)
        want = a.run(None, feed)
        got = b.run(None, {k: as_pairs(v) for k, v in feed.items()})
        for o, x, y in zip(a.get_outputs(), want, got, strict=True):
            assert as_pairs(x).tobytes() == y.tobytes() or x.dtype.kind == "f", (q, o.name)
            if x.dtype.kind == "f":
                np.testing.assert_allclose(y, x, rtol=1e-5, atol=5e-6, err_msg=f"{q} {o.name}")


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceSum", "ReduceProd"])
@pytest.mark.parametrize(
    ("shape", "axes", "longer"),
    [([2, 3], [1], True), ([3, 2], [0], True), ([2, 4, 3], [-2], True), ([2, 2, 5], [0, 1], True),
     ([3, 1, 4], [1, 2], True), ([5, 5], [1], False), ([5, 1], [1], False), ([3, 2], [], False)],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0, 1])
def test_short_reductions_get_neutral_elements(
    op: str, shape: list[int], axes: list[int], longer: bool, keep: int
) -> None:
    value, out = (
        helper.make_tensor_value_info,
        np.zeros(shape).sum(tuple(axes), keepdims=bool(keep)),
    )
    node = helper.make_node(op, ["x", "a"], ["y"], keepdims=keep, noop_with_empty_axes=1)
    made = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, out.shape)],
        [helper.make_tensor("a", TensorProto.INT64, [len(axes)], axes)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    plain, formed = session(model.clone()), prepare(model, RTX)
    assert sum(n.op_type == "Concat" for n in formed.graph) == longer
    reduced = [n for n in formed.graph if n.op_type == op]
    whole = np.array([d for d in reduced[0].inputs[0].shape])  # type: ignore[union-attr]
    assert not axes or np.prod(whole[axes]) in (1, 5) or np.prod(whole[axes]) > 4
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=shape), rng.normal(size=shape) - np.inf, np.zeros(shape)):
        feed = {"x": x.astype(np.float32)}
        (want,), (got,) = plain.run(None, feed), session(formed).run(None, feed)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_reduction_of_integers_stays() -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("ReduceSum", ["x", "a"], ["y"], keepdims=0)
    made = helper.make_graph(
        [node], "g", [value("x", TensorProto.INT64, [3])], [value("y", TensorProto.INT64, [])],
        [helper.make_tensor("a", TensorProto.INT64, [1], [0])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    assert [n.op_type for n in prepare(model, RTX).graph] == ["ReduceSum"]


def test_64_bit_tables_are_refused_where_integers_have_32_bits() -> None:
    """A byte-Llama's table of n-grams is not one; 500 words over a vocabulary of 2^20 are."""
    keys = np.arange(1000).reshape(500, 2) + (1 << 20)
    op = LongestSuffix(
        t.Input("x", "i64", "b", (4,)), Array.of(keys), Array.of(np.arange(500)),
        Array.of(np.array([3])), 0,
    )  # fmt: skip
    target = replace(TARGETS[OLD.target], attention="parts")
    made = prepare(lower(Module("m", (), (("y", op),)), target, batch=1), OLD)
    with pytest.raises(PccError, match=r"32-bit integers; t\.longest_suffix needs 64") as found:
        check_model(made, OLD)
    assert found.value.code == "E431"


def graph_of(
    op: str, x: Values, origin: str, opset: int, *more: Any, **attributes: Any
) -> ir.Model:
    value = helper.make_tensor_value_info
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    node = helper.make_node(op, ["x", *(f"c{i}" for i in range(len(more)))], ["y"], **attributes)
    graph = helper.make_graph(
        [node], "one", [value("x", kind, x.shape)], [value("y", kind, x.shape)],
        [helper.make_tensor(f"c{i}", TensorProto.INT64, (), [m]) for i, m in enumerate(more)],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = ir.from_proto(proto)
    model.graph[0].metadata_props["pcc.op"] = origin
    return model


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("origin", ["t.cumsum", "t.inverse_cdf"])
def test_running_sums(axis: int, exclusive: int, origin: str) -> None:
    x = np.random.default_rng(1).random((2, 5, 7)).astype(np.float32)
    made = prepare(graph_of("CumSum", x, origin, 17, axis, exclusive=exclusive), OLD)
    assert "CumSum" not in {n.op_type for n in made.graph}
    (y,) = session(made).run(None, {"x": x})
    want = np.cumsum(x.astype(np.float64), axis)
    want -= exclusive * x
    np.testing.assert_allclose(y, want, atol=2e-6)


def test_running_sums_keep_minus_infinity_and_integers() -> None:
    x = np.array([[0.5, -np.inf, 2, 3, 4]], np.float32)
    made = prepare(graph_of("CumSum", x, "t.cumsum", 17, 1), OLD)
    (y,) = session(made).run(None, {"x": x})
    np.testing.assert_array_equal(y, np.cumsum(x, 1))
    made = prepare(graph_of("CumSum", x, "t.cumsum", 17, 1, exclusive=1), OLD)
    (y,) = session(made).run(None, {"x": x})
    np.testing.assert_array_equal(y, [[0, 0.5, -np.inf, -np.inf, -np.inf]])


def test_running_sums_from_the_end_are_refused() -> None:
    model = graph_of("CumSum", np.zeros((2, 4), np.float32), "t.cumsum", 17, 1, reverse=1)
    with pytest.raises(PccError, match=r"E434.*from the end"):
        prepare(model, OLD)


def test_running_sums_that_are_too_long() -> None:
    with pytest.raises(PccError, match=r"E434.*too long"):
        prepare(graph_of("CumSum", np.zeros((2, 4096), np.float32), "t.cumsum", 17, 1), OLD)


def test_reciprocals_of_spread_divisors_are_floats() -> None:
    """What a builder may do: multiply by 1 / y, each a float32 that is no denormal number."""
    x = np.array([[1e-38, 1e-30, 3e-39, 1.0, 2.0], [2e-38, 0.0, 1e-39, 1e30, -1e30]], np.float32)
    y = np.array([[1e-39, -1e-40, 2e-45, 3.0, -1e20]], np.float32)
    names = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape)
             for k, v in (("x", x), ("y", y))]  # fmt: skip
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, x.shape)
    graph = helper.make_graph([helper.make_node("Div", ["x", "y"], ["z"])], "g", names, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made = prepare(ir.from_proto(model), OLD)
    (last,) = [n for n in made.graph if n.op_type == "Div"]
    made.graph.outputs.extend(v for v in last.inputs if v is not None)
    z, above, below = session(made).run(None, {"x": x, "y": y})
    np.testing.assert_allclose(z, x.astype(np.float64) / y, rtol=1e-6)
    with np.errstate(over="raise"):
        np.testing.assert_allclose(above * (np.float32(1) / below), z, rtol=1e-6)
    assert (np.abs(below) > np.finfo(np.float32).tiny).all()


def test_no_number_beside_a_choice_is_minus_infinity() -> None:
    x = np.array([[0.5, -np.inf, 2.0], [-3.0, 1e-30, -1e30]], np.float32)
    c = np.array([[True, True, False], [False, True, True]])
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Where", ["c", "x", "low"], ["a"]),
        helper.make_node("Where", ["c", "low", "x"], ["b"]),
        helper.make_node("Where", ["c", "zero", "low"], ["d"]),
        helper.make_node("Equal", ["a", "low"], ["e"]),
        helper.make_node("Equal", ["low", "x"], ["f"]),
        helper.make_node("Equal", ["x", "deep"], ["g"]),
    ]
    kinds = {"a": 1, "b": 1, "d": 1, "e": 9, "f": 9}
    graph = helper.make_graph(
        nodes, "g", [value("c", 9, c.shape), value("x", 1, x.shape)],
        [*(value(k, v, (2, 3)) for k, v in kinds.items()), value("g", 9, (1, 2, 3))],
        [helper.make_tensor("low", 1, (1, 1), [-np.inf]), helper.make_tensor("zero", 1, (), [0.0]),
         helper.make_tensor("deep", 1, (1, 1, 1), [-np.inf])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    plain = ir.from_proto(model)
    want = session(plain).run(None, {"c": c, "x": x})
    made = prepare(ir.from_proto(model), OLD)
    held = [v.const_value.numpy() for v in made.graph.initializers.values() if v.const_value]
    assert not any(np.isneginf(v).any() for v in held if v.dtype.kind == "f")
    for a, b in zip(want, session(made).run(None, {"c": c, "x": x}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_of_masses_do_not_rise_where_a_mass_is_zero() -> None:
    x = np.random.default_rng(2).random((64, 320)).astype(np.float32)
    x[:, ::3] = 0
    x[:, :5] = 0
    made = prepare(graph_of("CumSum", x, "t.inverse_cdf", 17, 1), OLD)
    (y,) = session(made).run(None, {"x": x})
    rises = np.diff(y, axis=1, prepend=0)
    assert (rises >= 0).all()
    assert (rises[x == 0] == 0).all()


@pytest.mark.parametrize("r", [OLD, RTX], ids=lambda r: r.name)
def test_log_softmax_keeps_improbable_values(r: Any) -> None:
    x = np.array([[0, -200, 3e3, 5]], np.float32)
    made = prepare(graph_of("LogSoftmax", x, "t.log_softmax", r.opset, axis=1), r)
    (y,) = session(made).run(None, {"x": x})
    np.testing.assert_allclose(y, [[-3000, -3200, 0, -2995]], rtol=1e-6)


def test_negative_integers_cross_the_border_whole() -> None:
    x = np.array([[-1, 0, 7, -(1 << 31), (1 << 31) - 1]])
    made = prepare(graph_of("Identity", x, "t.x", 17), OLD)
    (y,) = session(made).run(None, {"x": as_pairs(x)})
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y.view(np.int64)[..., 0], x)


# ---------------------------------------------------------------- precision


class Tensor(SimpleNamespace):
    name: str


def layer(kind: str, ins: list[Tensor], outs: list[Tensor]) -> Any:
    made = SimpleNamespace(
        type=SimpleNamespace(name=kind), num_inputs=len(ins), num_outputs=len(outs),
        get_input=lambda i: ins[i], get_output=lambda i: outs[i], precision=None, results={},
    )  # fmt: skip
    made.set_output_type = lambda i, t: made.results.__setitem__(i, t)
    return made


def test_every_layer_that_computes_is_pinned_to_the_types_of_the_graph(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """A stand-in for a parsed network, from a real half-precision draft graph."""
    order = order_of(tmp_path, "llama", OLD.target, "fp16", monkeypatch)
    model = static_model(order, "draft", order.emissions["draft"], OLD)
    tensors: dict[str, Tensor] = {}

    def tensor(v: ir.Value) -> Tensor:
        kind = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BOOL": "BOOL"}.get(str(v.dtype.name), "INT32")
        made = Tensor(name=str(v.name), dtype=SimpleNamespace(name=kind))
        return tensors.setdefault(made.name, made)

    moves = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Gather", "Concat",
             "Where", "Split", "Identity")  # fmt: skip
    kinds = {"MatMul": "MATRIX_MULTIPLY", "Cast": "CAST"} | dict.fromkeys(moves, "SHUFFLE")
    layers = [
        layer(
            kinds.get(n.op_type, "ELEMENTWISE"), [tensor(x) for x in n.inputs if x],
            [tensor(x) for x in n.outputs],
        )
        for n in model.graph
    ]  # fmt: skip
    extra = Tensor(name="(parser's own)", dtype=SimpleNamespace(name="FLOAT"))
    layers.append(layer("SHUFFLE", [tensors[str(model.graph[-1].inputs[0].name)]], [extra]))
    wide = next(t for t in tensors.values() if t.dtype.name == "FLOAT")
    own = Tensor(name="(an identity)", dtype=SimpleNamespace(name="FLOAT"))
    layers.insert(-1, layer("IDENTITY", [wide], [own]))
    network = SimpleNamespace(num_layers=len(layers), get_layer=lambda i: layers[i])
    known = types_of(model)
    counts = pin(network, known, SimpleNamespace(DataType=SimpleNamespace(FLOAT=1, HALF=2)))
    assert known["(parser's own)"] == known["(an identity)"] == "FLOAT"
    assert counts["HALF"] > 0
    assert counts["FLOAT"] > 30
    for made in layers:
        kinds_in = {t.dtype.name for t in (made.get_input(i) for i in range(made.num_inputs))}
        outs = [made.get_output(i).dtype.name for i in range(made.num_outputs)]
        floats = {"FLOAT", "HALF"} & {*kinds_in, *outs}
        typed = {i: 2 if k == "HALF" else 1 for i, k in enumerate(outs) if k in ("FLOAT", "HALF")}
        if made.type.name == "CAST" or not floats:
            assert (made.precision, made.results) == (None, {})
        elif made.type.name in ("SHUFFLE", "IDENTITY"):  # moves have results, and no precision
            assert made.precision is None
            assert made.results == typed or made is layers[-1]
        else:
            assert made.precision == (2 if floats == {"HALF"} else 1)
            assert made.results == typed
    compared = [x for x in layers if x.get_output(0).dtype.name == "BOOL" and x.precision]
    assert compared  # comparisons of floats are not free to compare halves


# ---------------------------------------------------------------- data


def test_descriptions_and_targets_agree() -> None:
    for r in RUNTIMES.values():
        target = TARGETS[r.target]
        assert runtime_of(r.target) is r
        assert (target.format, target.opset) == ("tensorrt", r.opset)
        assert set(target.precisions) == set(r.precisions)
        assert target.typed == r.typed
        assert target.static
        assert not target.branches
        assert (target.kv == "scatter_io") == r.aliased == ("TensorScatter" not in r.refused)
        for p in set(TARGETS["cuda"].precisions) - set(r.precisions):
            with pytest.raises(PccError, match=f"no {p}"):
                r.takes(p)
    assert {t.name for t in TARGETS.values() if t.format == "tensorrt"} == {
        r.target for r in RUNTIMES.values()
    }


@pytest.mark.parametrize(
    ("module", "version", "name"),
    [("tensorrt", "8.6.1", "8.6"), ("tensorrt", "10.16.1.11", "10"), ("tensorrt", "11.4.0", "11"),
     ("tensorrt_rtx", "1.7.1.116", "rtx")],
)  # fmt: skip
def test_versions_find_their_description(module: str, version: str, name: str) -> None:
    assert runtime_for(module, version).name == name


@pytest.mark.parametrize("version", ["8.5.3", "10.9.0", "12.0", "x"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(PccError) as found:
        runtime_for("tensorrt", version)
    assert found.value.exit_code == 3


@pytest.mark.parametrize(
    "given",
    [{"level": 9}, {"refit": "often"}, {"hardware": "any"}, {"strip": True}, {"no": 1},
     {"level": "fast"}, {"strip": "maybe"}, {"workspace": 5},
     {"strip": True, "refit": "refit", "keep_onnx": False}],
)  # fmt: skip
def test_options_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PccError) as found:
        BuildOptions.of(given).check(RUNTIMES["10"])
    assert found.value.code == "E430"


def test_options_are_read_from_text_and_become_flags() -> None:
    options = BuildOptions.of({"strip": "true", "refit": "refit_identical", "level": "1"})
    options.check(RUNTIMES["11"])
    assert options.level == 1
    assert options.flags(RUNTIMES["11"]) == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    assert BuildOptions().flags(OLD) == ["OBEY_PRECISION_CONSTRAINTS"]
    assert BuildOptions.of({"only": "step,prefill"}).builds("step")
    assert not BuildOptions.of({"only": "step,prefill"}).builds("verify")


INT64 = (
    "onnx2trt_utils.cpp:374: Your ONNX model has been generated with INT64 weights, while TensorRT "
    "does not natively support INT64. Attempting to cast down to INT32."
)
CLAMPED = "One or more weights outside the range of {} was clamped"
INNER = "Tensor DataType is determined at build time for tensors not marked as input or output."


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("8.6", INT64, True),
        ("8.6", f"onnx2trt_utils.cpp:400: {CLAMPED.format('INT32')}", True),
        ("8.6", INNER, True),
        ("rtx", INNER, False),  # types are the graph's there: nothing is set
        ("rtx", INT64, False),
        ("rtx", "ModelImporter.cpp:1071: Make sure input x has Int64 binding.", True),
        ("rtx", "ModelImporter.cpp:1303: Make sure output x_out has Int64 binding.", True),
        ("8.6", "The logger passed into createInferBuilder differs from one already registered for "
         "an existing builder, runtime, or refitter.", True),
        ("8.6", "onnx2trt_utils.cpp:68: TensorRT is using FLOAT32 precision to run an INT32 ArgMax "
         "/ ArgMin. Rounding errors may occur for large integer values", False),
        ("8.6", "onnx2trt_utils.cpp:511: Your ONNX model has been generated with double-typed "
         "weights, while TensorRT does not natively support double.", False),
        ("8.6", f"onnx2trt_utils.cpp:540: {CLAMPED.format('FLOAT')}", False),
        ("8.6", "Unused Input: lengths", False),
        ("rtx", "Unused Input: lengths", False),
        ("8.6", f"Layer y is dropped. {INNER}", False),  # only how it begins counts
    ],
)  # fmt: skip
def test_warnings_that_say_nothing_about_results_are_known(
    name: str, text: str, passes: bool
) -> None:
    r = RUNTIMES[name]
    if passes:
        check_messages([("WARNING", text)], r)
        assert summary([("WARNING", text)], r) == []
    else:
        with pytest.raises(PccError) as found:
            check_messages([("WARNING", text)], r)
        assert found.value.code == "E433"
        assert len(summary([("WARNING", text)], r)) == 1
    with pytest.raises(PccError, match="says"):  # an error is one, whatever it says
        check_messages([("ERROR", text)], r)


@pytest.mark.parametrize("kind", ["llama", "evabyte"])
def test_graphs_for_8_6_avoid_what_its_parser_remarks_on(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No constant beyond 32 bits, no ArgMax or TopK of integers, no ellipsis in an Einsum."""
    order = order_of(tmp_path, kind, "tensorrt", "fp16", monkeypatch)
    for query, e in order.emissions.items():
        model = static_model(order, query, e, OLD)
        for v in model.graph.initializers.values():
            if v.dtype == ir.DataType.INT64 and v.const_value is not None:
                assert np.abs(v.const_value.numpy()).max(initial=0) < 1 << 31, v.name
        for node in model.graph:
            if node.op_type in ("ArgMax", "TopK"):
                assert node.inputs[0] is not None
                assert node.inputs[0].dtype == ir.DataType.FLOAT, node.name
            if node.op_type == "Einsum":
                assert "." not in node.attributes["equation"].as_string(), node.name


@pytest.mark.parametrize("forms", ["bc", "cb"])
def test_static_products_of_rows_and_contexts_have_no_ellipsis(forms: str) -> None:
    """Its parser knows none; a static graph has as many contexts as rows."""
    x = t.Input("x", "f32", forms[0], (2, 3))
    w = t.Input("w", "f32", forms[1], (2, 4, 3, 5))
    module = Module("m", (), (("y", t.Contract(x, w, "fi,foij->foj")),))
    model = lower(module, TARGETS["tensorrt"], batch=2)
    (node,) = [n for n in model.graph if n.op_type == "Einsum"]
    assert "." not in node.attributes["equation"].as_string()
    rng = np.random.default_rng(0)
    feed = {"x": rng.random((2, 2, 3), np.float32), "w": rng.random((2, 2, 4, 3, 5), np.float32)}
    (got,) = session(model).run(None, feed)
    want = np.einsum("zfi,zfoij->zfoj", feed["x"], feed["w"])
    np.testing.assert_allclose(got, want, rtol=1e-5)
