"""Parameters that depend on a context: expressions over a verifier's features f32[D].

What a head learns beside its circuit: linear maps, activations, and a softmax in the end, whose
rows are laws. Values here have no fold axis; `folded` puts one in front, as layers want it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, Values, tensor
from pcc.ir.types import Tensor
from pcc.knobs import MAX_MODEL_SIZE
from pcc.tensor import nn
from pcc.tensor import ops as t

LINEAR = {"d,ad->a": "d,abd->ab", "d,abd->ab": "d,abcd->abc"}  # with one axis more


class Expressions:
    """Functions of a context of width D; 0: there is none."""

    def __init__(self, context: int) -> None:
        if type(context) is not int or not 0 <= context <= MAX_MODEL_SIZE:
            raise PccError("B105", f"the context has width {context!r}", hint="a positive integer")
        self.width = context

    def context(self) -> Op:
        """Return the features f32[D] that parameters may depend on."""
        if not self.width:
            raise PccError("B105", "this circuit has no context", hint="Builder(cards, context=D)")
        return t.Input("context", "f32", "c", (self.width,))

    def linear(self, x: Op, weights: Any, bias: Any = None) -> Op:
        """y[a] = sum_d weights[a, d] x[d] + bias[a]; `a` stands for one axis or two."""
        w, shape = _finite("weights", weights), _shape(x)
        if w.ndim not in (2, 3) or w.shape[-1:] != shape or 0 in w.shape:
            what = f"weights have shape {w.shape} for a value of shape {shape}"
            raise PccError("B102", what, hint="one or two axes of results, then that of a vector")
        y = t.Contract(x, t.Const(Array.of(w)), tuple(LINEAR)[w.ndim - 2])
        if bias is None:
            return y
        b = _finite("bias", bias)
        if b.shape != w.shape[:-1]:
            raise PccError("B102", f"bias has shape {b.shape}, the result {w.shape[:-1]}")
        return t.Add(y, t.Const(Array.of(b)))

    def add(self, x: Op, y: Op) -> Op:
        """Return x + y, of one shape."""
        if _shape(x) != _shape(y):
            raise PccError("B102", f"cannot add values of shapes {_shape(x)} and {_shape(y)}")
        return t.Add(x, y)

    def relu(self, x: Op) -> Op:
        """Return max(x, 0)."""
        _shape(x)
        return nn.Relu(x)

    def silu(self, x: Op) -> Op:
        """Return x / (1 + e^-x)."""
        _shape(x)
        return nn.Silu(x)

    def gelu(self, x: Op) -> Op:
        """Return x (1 + erf(x / sqrt 2)) / 2."""
        _shape(x)
        return nn.Gelu(x)

    def softmax(self, logits: Op) -> Op:
        """Return laws over the last axis: a table `[K, V]`, weights `[Ko, Ki]`, a row of either."""
        _shape(logits)
        return t.Softmax(logits)


def folded(x: Op) -> Op:
    """Return an expression with an axis of one fold in front.

    It moves into the constants, so that passes find a product of the context with a table.
    """
    if isinstance(x, t.Const):
        return t.Const(Array.of(x.value.value[None]))
    if isinstance(x, t.Add):
        return t.Add(folded(x.a), folded(x.b))
    if isinstance(x, t.Softmax | nn.Activation):
        return type(x)(folded(x.x))
    if isinstance(x, t.Contract) and (eq := LINEAR.get(x.eq)):
        return t.Contract(x.a, folded(x.b), eq)
    return t.Reshape(x, (1, *tensor(x).shape))


def law(name: str, x: Op) -> Op:
    """Return a softmax of one or two axes as `[1, K, V]`."""
    if not isinstance(x, t.Softmax):
        raise PccError("B105", f"'{name}' is not known to hold laws", hint="give it to softmax()")
    axes = len(_shape(x))
    if axes not in (1, 2):
        raise PccError("B102", f"'{name}' has shape {_shape(x)}, expected one axis or two")
    return folded(folded(x) if axes == 1 else x)


def _shape(x: Op) -> tuple[int, ...]:
    found = x.type if isinstance(x, Op) else None
    if not isinstance(found, Tensor) or found.dtype != "f32" or found.batch == "b":
        what = f"an expression over the context is needed, not {found or type(x).__name__}"
        raise PccError("B105", what, hint="begin with context()")
    return found.shape


def _finite(name: str, value: Any) -> Values:
    try:
        with np.errstate(over="ignore"):
            w = np.asarray(value, np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise PccError("B102", f"'{name}' is not an array of numbers") from None
    if not np.isfinite(w).all():
        raise PccError("B103", f"'{name}' holds NaN, infinity or what does not fit into 32 bits")
    return w
