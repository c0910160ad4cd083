"""What an engine keeps between its blocks, where types are hints.

Inside a fused block layers compute in what they are pinned to. What enters or leaves a block may
all the same be stored as a half, and be read as a float again: of the draft of an HMM 8.6 rounded
u, the context and q itself, whose sums were then off by 2.6e-4. Inputs and outputs are told not to
be converted where that can be had (`borders`); so the engine is looked into.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from pcc.backends.tensorrt.legal import nodes_of
from pcc.errors import PccError

MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
     "Transpose", "Unsqueeze")
)  # fmt: skip
SHOWN = 5  # names in a message
MADE = "Reformatted "  # how names of tensors begin that a conversion makes, or reads


def check_stored(engine: Any, model: ir.Model, types: Mapping[str, str], module: Any) -> list[str]:
    """Raise E439 where an input or output is stored as a half, and bits of a float are lost by it.

    `types`: of the network's tensors by name, "FLOAT" or "HALF". Nothing is lost of what came from
    halves without being computed with, or of what is read as halves only. Returns a note where
    floats between two blocks are: of a verifier that says how far its logits are rounded.
    """
    layers = layers_of(engine, module)
    values = {str(v.name): v for node in nodes_of(model.graph) for v in node.outputs}
    values |= {str(v.name): v for v in model.graph.inputs}
    real = dict(_conversions(layers))
    stored = {real.get(x, x) for layer in layers for side in ("Inputs", "Outputs")
              for x in in_half(layer, side)}  # fmt: skip
    lost = {x for x in stored if types.get(x) == "FLOAT" and not (x in values and _same(values[x]))}
    ends = {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    if bad := sorted(lost & ends):
        what = f"the engine stores in half precision what is float32 in the graph: {_listed(bad)}"
        raise PccError("E439", what, hint="compile with --precision fp32")
    inner = sorted(lost - ends)
    return [f"note: floats stored in half precision between blocks: {_listed(inner)}"] * bool(inner)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def layers_of(engine: Any, module: Any) -> list[dict[str, Any]]:
    """Return the layers of an engine that was built with details. Errors: E435."""
    text = engine.create_engine_inspector().get_engine_information(
        module.LayerInformationFormat.JSON
    )
    try:
        return [x for x in json.loads(text)["Layers"] if isinstance(x, dict)]
    except (ValueError, TypeError, KeyError):
        raise PccError("E435", "TensorRT does not tell the layers of its engine") from None


def in_half(layer: Mapping[str, Any], side: str) -> list[str]:
    """Return the names of a layer's "Inputs" or "Outputs" that are stored in half precision."""
    tensors = (x for x in layer.get(side, ()) if isinstance(x, dict))
    return [_name(x) for x in tensors if re.search("FP16|Half", str(x.get("Format/Datatype")))]


def _name(tensor: Mapping[str, Any]) -> str:
    """Return a tensor's name without the profile that it is of, but for the first."""
    return re.sub(r" \[profile \d+\]$", "", str(tensor.get("Name", "")))


def _conversions(layers: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (name that a conversion made up, the tensor that it stands for)."""
    for layer in layers:
        if not str(layer.get("LayerType")).endswith("Reformat"):
            continue
        sides = [[_name(x) for x in layer.get(k, ()) if isinstance(x, dict)]
                 for k in ("Inputs", "Outputs")]  # fmt: skip
        if [len(x) for x in sides] == [1, 1]:
            (a,), (b,) = sides
            if a.startswith(MADE) != b.startswith(MADE):
                yield (a, b) if a.startswith(MADE) else (b, a)


def _same(v: ir.Value) -> bool:
    """Whether a float keeps its value as a half, or is read as one by all that read it."""
    return _from_halves(v) or _as_halves(v)


def _from_halves(v: ir.Value) -> bool:
    node = v.producer()
    if node is None:
        return False
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16
    floats = [x for x in node.inputs if x is not None and x.dtype == ir.DataType.FLOAT]
    return node.op_type in MOVES and bool(floats) and all(map(_from_halves, floats))


def _as_halves(v: ir.Value) -> bool:
    readers = [use.node for use in v.uses()]
    return bool(readers) and not v.is_graph_output() and all(map(_reads_halves, readers))


def _reads_halves(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return node.outputs[0].dtype == ir.DataType.FLOAT16
    return node.op_type in MOVES and all(map(_as_halves, node.outputs))
