"""Pinning precision where types are hints: each layer computes in the type that the graph gives it.

A builder that may use half precision uses it where it is faster, a circuit's softmaxes included:
q then sums to 1.0007. So each layer that computes with floats gets the precision of its operands,
each float result the type that the graph gives it, and the build must obey.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from pcc.backends.tensorrt.legal import nodes_of, operands

FLOATS = {ir.DataType.FLOAT: "FLOAT", ir.DataType.FLOAT16: "HALF"}
FREE = ("CONSTANT", "SHAPE", "CAST", "CONDITION", "ASSERTION", "TRIP_LIMIT", "ITERATOR")
# What only moves numbers has a result but no precision: told one, 8.6 finds "mismatched types"
# around it and builds nothing. Left without a type, its result may be a half between two floats.
MOVES = (
    "SHUFFLE", "SLICE", "GATHER", "CONCATENATION", "SELECT", "SCATTER", "PADDING", "IDENTITY",
)  # fmt: skip


def types_of(model: ir.Model) -> dict[str, str]:
    """Return the type of each value of a graph by name: FLOAT, HALF, or '' for what is no float."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [v for node in nodes_of(model.graph) for v in node.outputs]
    return {str(v.name): FLOATS.get(v.dtype, "") for v in values if v.dtype is not None}


def pin(network: Any, known: dict[str, str], module: Any) -> dict[str, int]:
    """Set the precision of each layer that computes, and the type of each float that is made.

    `known`: `types_of` the graph. Layers that the parser adds on its own take the type of their
    first float operand, and are added to it. Returns how many layers compute in which.
    """
    counts = {"FLOAT": 0, "HALF": 0}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            out = layer.get_output(j)
            if out.name not in known:
                known[out.name] = _derived(layer, out, known)
        outs = [known[layer.get_output(j).name] for j in range(layer.num_outputs)]
        ins = [known.get(x.name, "") for x in operands(layer)]
        compute = next((k for k in (*ins, *outs) if k), "")
        if layer.type.name in FREE or not compute:  # comparisons have float operands: they count
            continue
        for j, kind in enumerate(outs):
            if kind:
                layer.set_output_type(j, getattr(module.DataType, kind))
        if layer.type.name not in MOVES:
            layer.precision = getattr(module.DataType, compute)
            counts[compute] += 1
    return counts


def _derived(layer: Any, out: Any, known: dict[str, str]) -> str:
    if out.dtype.name not in ("FLOAT", "HALF"):
        return ""
    if layer.type.name in ("CAST", "CONSTANT", "IDENTITY"):
        return str(out.dtype.name)
    ins = (known.get(x.name, "") for x in operands(layer))
    return next((k for k in ins if k), "FLOAT")
