"""Places, ranks and drawn indices for TensorRT 8.6 rest on nothing that it does not keep.

That is: its order among equal elements, its treatment of -inf, subnormal numbers in a product,
remainders of large integers. ONNX
Runtime stands in on a CPU, with an `ArgMax` of the last of equal elements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from pcc.backends.onnx import ngram_rules
from pcc.backends.onnx.lower import lower
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.legal import check_model
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.conformance.cases import feeds
from pcc.conformance.ops import Numbered, numbered
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.targets import TARGETS
from pcc.tensor import ops as t
from pcc.tensor.ngram import LongestSuffix
from pcc.tensor.nn import SortRank
from pcc.tensor.sampling import Truncate

OLD = RUNTIMES["8.6"]
Values = np.ndarray[Any, Any]
SMALL = ngram_rules.MOST
KINDS = ("t.argmax", "t.sort_rank", "t.inverse_cdf", "t.temper", "t.truncate")
CASES = [c for c in numbered((), "tensorrt") if c.case.op.name in KINDS]


def formed(module: Module, batch: int) -> ir.Model:
    return prepare(lower(module, TARGETS["tensorrt"], batch=batch), OLD)


def answers(model: ir.Model, feed: dict[str, Values]) -> dict[str, Values]:
    """Outputs where `ArgMax` takes the last of equal elements; 64-bit integers cross in pairs."""
    pairs = {k: v[..., None].view(np.int32).reshape(*v.shape, 2) if v.dtype == np.int64 else v
             for k, v in feed.items()}  # fmt: skip
    for node in model.graph:
        if node.op_type == "ArgMax":
            node.attributes.add(ir.AttrInt64("select_last_index", 1))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    s = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in s.get_outputs()]
    read = {i.name for i in s.get_inputs()}
    return dict(zip(names, s.run(None, {k: v for k, v in pairs.items() if k in read}), strict=True))


def whole(pair: Values) -> Values:
    """The 64-bit integers that a pair of words is."""
    return np.ascontiguousarray(pair).view(np.int64)[..., 0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("numbered", CASES, ids=lambda c: c.title)
def test_ops_that_order_are_those_of_the_definition(numbered: Numbered, batch: int) -> None:
    """The suite's edge inputs: ties, rows of -inf, masses below the smallest normal number."""
    module, made = numbered.module()
    feed = feeds(numbered.case, made, batch, batch, numbered.prefix)
    model = formed(module, batch)
    check_model(model, OLD)
    got = answers(model, feed)
    values = run(module.roots, dict(feed), Real())
    for (name, _), want in zip(module.outputs, values, strict=True):
        want, y = np.asarray(want), got[name]
        if want.dtype.kind == "i":
            np.testing.assert_array_equal(whole(y), np.broadcast_to(want, y.shape[:-1]), name)
        else:
            np.testing.assert_allclose(y, np.broadcast_to(want, y.shape), rtol=4e-6, atol=4e-6)


def one(op: Op, batch: int) -> ir.Model:
    return formed(Module("m", (), (("y", op),)), batch)


def rows_of(width: int, seed: int) -> Values:
    """Rows with many ties, at the maximum too; some elements -inf, all, and all but the last."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (9, width)).astype(np.float32)
    x[1] = -np.inf
    x[2, :-1] = -np.inf
    x[3, ::2] = -np.inf
    x[4] = 0.0
    x[5] = np.where(rng.random(width) < 0.5, 0.0, -0.0)
    x[6] = np.finfo(np.float32).max
    x[7] = -3.3e38
    return x


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 320, 1024])
def test_the_first_of_equal_elements(width: int) -> None:
    x = rows_of(width, width)
    made = one(t.ArgMax(t.Input("x", "f32", "b", (width,))), len(x))
    got = whole(answers(made, {"x": x})["y"])
    want = [min(i for i, v in enumerate(row) if v == max(row)) for row in x.tolist()]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("keep", [0, 1])
def test_along_any_axis(axis: int, keep: int) -> None:
    x = np.random.default_rng(axis % 3).integers(0, 2, (3, 5, 4)).astype(np.float32)
    want = np.argmax(x, axis, keepdims=bool(keep))
    made = prepare(of_one("ArgMax", x, want, axis=axis, keepdims=keep), OLD)
    np.testing.assert_array_equal(whole(answers(made, {"x": x})["y"]), want)


def of_one(op: str, x: Values, y: Values, **attributes: Any) -> ir.Model:
    value, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], **attributes)], "g",
        [value("x", kind(x.dtype), x.shape)], [value("y", kind(y.dtype), y.shape)],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(proto)


def test_no_index_leaves_the_row_if_the_maximum_is_not_met_again() -> None:
    """Compiled code may make x twice, in two orders of rounding: the runtime's index is kept."""
    x = np.array([[1, 3, 2, 3], [4, 0, 1, 2]], np.float32)
    made = prepare(of_one("ArgMax", x, x[:, 0].astype(np.int64), axis=1, keepdims=0), OLD)
    (node,) = [n for n in made.graph if n.op_type == "GreaterOrEqual"]
    spoilt = ir.node("Add", [node.inputs[1], node.inputs[1]])  # 2 max: no element reaches it
    made.graph.insert_before(node, spoilt)
    node.replace_input_with(1, spoilt.outputs[0])
    got = whole(answers(made, {"x": x})["y"])
    np.testing.assert_array_equal(got, [3, 0])  # the last maximum, as ArgMax is made to say here


