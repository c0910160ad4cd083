"""What ONNX Runtime's CUDA kernels get wrong, stood in for on a CPU: the graphs go round it.

The stand-ins behave as its kernels of release 1.31 do: a largest number is sought from the lowest
finite one on, TopK fills rows with it (so that indices of -inf lie beyond the row) and puts equal
elements in any order, LogSoftmax subtracts the maximum and the logarithm in one step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from pcc import targets
from pcc.backends.onnx import order
from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.lower import lower
from pcc.conformance.bundles import Setting
from pcc.conformance.ops import check_ops
from pcc.interp.run import run
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.targets import FAULTS, TARGETS
from pcc.tensor import ops as t
from pcc.tensor.nn import SortRank
from pcc.tensor.sampling import Truncate

LOWEST = np.finfo(np.float32).min
CUDA = Setting("onnx-cuda")
honest = Graph.__call__


def faulty(g: Graph, op: str, *xs: Any, outputs: int = 1, **attrs: Any) -> Any:
    """Emit what computes as a kernel of CUDA does."""
    stand_in = {"ReduceMax": _largest, "ArgMax": _arg_max, "TopK": _top_k,
                "LogSoftmax": _log_softmax}.get(op)  # fmt: skip
    integers = g.kind == "t.longest_suffix" or getattr(xs[0], "dtype", None) == ir.DataType.INT64
    if stand_in is None or (op == "ReduceMax" and integers):
        return honest(g, op, *xs, outputs=outputs, **attrs)
    return stand_in(g, *xs, **attrs)


def _largest(g: Graph, x: ir.Value, axes: ir.Value, keepdims: int = 1) -> ir.Value:
    top = honest(g, "ReduceMax", x, axes, keepdims=keepdims)
    return honest(g, "Max", top, g.const(LOWEST))


def _arg_max(g: Graph, x: ir.Value, axis: int, keepdims: int) -> ir.Value:
    top = honest(g, "ReduceMax", x, g.ints(axis), keepdims=keepdims)
    none = honest(g, "Less", top, g.const(LOWEST))
    found = honest(g, "ArgMax", x, axis=axis, keepdims=keepdims)
    return honest(g, "Where", none, g.const(np.int64(2**31 - 1)), found)


def _top_k(g: Graph, x: ir.Value, size: ir.Value, axis: int) -> list[ir.Value]:
    """Equal elements come in reverse; those that are -inf have indices beyond the row."""
    assert size.const_value is not None
    width = int(size.const_value.numpy()[0])
    ends = (g.ints(-1), g.ints(-width - 1), g.ints(axis), g.ints(-1))
    best, back = honest(g, "TopK", honest(g, "Slice", x, *ends), size, outputs=2, axis=axis)
    index = honest(g, "Sub", g.const(np.int64(width - 1)), back)
    wide = honest(g, "Cast", best, to=ir.DataType.FLOAT)
    padding = honest(g, "Less", wide, g.const(LOWEST))
    beyond = honest(g, "Add", index, g.const(np.int64(width)))
    return [best, honest(g, "Where", padding, beyond, index)]


def _log_softmax(g: Graph, x: ir.Value, axis: int) -> ir.Value:
    top = honest(g, "ReduceMax", x, g.ints(axis), keepdims=1)
    total = honest(g, "ReduceSum", honest(g, "Exp", honest(g, "Sub", x, top)), g.ints(axis),
                   keepdims=1)  # fmt: skip
    return honest(g, "Sub", x, honest(g, "Add", top, honest(g, "Log", total)))


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "__call__", faulty)


def quiet(_line: str) -> None:
    pass


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("batch", [1, 3])
def test_every_op_goes_round_the_faults(batch: int, tmp_path: Path) -> None:
    found = list(check_ops(replace(CUDA, batch=batch), tmp_path, quiet))
    assert [f for f in found if f.bad] == []
    assert len(found) > 1000


@pytest.mark.usefixtures("on_cuda")
def test_without_that_the_suite_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on an H100 found, and the index of a row of -inf."""
    plain = replace(TARGETS["onnx-cuda"], faults=())
    monkeypatch.setattr(targets, "TARGETS", {**TARGETS, "onnx-cuda": plain})
    from pcc.conformance.ops import numbered

    names = ("reduce_max", "max_contract", "log_softmax", "argmax", "sort_rank", "reduce_lse",
             "log_contract", "softmax", "truncate")  # fmt: skip
    cases = [c for c in numbered(()) if c.case.op.name.removeprefix("t.") in names]
    for name in names[:5]:
        some = [c for c in cases if c.case.op.name == f"t.{name}"]
        assert [f for f in check_ops(CUDA, tmp_path / name, quiet, some) if f.bad], name


def answer(module: Module, x: np.ndarray[Any, Any], **more: np.ndarray[Any, Any]) -> Any:
    model = lower(module, TARGETS["onnx-cuda"], batch=len(x))
    s = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return s.run(None, {"x": x, **more})[0]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("pairs", [1024, 4])
def test_equal_elements_keep_their_order(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pairs, and in rows that are too wide for them."""
    monkeypatch.setattr(order, "PAIRS", pairs)
    assert set(FAULTS) == set(TARGETS["onnx-cuda"].faults)
    x = np.random.default_rng(0).integers(0, 5, (3, 40)).astype(np.float32)
    x[0, ::3] = -np.inf
    x[1] = 0.0
    x[2, 5] = -0.0
    rank = Module("m", (), (("y", SortRank(t.Input("x", "f32", "b", (40,)))),))
    (want,) = run(rank.roots, {"x": x}, Real())
    np.testing.assert_array_equal(answer(rank, x), want)
    law = t.Input("x", "f32", "b", (40,))
    k, mass = t.Input("k", "i64", "b", ()), t.Input("p", "f32", "b", ())
    cut = Module("m", (), (("y", Truncate(law, k, mass)),))
    x = np.random.default_rng(1).integers(1, 4, (3, 40)).astype(np.float32)
    x /= x.sum(axis=-1, keepdims=True)
    more = {"k": np.array([7, 0, 15]), "p": np.array([1.0, 0.4, 0.3], np.float32)}
    (want,) = run(cut.roots, {"x": x, **more}, Real())
    got = answer(cut, x, **more)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("size", [1, 2, 1025])
def test_rows_of_every_width_are_sorted(size: int) -> None:
    x = np.random.default_rng(size).integers(-3, 3, (2, size)).astype(np.float32)
    x[1, : size // 2] = -np.inf
    rank = Module("m", (), (("y", SortRank(t.Input("x", "f32", "b", (size,)))),))
    (want,) = run(rank.roots, {"x": x}, Real())
    np.testing.assert_array_equal(answer(rank, x), want)
