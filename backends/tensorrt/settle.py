"""Sizes and indices that a static graph computes become constants: engines have no open size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.errors import PccError

LARGEST = 1 << 16  # elements of a folded value: indices of a batch are folded, weights are not
ROUNDS = 8  # a size may depend on a shape that depends on a size
# What graphs compute from sizes and constant indices.
FOLDED = frozenset(
    ("Add", "And", "Cast", "Concat", "Div", "Equal", "Expand", "Gather", "Less", "LessOrEqual",
     "Greater", "Max", "Min", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Slice", "Squeeze",
     "Sub", "Transpose", "Unsqueeze", "Where")
)  # fmt: skip
Values = np.ndarray[Any, Any]


def settled(model: ir.Model) -> ir.Model:
    """Return the model with a type and shape for every value. Raises E434 if any stays open."""
    from onnx_ir.passes.common import ShapeInferencePass

    for v in (*model.graph.inputs, *model.graph.outputs):
        if v.shape is None or not all(isinstance(d, int) for d in v.shape):
            what = f"the size of {v.name!r} is open: {v.shape}"
            raise PccError("E434", what, hint="engines have one batch size and one cache size")
    for _ in range(ROUNDS):
        model = ShapeInferencePass(data_prop=True)(model).model
        if not _fold(model):
            return model
        for node in model.graph:  # inference keeps what it finds: sizes are known better now
            for v in node.outputs:
                if v not in model.graph.outputs and not _known(v):
                    v.shape = None
    raise PccError("E434", "sizes depend on sizes without end", at=str(model.graph.name))


def _known(v: ir.Value) -> bool:
    return v.shape is not None and all(isinstance(d, int) for d in v.shape)


def _fold(model: ir.Model) -> bool:
    graph, changed = model.graph, False
    for node in list(graph):
        value = _value_of(node, graph.opset_imports[""])
        if value is None or any(v in graph.outputs for v in node.outputs):
            continue
        out, name = node.outputs[0], f"{node.outputs[0].name}~settled"
        made = ir.Value(
            name=name, shape=ir.Shape(value.shape), const_value=ir.tensor(value, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
        )  # fmt: skip
        graph.initializers[name] = made
        for use in list(out.uses()):
            use.node.replace_input_with(use.idx, made)
        graph.remove(node, safe=True)
        changed = True
    for name, v in list(graph.initializers.items()):
        if not v.uses() and v not in graph.outputs:
            del graph.initializers[name]
    return changed


def _value_of(node: ir.Node, opset: int) -> Values | None:
    """Return the value of a node that does not depend on what is fed, or None."""
    if node.op_type == "Shape":
        x = node.inputs[0]
        if x is None or not _known(x):
            return None
        assert x.shape is not None
        start, end = (node.attributes.get(k) for k in ("start", "end"))
        sizes = [d for d in x.shape if isinstance(d, int)]
        part = slice(start.as_int() if start else None, end.as_int() if end else None)
        return np.array(sizes[part], np.int64)
    if node.op_type not in FOLDED or len(node.outputs) != 1:
        return None
    feed: dict[str, Values] = {}
    for x in node.inputs:
        if x is None or x.const_value is None or x.const_value.size > LARGEST:
            return None
        feed[str(x.name)] = x.const_value.numpy()
    from onnx.reference import ReferenceEvaluator

    found: Any = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, feed)
    value = np.asarray(found[0])
    return value if value.size <= LARGEST else None
