"""Spelling a graph as a runtime wants it: every form here computes the same numbers.

- *Pairs*: where 64-bit integers do not cross the border, `i64[d]` is `i32[d, 2]`: its low and high
  words as they lie in memory. The engine reads the low one and writes both, so that whoever binds
  addresses sees 64-bit integers, and nothing is converted outside.
- *Sums*: `pcc.backends.tensorrt.sums`. *Largest elements*: `pcc.backends.tensorrt.largest`.
- *-inf* as one number beside `Where` becomes the largest negative one in compiled code: it is made
  by an overflow there, and found by a comparison with the lowest finite number.
- *Quotients* whose divisor is spread over the dividend are scaled where it is very small.
- *Short reductions*: where the builder writes a reduction over few elements out, with what makes
  each of them, neutral elements make it longer. A circuit of rank 3 is a chain of such
  reductions, and each would hold the ones before it again: code doubles with every variable.
- *Logarithms*: where log(softmax(x)) would be computed as it reads, x - m - log sum exp(x - m) is.
- *Constants* that only move are computed: sizes, and the places of rows that are written.
- *Attention* says that it may be taken apart where no fused kernel has its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Stored
from pcc.backends.tensorrt.largest import spell_argmax
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.backends.tensorrt.site import Site, replace
from pcc.backends.tensorrt.sums import spell_sum
from pcc.errors import PccError
from pcc.tensor import ops as t

FAINT = 2.0**-64
FOLDED = 1 << 24  # bytes; the largest constant that folding makes
Values = np.ndarray[Any, Any]


def prepare(model: ir.Model, r: TensorRt) -> ir.Model:
    """Return the graph in this runtime's forms, with types; the model given is used up.

    Errors: E434 where a size is open.
    """
    _fold(model)
    model = inferred(model)
    for node in list(model.graph):
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
        elif node.op_type in r.spelled:
            SPELLINGS[node.op_type](model, node)
    if r.unrolled:
        model = inferred(model)
        _lengthen(model, r.unrolled)
    if not r.wide:
        _pairs(model)
    drop_unread(model.graph)
    return inferred(model)


def drop_unread(graph: ir.Graph) -> None:
    """Drop constants that nothing reads any more: parsers warn of them."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def inferred(model: ir.Model) -> ir.Model:
    """Return the model with a type and shape for every value."""
    from onnx_ir.passes.common import ShapeInferencePass

    for v in (*model.graph.inputs, *model.graph.outputs):
        if v.shape is None or not all(isinstance(d, int) for d in v.shape):
            what = f"the size of {v.name!r} is open: {v.shape}"
            raise PccError("E434", what, hint="engines have one batch size and one cache size")
    model = ShapeInferencePass(data_prop=False)(model).model
    if name := _unknown(model):
        raise PccError("E434", f"{name!r} has no fixed shape")
    return model


def _unknown(model: ir.Model) -> str:
    """Return the name of a result without type or fixed shape, if there is one."""
    for node in model.graph:
        for v in node.outputs:
            if v.name and (v.dtype is None or v.shape is None or v.shape.is_dynamic()):
                return str(v.name)
    return ""


# ---------------------------------------------------------------- constants


FOLDS: dict[str, Callable[[ir.Node, list[Values]], Values]] = {
    "Concat": lambda node, xs: np.concatenate(xs, node.attributes["axis"].as_int()),
    "Expand": lambda _, xs: np.broadcast_to(xs[0], np.broadcast_shapes(xs[0].shape, tuple(xs[1]))),
    "Reshape": lambda _, xs: xs[0].reshape(xs[1]),
}


def _fold(model: ir.Model) -> None:
    """Compute what only moves constants: sizes of an `Expand`, and the places of rows."""
    for node in list(model.graph):
        tensors = [v.const_value if v is not None else None for v in node.inputs]
        known = [x for x in tensors if x is not None and not isinstance(x, Stored)]
        out = node.outputs[0]
        if node.op_type not in FOLDS or len(known) < len(tensors) or out in model.graph.outputs:
            continue
        arrays = [x.numpy() for x in known]
        if node.op_type == "Reshape" and 0 in arrays[1]:
            continue  # it may mean "as it was"
        y = FOLDS[node.op_type](node, arrays)
        if y.nbytes > FOLDED:
            continue
        replace(out, Site(model, node, node).const(np.ascontiguousarray(y)))
        model.graph.remove(node, safe=True)


def _spell_log_softmax(model: ir.Model, node: ir.Node) -> None:
    x, site = node.inputs[0], Site(model, node, node)
    assert x is not None
    axis = node.attributes["axis"].as_int()
    lowered = site("Sub", x, site.reduced("ReduceMax", x, axis))
    total = site.reduced("ReduceSum", site("Exp", lowered), axis)
    replace(node.outputs[0], site("Sub", lowered, site("Log", total)))
    model.graph.remove(node, safe=True)


def _spell_quotient(model: ir.Model, node: ir.Node) -> None:
    """Write x / y as (x s) / (y s), with s = 2^64 where |y| < 2^-64.

    Where y is spread over x the builder multiplies by 1 / y, which is infinite for the smallest
    floats. x s leaves float32 only where the quotient does.
    """
    x, y = node.inputs
    assert x is not None
    assert y is not None
    if y.dtype != ir.DataType.FLOAT or y.const_value is not None or x.shape == y.shape:
        return
    site = Site(model, node, node)
    faint = site("Less", site("Abs", y), site.const(np.array(FAINT, np.float32)))
    scale = site("Where", faint, site.const(np.array(1 / FAINT, np.float32)),
                 site.const(np.array(1, np.float32)))  # fmt: skip
    replace(node.outputs[0], site("Div", site("Mul", x, scale), site("Mul", y, scale)))
    model.graph.remove(node, safe=True)