def test_a_choice_is_spelled_before_the_place_of_its_largest() -> None:
    """Each form reads the types of what another one made."""
    x, c = t.Input("x", "f32", "b", (5,)), t.Input("c", "bool", "b", (5,))
    low = t.Const(Array.of(np.full(5, -np.inf, np.float32)))
    made = one(t.ArgMax(t.Where(c, x, low)), 3)
    assert sum(n.op_type == "GreaterOrEqual" for n in made.graph) == 1
    choice = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 0, 0, 0]], bool)
    feed = {"x": np.array([[1, 2, 3, 4, 5], [9, 7, 9, 7, 7], [-1, -2, 0, 0, 0]], np.float32)}
    got = whole(answers(made, {**feed, "c": choice})["y"])
    np.testing.assert_array_equal(got, [0, 1, 0])


def test_integers_and_last_places_stay_and_long_rows_are_refused() -> None:
    x = np.zeros((2, 4), np.int64)
    made = prepare(of_one("ArgMax", x, x[:, 0], axis=1, keepdims=0), OLD)
    with pytest.raises(PccError, match=r"E431.*integers of ArgMax") as found:
        check_model(made, OLD)
    assert found.value.code == "E431"
    last = of_one("ArgMax", np.zeros((2, 4), np.float32), x[:, 0], axis=1, keepdims=0,
                  select_last_index=1)  # fmt: skip
    assert "GreaterOrEqual" not in {n.op_type for n in prepare(last, OLD).graph}
    long = np.broadcast_to(np.zeros((), np.float32), (1, (1 << 24) + 1))
    with pytest.raises(PccError, match=r"E434.*too long for ArgMax"):
        prepare(of_one("ArgMax", long, x[:1, 0], axis=1, keepdims=0), OLD)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 320])
def test_ranks_are_counted(width: int) -> None:
    x = rows_of(width, 1 + width)
    made = one(SortRank(t.Input("x", "f32", "b", (width,))), len(x))
    assert "TopK" not in {n.op_type for n in made.graph}
    got = whole(answers(made, {"x": x})["y"])
    for row, ranks in zip(x.tolist(), got.tolist(), strict=True):
        places = sorted(range(width), key=lambda i: (-row[i], i))
        assert [places[r] for r in ranks] == list(range(width))


def test_truncation_keeps_the_first_of_equal_elements() -> None:
    law = np.full((3, 40), 1 / 40, np.float32)
    k, mass = t.Input("k", "i64", "b", ()), t.Input("p", "f32", "b", ())
    made = one(Truncate(t.Input("x", "f32", "b", (40,)), k, mass), 3)
    assert "TopK" not in {n.op_type for n in made.graph}
    feed = {"x": law, "k": np.array([7, 0, 1]), "p": np.array([1.0, 0.31, 0.5], np.float32)}
    got = answers(made, feed)["y"]
    for row, kept in zip(got, (7, 13, 1), strict=True):  # 12/40 is below 0.31
        np.testing.assert_allclose(row, np.where(np.arange(40) < kept, 1 / kept, 0), rtol=1e-6)


def test_rows_that_are_too_wide_to_count_are_refused() -> None:
    made = one(SortRank(t.Input("x", "f32", "b", (1025,))), 1)
    with pytest.raises(PccError, match="integers of TopK as floats") as found:
        check_model(made, OLD)
    assert found.value.code == "E431"


# ---------------------------------------------------------------- faint masses


@pytest.mark.parametrize("constant", [False, True])
def test_no_product_of_an_inverse_cdf_holds_subnormal_numbers(constant: bool) -> None:
    """A product may take them for zero: what goes in and what comes out is zero or normal."""
    rng = np.random.default_rng(3)
    mass = np.ldexp(1.0, rng.integers(-149, -100, (40, 7))).astype(np.float32)
    mass[rng.random(mass.shape) < 0.4] = 0
    mass[::4, 3] = 1.0
    mass[1::4, 5] = 2.0**70  # beside it, what lies below 2^-126 is lost: such rows have none
    mass[1::4, :5] = np.where(mass[1::4, :5] > 0, 1.0, 0.0)
    mass[:, 6] = np.where((mass > 0).any(axis=1), mass[:, 6], 2.0**-149)
    mass[1::4, 6] = 0.0
    u = np.resize(np.array([0.0, 2.0**-24, 0.5, 1 - 2.0**-24], np.float32), 40)[:, None]
    held = t.Const(Array.of(mass)) if constant else t.Input("mass", "f32", "b", (40, 7))
    made = one(t.InverseCdf(held, t.Input("u", "f32", "b", (40,))), 1)
    (product,) = [n for n in made.graph if n.op_type == "MatMul"]
    seen = [product.inputs[0], product.outputs[0]]
    made.graph.outputs.extend(v for v in seen if v is not None)
    feed = {"u": u.T, **({} if constant else {"mass": mass[None]})}
    got = answers(made, feed)
    for v in seen:
        a = np.abs(got[str(v.name)])  # type: ignore[union-attr]
        assert ((a == 0) | ((a >= np.finfo(np.float32).tiny) & np.isfinite(a))).all()
    exact = np.cumsum(mass.astype(np.float64), axis=1)
    hit = (mass > 0) & (exact > u * exact[:, -1:])
    np.testing.assert_array_equal(whole(got["y"])[0], hit.argmax(axis=1))


