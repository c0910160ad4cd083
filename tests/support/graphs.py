"""ONNX graphs in tests: lower a module, check the model, run it, judge it in float64."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from pcc.backends.onnx.graph import Layout
from pcc.backends.onnx.lower import lower
from pcc.emission import graph_name
from pcc.interp.run import run
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.tensor.ops import Input

Values = np.ndarray[Any, Any]
OPSETS = {17: 8, 24: 10}  # opset -> IR version


def check(model: onnx.ModelProto) -> None:
    """The checks that every emitted model passes."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    opset = {i.domain: i.version for i in model.opset_import}
    assert set(opset) == {""}
    assert model.ir_version == OPSETS[opset[""]]
    ops = {n.op_type for n in model.graph.node}
    assert "ReduceLogSumExp" not in ops
    assert not {o for o in ops if o.startswith("Random") or o in ("Multinomial", "Bernoulli")}


def proto_of(module: Module, *, opset: int = 24, layout: Layout | None = None) -> onnx.ModelProto:
    """The checked model of a tensor module; its inputs are those the module reads."""
    inputs = [n for n in module.nodes() if isinstance(n, Input)]
    proto = ir.to_proto(lower(module, opset=opset, inputs=inputs, layout=layout))
    check(proto)
    return proto


def session_of(proto: onnx.ModelProto) -> ort.InferenceSession:
    """A session on one thread, without optimisations that could hide a wrong node."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    data = io.BytesIO(proto.SerializeToString()).getvalue()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Compiled:
    """A tensor module as an ONNX session, beside its float64 meaning."""

    def __init__(self, module: Module, *, opset: int = 24, layout: Layout | None = None) -> None:
        self.module = module
        self.proto = proto_of(module, opset=opset, layout=layout)
        self.session = session_of(self.proto)
        self.keys = [i.name for i in self.session.get_inputs()]

    def __call__(self, feed: Mapping[str, Values]) -> dict[str, Values]:
        """What the graph answers, by output name of the module."""
        names = [graph_name(name, self.keys) for name, _ in self.module.outputs]
        values = self.session.run(names, {k: feed[k] for k in self.keys})
        return dict(zip([name for name, _ in self.module.outputs], values, strict=True))

    def meaning(self, feed: Mapping[str, Values]) -> dict[str, Values]:
        """What the evaluator answers in float64."""
        with np.errstate(invalid="raise"):
            values = run(self.module.roots, dict(feed), Real())
        return dict(zip([name for name, _ in self.module.outputs], values, strict=True))


def agree(want: Values, got: Values, *, tolerance: float = 2e-6, what: str = "") -> float:
    """Assert equality up to `tolerance` (relative beyond 1); infinities are exact, NaN never."""
    want, got = np.broadcast_arrays(np.asarray(want), np.asarray(got))
    if want.dtype.kind in "ib":
        assert np.array_equal(want, got), what
        return 0.0
    assert not np.isnan(want).any(), f"{what}: NaN in the reference"
    assert not np.isnan(got).any(), f"{what}: NaN"
    assert np.array_equal(np.isneginf(want), np.isneginf(got)), f"{what}: -inf differs"
    with np.errstate(invalid="ignore"):
        gap = np.where(want == got, 0.0, np.abs(want - got) / np.maximum(1.0, np.abs(want)))
    worst = float(gap.max(initial=0.0))
    assert worst <= tolerance, f"{what}: off by {worst:.3g}"
    return worst
