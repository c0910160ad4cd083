"""Running sums where the parser makes a loop of `CumSum`, one step for each element.

Of masses: a product with a triangle of ones. All columns add in one order, so that the sum does not
rise where a mass is zero, which is what the inverse CDF rests on. Of anything else: a sum of what a
triangle selects, y_i = sum_j (j <= i ? x_j : 0), in which -inf stays -inf and reaches no element
before it. (Sums that double their reach, by slices of themselves behind zeros, would be fewer
operations; TensorRT 8.6 computes them wrongly in part.)
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from pcc.backends.tensorrt.site import Site, replace
from pcc.errors import PccError

MASSES = ("t.inverse_cdf", "t.truncate")  # ops whose running sums are of finite, positive numbers
MOST = 1 << 24  # elements that a triangle selects from


def spell_sum(model: ir.Model, node: ir.Node) -> None:
    """Replace a `CumSum`. Errors: E434 where it has an open size, is too long, or is reversed."""
    x, axis_value = node.inputs
    assert x is not None
    assert axis_value is not None
    if x.dtype is None or x.shape is None or axis_value.const_value is None:
        raise PccError("E434", f"the operand of {node.name!r} has no type, or its axis no value")
    shape = [d for d in x.shape if isinstance(d, int)]
    if len(shape) < len(x.shape):
        raise PccError("E434", f"the operand of {node.name!r} has an open size: {x.shape}")
    turned = node.attributes.get("reverse")
    if turned is not None and turned.as_int():
        raise PccError("E434", f"{node.name!r} sums from the end", at=str(x.name))
    axis = int(axis_value.const_value.numpy()) % len(shape)
    flag = node.attributes.get("exclusive")
    site = Site(model, node, node)
    site.kind = x.dtype.numpy()
    exclusive = flag is not None and flag.as_int() == 1
    masses = node.metadata_props.get("pcc.op") in MASSES and x.dtype == ir.DataType.FLOAT
    masses = masses and axis == len(shape) - 1
    y = (_product if masses else _selected)(site, x, shape, axis, exclusive)
    replace(node.outputs[0], y)
    model.graph.remove(node, safe=True)


def _product(site: Site, x: ir.Value, shape: list[int], axis: int, exclusive: bool) -> ir.Value:
    ones = np.triu(np.ones((shape[axis], shape[axis]), np.float32), 1 if exclusive else 0)
    return site("MatMul", x, site.const(ones))


def _selected(site: Site, x: ir.Value, shape: list[int], axis: int, exclusive: bool) -> ir.Value:
    size = shape[axis]
    if math.prod(shape) * size > MOST:
        what = f"a running sum over {size} of {math.prod(shape)} elements is too long"
        raise PccError("E434", what, at=str(x.name))
    before = np.tri(size, k=-1 if exclusive else 0, dtype=np.bool_)  # [i, j]
    mask = site.const(before.reshape(size, size, *[1] * (len(shape) - 1 - axis)))
    terms = site("Where", mask, site("Unsqueeze", x, site.ints(axis)),
                 site.const(np.zeros((), site.kind)))  # fmt: skip
    return site("ReduceSum", terms, site.ints(axis + 1), keepdims=0)
