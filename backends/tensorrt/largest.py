"""The place of the largest element where a `TopK` stands for `ArgMax`.

TensorRT 8.6 gives no index of a row that is all -inf, and says nothing of the order of equal
elements. So -inf is raised to the lowest number, and of the places that hold the maximum the first
is taken:

    index = min(k, min {i: x_i >= max x})        k: what the runtime itself gives

k keeps the answer in the row, and at a maximum, should compiled code make x again in another order
of rounding, so that no x_i reaches the maximum that was found.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcc.backends.tensorrt.site import Site, replace
from pcc.errors import PccError
from pcc.tensor import ops as t

MOST = 1 << 24  # up to here float32 holds each index


def spell_argmax(model: ir.Model, node: ir.Node) -> None:
    """Replace an `ArgMax` of f32, that of the first of equal elements; others stay.

    Errors: E434 where float32 does not hold the indices of a row.
    """
    x = node.inputs[0]
    assert x is not None
    if x.dtype != ir.DataType.FLOAT or _given(node, "select_last_index", 0):
        return
    assert x.shape is not None
    axis, keep = _given(node, "axis", 0) % len(x.shape), _given(node, "keepdims", 1)
    size = int(x.shape[axis])  # type: ignore[arg-type]
    if size > MOST:
        raise PccError("E434", f"a row of {size} elements is too long for ArgMax", at=str(x.name))
    site = Site(model, node, node)
    row = site("Max", x, site.const(np.array(t.LOWEST, np.float32)))
    reached = site("GreaterOrEqual", row, site.reduced("ReduceMax", row, axis))
    left = np.arange(size, 0, -1, dtype=np.float32)  # size - i
    ahead = site("Where", reached, site.const(left.reshape(-1, *[1] * (len(x.shape) - 1 - axis))),
                 site.const(np.zeros((), np.float32)))  # fmt: skip
    first = site("Sub", site.const(np.array(size, np.float32)),
                 site.reduced("ReduceMax", ahead, axis, keepdims=keep))  # fmt: skip
    k = site("ArgMax", row, axis=axis, keepdims=keep)
    replace(node.outputs[0], site("Min", k, site("Cast", first, to=ir.DataType.INT64)))
    model.graph.remove(node, safe=True)


def _given(node: ir.Node, name: str, default: int) -> int:
    a = node.attributes.get(name)
    return default if a is None else int(a.as_int())