def _lowest(v: ir.Value | None) -> bool:
    """Whether a value is a constant of one number, -inf."""
    if v is None or v.const_value is None or v.dtype != ir.DataType.FLOAT or v.const_value.size > 1:
        return False
    return bool(np.isneginf(v.const_value.numpy()).all())


def _spell_where(model: ir.Model, node: ir.Node) -> None:
    """Write (c ? x : -inf) as (c ? x : -3e38) (c ? 1 : 4), and the like where c is false."""
    choice, *sides = node.inputs
    assert choice is not None
    low = [_lowest(v) for v in sides]
    if not any(low):
        return
    site = Site(model, node, node)
    one, four = (site.const(np.array(v, np.float32)) for v in (1, 4))
    x, y = (_full(site, v, -3e38) if lowest else v for lowest, v in zip(low, sides, strict=True))
    assert x is not None
    assert y is not None
    scale = site("Where", choice, *(four if lowest else one for lowest in low))
    replace(node.outputs[0], site("Mul", site("Where", choice, x, y), scale))
    model.graph.remove(node, safe=True)


def _full(site: Site, like: ir.Value | None, value: float) -> ir.Value:
    """Return one number in the shape of a constant."""
    assert like is not None
    assert like.const_value is not None
    return site.const(np.full(like.const_value.numpy().shape, value, np.float32))


def _spell_equal(model: ir.Model, node: ir.Node) -> None:
    """Write x = -inf as x < L = -3.4e38: of finite numbers, those below L are taken for it too."""
    low = [_lowest(v) for v in node.inputs]
    if any(low):
        site = Site(model, node, node)
        at = low.index(False) if False in low else 0
        x, other = node.inputs[at], node.inputs[1 - at]
        assert x is not None
        made = site("Less", x, _full(site, other, t.LOWEST))
        replace(node.outputs[0], made)
        model.graph.remove(node, safe=True)


SPELLINGS: dict[str, Callable[[ir.Model, ir.Node], None]] = {
    "ArgMax": spell_argmax,
    "CumSum": spell_sum,
    "Div": _spell_quotient,
    "Equal": _spell_equal,
    "Where": _spell_where,
    "LogSoftmax": _spell_log_softmax,
}

NEUTRAL = {"ReduceMax": -np.inf, "ReduceSum": 0.0, "ReduceProd": 1.0}


def _lengthen(model: ir.Model, most: int) -> None:
    """Give reductions of floats over 2 to `most` elements neutral ones, so that they have more."""
    for node in list(model.graph):
        x = node.inputs[0] if node.op_type in NEUTRAL else None
        if x is None or x.dtype != ir.DataType.FLOAT:
            continue
        assert x.shape is not None
        shape = [int(d) for d in x.shape]  # type: ignore[arg-type]
        axes = [a % len(shape) for a in _axes(node)]
        if not axes or not 1 < math.prod(shape[a] for a in axes) <= most:
            continue
        axis = max(axes, key=lambda a: shape[a])
        site, rest = Site(model, node, node), list(shape)
        rest[axis] = most + 1 - shape[axis]
        more = site.const(np.full(rest, NEUTRAL[node.op_type], np.float32))
        node.replace_input_with(0, site("Concat", x, more, axis=axis))


def _axes(node: ir.Node) -> list[int]:
    """Return the axes of a reduction, none if they are not known."""
    given = node.attributes.get("axes")
    if given is not None:
        return list(given.as_ints())
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    if operand is None or operand.const_value is None:
        return []
    return [int(a) for a in operand.const_value.numpy().ravel()]


# ---------------------------------------------------------------- integers


def _pairs(model: ir.Model) -> None:
    graph = model.graph
    first = graph[0]
    for i, v in enumerate(list(graph.inputs)):
        if v.dtype == ir.DataType.INT64:
            graph.inputs[i] = _low_word(model, first, v)
    for i, v in enumerate(list(graph.outputs)):
        if v.dtype == ir.DataType.INT64:
            graph.outputs[i] = _words(model, v)


def _low_word(model: ir.Model, first: ir.Node, v: ir.Value) -> ir.Value:
    assert v.shape is not None
    name, site = str(v.name), Site(model, first, None)
    pair = ir.Value(name=name, shape=ir.Shape([*v.shape, 2]), type=ir.TensorType(ir.DataType.INT32))
    v.name = f"{name}~wide"
    low = site("Gather", pair, site.const(np.array(0, np.int64)), axis=-1, name=f"{name}~low")
    wide = site("Cast", low, to=ir.DataType.INT64, name=f"{name}~value")
    for use in list(v.uses()):
        use.node.replace_input_with(use.idx, wide)
    return pair


def _words(model: ir.Model, v: ir.Value) -> ir.Value:
    assert v.shape is not None
    shape, name, site = v.shape, str(v.name), Site(model, None, v.producer())
    v.name = f"{name}~value"
    zero, ones = site.const(np.array(0, np.int32)), site.const(np.array(-1, np.int32))
    low = site("Cast", v, to=ir.DataType.INT32, name=f"{name}~low")
    high = site("Where", site("Less", low, zero, name=f"{name}~sign"), ones, zero,
                name=f"{name}~high")  # fmt: skip
    last = site.ints(-1)
    parts = [site("Unsqueeze", x, last) for x in (low, high)]
    pair = site("Concat", *parts, axis=-1, name=f"{name}~pair")
    pair.name = name
    pair.shape, pair.type = ir.Shape([*shape, 2]), ir.TensorType(ir.DataType.INT32)
    return pair
