"""New nodes in a graph, beside what they stand for."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

Values = np.ndarray[Any, Any]


class Site:
    """Adds nodes before `anchor`, with the origin of `like`."""

    def __init__(self, model: ir.Model, anchor: ir.Node | None, like: ir.Node | None) -> None:
        self.graph, self.anchor, self.like = model.graph, anchor, like
        self.kind: Any = None  # the NumPy dtype of what a rewrite adds

    def __call__(self, op: str, *xs: ir.Value, name: str = "", **attributes: Any) -> ir.Value:
        base = name or f"{xs[0].name}/{op}"
        out = ir.Value(name=_fresh(self.graph, base))
        node = ir.node(op, list(xs), attributes=attributes or None, outputs=[out], name=out.name)
        if self.like is not None:
            node.metadata_props.update(self.like.metadata_props)
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return out

    def const(self, value: Values) -> ir.Value:
        """Return an initializer, shared with an equal one that this module made."""
        key = f"form.{value.dtype}.{'x'.join(map(str, value.shape))}.{_digest(value)}"
        found = self.graph.initializers.get(key)
        if found is None:
            tensor = ir.tensor(value, name=key)
            found = ir.Value(
                name=key,
                shape=ir.Shape(value.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.initializers[key] = found
        return found

    def reduced(self, op: str, x: ir.Value, axis: int, keepdims: int = 1) -> ir.Value:
        """Reduce an axis; before opset 18 most reductions take it as an attribute."""
        if op == "ReduceSum" or self.graph.opset_imports[""] >= 18:
            return self(op, x, self.ints(axis), keepdims=keepdims)
        return self(op, x, axes=[axis], keepdims=keepdims)

    def ints(self, *values: int) -> ir.Value:
        """Return a vector of 64-bit integers."""
        return self.const(np.array(values, np.int64))


def _digest(value: Values) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()[:16]


def _fresh(graph: ir.Graph, base: str) -> str:
    taken = graph.meta.setdefault("pcc.names", {})
    if not taken:
        values = (v.name for node in graph for v in node.outputs)
        taken.update(dict.fromkeys((*values, *(v.name for v in graph.inputs)), 0))
    name, count = base, taken.get(base, -1)
    while name in taken:
        count += 1
        name = f"{base}~{count}"
    taken[base], taken[name] = max(count, 0), 0
    return name


def replace(old: ir.Value, new: ir.Value) -> None:
    """Give the readers of `old`, its type, and its name as an output, to `new`."""
    graph = old.graph
    if new.type is None:  # what is spelled next asks for it
        new.shape, new.type = old.shape, old.type
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    if graph is None:
        return
    for i, out in enumerate(graph.outputs):
        if out is old:
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = f"{old.name}~old"
            graph.outputs[i] = new
