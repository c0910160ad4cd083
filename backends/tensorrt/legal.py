"""What would be lost on the way into TensorRT: looked for before parsing, and after.

Parsers drop what they do not understand with a warning, or without: an attribute, an input that
nothing reads any more, the width of a number. An engine so built runs, and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from pcc.backends.onnx.order import PAIRS
from pcc.backends.tensorrt.library import LOST
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.errors import PccError

FLOAT64 = "computes float64 in float32"
# That nothing reads an input, in the words of a builder's two stages.
UNUSED = re.compile(r"Unused Input: (.+)|\[RemoveDeadLayers\] Input Tensor (.+) is unused or used "
                    r"only at compile-time, but is not being removed\.")  # fmt: skip
PLACE = re.compile(r"\S+\.(cpp|h|hpp):\d+: ")  # where in its source a parser says something
LENGTHS, PAST = 6, (4, 5)  # operands of ONNX's Attention
# ONNX's names of types, and TensorRT's.
SAME = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64",
        "INT32": "INT32", "BOOL": "BOOL"}  # fmt: skip
TYPED = ("to", "dtype", "output_datatype")  # attributes that name a type
# Of what builders say, the warnings that are about numbers. Others are about memory and tactics.
CONVERTED = ("overflow in", "smallest positive")  # of constants in another type
NUMBERS = (*CONVERTED, "may cause overflow")
ORDERED = ("ArgMax", "ArgMin", "TopK")  # of integers as of floats, where integers have 32 bits


def check_model(model: ir.Model, r: TensorRt) -> None:
    """Raise E431 where a graph holds what this runtime refuses or reads otherwise."""
    for v in (*model.graph.inputs, *model.graph.outputs):
        if v.dtype is not None and v.dtype.name not in SAME:
            what = f"TensorRT {r.name} changes the type {v.dtype.name} of {v.name!r}"
            raise PccError("E431", what)
    for node in nodes_of(model.graph):
        for what in _losses(node, r):
            at = node.metadata_props.get("pcc.layer") or str(node.name)
            raise PccError("E431", f"TensorRT {r.name} {what}", at=at)
    _wide_floats(model, r)
    if not r.wide:
        _narrow(model, r)


def _wide_floats(model: ir.Model, r: TensorRt) -> None:
    """Refuse stored float64 and results of it, in graphs within too: parsers make float32 of it."""
    for graph in (model.graph, *(g for node in nodes_of(model.graph) for g in _within(node))):
        for v in graph.initializers.values():
            if v.dtype == ir.DataType.DOUBLE:
                raise PccError("E431", f"TensorRT {r.name} {FLOAT64}", at=str(v.name))


def _within(node: ir.Node) -> Iterator[ir.Graph]:
    for a in node.attributes.values():
        if a.type == ir.AttributeType.GRAPH:
            yield a.as_graph()
        elif a.type == ir.AttributeType.GRAPHS:
            yield from a.as_graphs()


def _narrow(model: ir.Model, r: TensorRt) -> None:
    """Refuse integers that 32 bits do not hold: they would be clamped."""
    for v in model.graph.initializers.values():
        if v.dtype != ir.DataType.INT64 or v.const_value is None:
            continue
        a = v.const_value.numpy()
        # Open ends of slices are written as the largest integer, which clamping leaves open.
        ends = bool(v.uses()) and all(use.node.op_type == "Slice" for use in v.uses())
        if a.size and not ends and (a.max() >= 1 << 31 or a.min() < -(1 << 31)):
            op = next((u.node.metadata_props.get("pcc.op", "") for u in v.uses()), "")
            what = f"TensorRT {r.name} has 32-bit integers; {op or v.name} needs 64"
            hint = "a table of many words over a large vocabulary is such an op"
            raise PccError("E431", what, hint=hint)


def nodes_of(graph: ir.Graph | ir.GraphView) -> Iterator[ir.Node]:
    """Yield the nodes of a graph and of the graphs within."""
    for node in graph:
        yield node
        for graph in _within(node):
            yield from nodes_of(graph)


def _losses(node: ir.Node, r: TensorRt) -> Iterator[str]:
    op = node.op_type
    if op == "Attention":
        yield from _attention(node)
    if node.domain:
        yield f"does not know the domain {node.domain!r} of {op}"
    if op in ORDERED and not r.wide and node.inputs[0] is not None:
        if node.inputs[0].dtype in (ir.DataType.INT32, ir.DataType.INT64):
            yield f"compares integers of {op} as floats: it sorts rows of up to {PAIRS} elements"
    if op in r.refused:
        yield f"has no {op}"
    for (name, key), value in r.attributes.items():
        given = node.attributes.get(key)
        if name == op and given is not None and given.value != value:
            yield f"drops {key}={given.value!r} of {op}, or reads it otherwise"
    if any(v.dtype == ir.DataType.DOUBLE for v in node.outputs) or _names_float64(node):
        yield FLOAT64


def _names_float64(node: ir.Node) -> bool:
    """Whether an attribute is of float64, or asks for it."""
    for name, a in node.attributes.items():
        if a.type == ir.AttributeType.TENSOR and a.as_tensor().dtype == ir.DataType.DOUBLE:
            return True
        if name in TYPED and a.value == ir.DataType.DOUBLE:
            return True
    return False


def _attention(node: ir.Node) -> Iterator[str]:
    xs = node.inputs
    if len(xs) > LENGTHS and xs[LENGTHS] is not None:
        yield "drops nonpad_kv_seqlen of Attention: every row would be read"
    if any(len(xs) > i and xs[i] is not None for i in PAST) or len(node.outputs) > 1:
        yield "has no past or present in Attention"


def check_network(network: Any, model: ir.Model, r: TensorRt, module: Any) -> None:
    """Raise E432 where inputs, outputs, types, shapes or masks of a parsed network are not ours."""
    ours = {v.name: v for v in (*model.graph.inputs, *model.graph.outputs)}
    ins = [network.get_input(i) for i in range(network.num_inputs)]
    outs = [network.get_output(i) for i in range(network.num_outputs)]
    _names("inputs", [v.name for v in model.graph.inputs], [x.name for x in ins], r)
    _names("outputs", [v.name for v in model.graph.outputs], [x.name for x in outs], r)
    for x in (*ins, *outs):
        _same(x.name, x.dtype.name, tuple(x.shape), ours[x.name], r)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {x.name for layer in layers for x in operands(layer)} | {x.name for x in outs}
    unread = [v.name for v in model.graph.inputs if v.uses() and v.name not in read]
    if unread:
        what = f"TensorRT {r.name} dropped what reads {', '.join(map(repr, unread[:5]))}"
        raise PccError("E432", what, hint="the graph has an operand that this parser ignores")
    for layer in layers:
        kind = causal(layer, module)
        if kind not in ("", "NONE"):
            raise PccError("E432", f"TensorRT {r.name} masks by {kind}", at=layer.name)


def operands(layer: Any) -> list[Any]:
    """Return the tensors that a layer reads."""
    found = (layer.get_input(i) for i in range(layer.num_inputs))
    return [x for x in found if x is not None]


def causal(layer: Any, module: Any) -> str:
    """Return the causal mask that a parser gave to an attention layer, or nothing."""
    if layer.type.name != "ATTENTION_INPUT":
        return ""
    layer.__class__ = module.IAttentionInputLayer  # networks give layers as their base class
    return str(layer.attention.causal_kind.name)


def _names(what: str, want: Sequence[str | None], found: Sequence[str], r: TensorRt) -> None:
    if sorted(map(str, want)) != sorted(found):
        lost = sorted(set(map(str, want)) ^ set(found))
        raise PccError("E432", f"TensorRT {r.name} changed the {what}: {', '.join(lost[:5])}")


def _same(name: str, dtype: str, shape: tuple[int, ...], v: ir.Value, r: TensorRt) -> None:
    assert v.dtype is not None
    assert v.shape is not None
    want = SAME[v.dtype.name]
    if want == "INT64" and not r.wide:
        want = "INT32"
    sizes = tuple(d if isinstance(d, int) else -1 for d in v.shape)  # -1: a profile says it
    if dtype != want or shape != sizes:
        what = f"TensorRT {r.name} made {name!r} {dtype}{list(shape)}"
        raise PccError("E432", what, hint=f"it is {want}{list(sizes)} in the graph")


def check_messages(said: Iterable[tuple[str, str]], r: TensorRt) -> None:
    """Raise E433 for a warning that is not known to leave results alone."""
    for severity, text in said:
        if severity == "WARNING" and harmless(text, r):
            continue
        raise PccError("E433", f"TensorRT {r.name} says: {_line(text)}")


def check_build(said: Iterable[tuple[str, str]], r: TensorRt, unread: Collection[str] = ()) -> None:
    """Raise E433 for what a builder says of numbers, and where some of its messages are lost.

    A builder that measures nothing has no other reason to warn: there every warning is an error.
    One that takes types as hints says what it converts for candidates that it then may not choose:
    what it chooses is pinned, and measured by the suite (sums of q).

    `unread`: inputs that the graph does not read either, so that it is no loss if they are unused.
    """
    for severity, text in said:
        numbers = any(x in text for x in NUMBERS if r.typed or x not in CONVERTED)
        warns = severity == "WARNING" and (r.offline or numbers)
        fine = harmless(text, r) or _unused(text) in unread
        if text == LOST or (warns and not fine):
            raise PccError("E433", f"TensorRT {r.name} says: {_line(text)}")


def harmless(text: str, r: TensorRt) -> bool:
    """Whether a warning begins as one that is known to say nothing about the result."""
    place = PLACE.match(text)
    said = text[place.end() :] if place else text
    return any(re.match(start, said) for start in r.benign)


def _unused(text: str) -> str:
    """Return the name of the input that a builder found no reader of, or nothing."""
    place = PLACE.match(text)
    found = UNUSED.fullmatch(text[place.end() :] if place else text)
    return (found[1] or found[2]).strip() if found else ""


def _line(text: str) -> str:
    return " ".join(text.split())[:240]


def summary(said: Iterable[tuple[str, str]], r: TensorRt) -> list[str]:
    """Return each unusual message once, for the manifest and the log."""
    kept: Mapping[str, None] = dict.fromkeys(
        f"{severity.lower()}: {_line(text)}"
        for severity, text in said
        if severity != "WARNING" or not harmless(text, r)
    )
    return list(kept)[:20]
