"""Literals of the text form, each printer beside its reader: integer lists and small arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pcc.ir.array import Array, dtype_of, kind_of, rounded
from pcc.ir.core import Values
from pcc.ir.scan import Cursor, quote
from pcc.ir.types import TRAINED
from pcc.knobs import INLINE_ELEMENTS, MAX_INLINE_ELEMENTS

TRUTH = {"true": True, "false": False}
_BITS = {"i64": 64, "i8": 8}
# The least numbers that round to infinity.
_TOO_LARGE = {"f32": 2.0**128 - 2.0**103, "f16": 65520.0, "bf16": 2.0**128 - 2.0**119}


def show_ints(values: tuple[int, ...]) -> str:
    """Print a list of integers; five or more in a row become a range."""
    out: list[str] = []
    i, n = 0, len(values)
    while i < n:
        j = i + 1
        while j < n and values[j] == values[j - 1] + 1:
            j += 1
        if j - i >= 5 and values[i] >= 0:
            out.append(f"{values[i]}-{values[j - 1]}")
        else:
            out.extend(map(str, values[i:j]))
        i = j
    return "[" + " ".join(out) + "]"


def show_array(a: Array) -> str:
    """Return an array inline if it is small, else its hash."""
    if a.size > INLINE_ELEMENTS:
        return f"#{a.ref}"
    items = " ".join(_item(x) for x in a.value.ravel())
    return f"{a.dtype}[{','.join(map(str, a.shape))}]({items})"


def _item(x: Any) -> str:
    if isinstance(x, np.bool_):
        return "true" if x else "false"
    if isinstance(x, np.integer):
        return str(int(x))
    s = str(x)  # shortest for its bits; the parser reads 64 first, which may round twice
    return s if _float(float(s), kind_of(np.asarray(x))) == x else repr(float(x))


def _float(x: float, dtype: str) -> Any:
    return rounded(np.asarray(x), dtype)[()]


def read_array(c: Cursor) -> Values:
    """Read an inline array such as `f32[2,3](0.1 0.2 ...)`."""
    dtype = c.word("an array, 'f32[2](0.5 0.5)' or '#sha256-..'")
    if dtype not in TRAINED:
        raise c.error("E007", f"unknown dtype {quote(dtype)}", f"one of {', '.join(TRAINED)}")
    c.need("[")
    dims = [d.strip() for d in c.inside("]").split(",", 17)]
    dims = [] if dims == [""] else dims
    if len(dims) > 16 or not all(d.isascii() and d.isdigit() and len(d) < 12 for d in dims):
        raise c.error("E007", f"cannot read the shape {quote(','.join(dims))}")
    c.need("(")
    items = c.inside(")").split(None, MAX_INLINE_ELEMENTS)
    shape = tuple(map(int, dims))
    if math.prod(shape) != len(items) or len(items) > MAX_INLINE_ELEMENTS:
        what = f"the shape {shape} has {math.prod(shape)} elements, {len(items)} are listed"
        raise c.error("E007", what, f"at most {MAX_INLINE_ELEMENTS} elements are inline")
    flat = np.array([_element(c, x, dtype) for x in items], dtype_of(dtype))
    try:
        return flat.reshape(shape)
    except ValueError as e:  # an empty array may have axes beyond what NumPy can index
        raise c.error("E007", f"cannot make the shape {shape}: {e}") from None


def _element(c: Cursor, s: str, dtype: str) -> object:
    if dtype in _TOO_LARGE:
        x = read_float(c, s)
        if math.isfinite(x) and abs(x) >= _TOO_LARGE[dtype]:
            raise c.error("E007", f"{quote(s)} does not fit into {dtype}")
        return x
    if dtype == "bool" and s in TRUTH:
        return TRUTH[s]
    digits = s.removeprefix("-")
    if dtype in _BITS and digits.isascii() and digits.isdigit() and len(digits) < 20:
        top = 1 << (_BITS[dtype] - 1)
        if -top <= int(s) < top:
            return int(s)
    raise c.error("E007", f"{quote(s)} is not an element of type {dtype}")


def read_float(c: Cursor, s: str) -> float:
    """Return the number that a word spells."""
    try:
        if "_" not in s and len(s) <= 400:
            return float(s)
    except ValueError:
        pass
    raise c.error("E007", f"{quote(s)} is not a number")