def test_softmaxes_are_drawn_from_as_before() -> None:
    """They sum to one: nothing is raised."""
    x, u = t.Input("x", "f32", "b", (2, 7)), t.Input("u", "f32", "b", (2,))
    made = one(t.InverseCdf(t.Softmax(x), u), 1)
    (product,) = [n for n in made.graph if n.op_type == "MatMul"]
    assert product.inputs[0] is not None
    producer = product.inputs[0].producer()
    assert producer is not None
    assert producer.op_type == "Softmax"


def test_the_forms_build(tmp_path: Path) -> None:
    """A parser and a builder of the family take every node of them."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from pcc.backends.tensorrt.build import Builder
    from pcc.backends.tensorrt.options import BuildOptions

    x, u = t.Input("x", "f32", "b", (2, 9)), t.Input("u", "f32", "b", (2,))
    ops: list[Op] = [t.ArgMax(x), SortRank(x), t.InverseCdf(x, u)]
    model = formed(Module("m", (), tuple((f"y{i}", op) for i, op in enumerate(ops))), 1)
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    made = Builder(RUNTIMES["rtx"], BuildOptions()).build(model, path)
    assert made.plan.nbytes > 1000


class Mod(OpRun):  # type: ignore[misc]
    """Remainders as 8.6 finds them: of what floats make of both numbers."""

    op_domain = ""

    def _run(self, x: Values, y: Values, fmod: int | None = None) -> tuple[Values]:
        quotient = np.floor(x.astype(np.float32) * (np.float32(1) / np.float32(y)))
        return ((x - quotient.astype(np.int64) * y).astype(x.dtype),)


class Gather(OpRun):  # type: ignore[misc]
    """What lies outside is the nearest row: a wrong remainder is no crash there."""

    op_domain = ""

    def _run(self, x: Values, at: Values, axis: int = 0) -> tuple[Values]:
        return (np.take(x, np.clip(at, -x.shape[axis], x.shape[axis] - 1), axis=axis),)


def through_floats(model: ir.Model, feed: dict[str, Values]) -> dict[str, Values]:
    proto = ir.to_proto(model)
    pairs = {i.name: feed[i.name][..., None].view(np.int32).reshape(*feed[i.name].shape, 2)
             for i in proto.graph.input}  # fmt: skip
    out = ReferenceEvaluator(proto, new_ops=[Mod, Gather]).run(None, pairs)
    return {o.name: whole(y) for o, y in zip(proto.graph.output, out, strict=True)}


@pytest.mark.parametrize("most", [SMALL, 2**31 - 1])
def test_words_are_found_where_integers_are_divided_as_floats(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numbers up to 2^31, which an earlier table had on an H200, they are not."""
    monkeypatch.setattr(ngram_rules, "MOST", most)
    ngram_rules.table_of.cache_clear()
    wrong = set()
    for c in (c for c in numbered((), "tensorrt") if c.case.op is LongestSuffix):
        module, made = c.module()
        feed = feeds(c.case, made, 1, 1, c.prefix)
        model = formed(module, 1)
        check_model(model, OLD)
        got = through_floats(model, feed)
        values = run(module.roots, dict(feed), Real())
        for (name, _), want in zip(module.outputs, values, strict=True):
            if not np.array_equal(got[name], want):
                wrong.add((c.case.name, name.removeprefix(c.prefix)))
    ngram_rules.table_of.cache_clear()
    assert bool(wrong) == (most > SMALL)


def test_many_words_are_found_so_too() -> None:
    """A hash may be a multiple of its divisor: with sizes of 109 by 107, six words were lost."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 266, (12000, 6))
    ids[np.arange(6) >= rng.integers(1, 7, len(ids))[:, None]] = -1
    ids = np.unique(ids, axis=0)
    text = np.where(ids < 0, 266, ids)[:, ::-1]  # an id that no word has, before each
    values = rng.integers(1, 1 << 20, len(ids))
    words = Array.of(ids), Array.of(values), Array.of(np.array([300]))
    op = LongestSuffix(t.Input("x", "i64", "b", (6,)), *words, 0)
    model = formed(Module("m", (), (("y", op),)), len(ids))
    check_model(model, OLD)
    got = through_floats(model, {"x": np.ascontiguousarray(text)})["y"]
    assert np.array_equal(got[:, 0], values)
