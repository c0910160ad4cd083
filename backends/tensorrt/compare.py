"""Two graphs of one query: equal but for the values of float constants, or E437.

The earlier one is of a bundle that may be a stranger's: what it says of its constants is compared
with the weight file before anything is read there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from pcc.bundle import WEIGHTS
from pcc.errors import PccError
from pcc.files import read_bounded

MAX_GRAPH = 1 << 31  # bytes of a graph file, which holds no large arrays
T = onnx.TensorProto
FLOATS: Mapping[int, str] = {T.FLOAT: "f32", T.FLOAT16: "f16", T.BFLOAT16: "bf16"}
# Bytes of an element, of all types that graphs for TensorRT have.
SIZES: Mapping[int, int] = {T.FLOAT: 4, T.FLOAT16: 2, T.BFLOAT16: 2, T.INT64: 8, T.INT32: 4,
                            T.INT8: 1, T.UINT8: 1, T.BOOL: 1}  # fmt: skip
DIGITS = 18  # of a place in a file
PIECE = 1 << 24  # bytes compared at once


class Constant:
    """An initializer of a graph in `folder`: its bytes, or where they lie in the weight file.

    Errors: E437 where it is no array, or lies outside the file.
    """

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        self.name, self.shape, self.folder = tensor.name, list(tensor.dims), folder
        self.dtype = FLOATS.get(tensor.data_type, "")  # "" for integers
        self.place: tuple[int, int] | None = None
        self.raw = b""
        self.changed = False
        self._need(tensor.data_type in SIZES and min(self.shape, default=0) >= 0,
                   "has a type or shape that no graph here has")  # fmt: skip
        size = math.prod(self.shape) * SIZES[tensor.data_type]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            self.place = self._placed(tensor, size)
            return
        try:
            self.raw = onnx.numpy_helper.to_array(tensor).tobytes()
        except (ValueError, TypeError, OverflowError):
            self._need(False, "is no array")
        self._need(len(self.raw) == size, "is no array")

    def _need(self, ok: bool, what: str) -> None:
        if not ok:
            what = f"the constant {self.name[:60]!r} {what}"
            raise PccError("E437", what, at=str(self.folder), hint="compile the bundle again")

    def _placed(self, tensor: onnx.TensorProto, size: int) -> tuple[int, int]:
        """Return offset and bytes in the weight file."""
        listed = {e.key: e.value for e in tensor.external_data}
        self._need(listed.get("location") == Path(WEIGHTS).name, "lies in another file")
        at, length = listed.get("offset", "0"), listed.get("length", "")
        digits = all(v.isascii() and v.isdigit() and len(v) <= DIGITS for v in (at, length))
        self._need(digits, "has no place in its file")
        self._need(int(length) == size, f"is not of {size} bytes")
        there = self.file.stat().st_size if self.file.is_file() else 0
        self._need(int(at) + size <= there, f"lies beyond the end of {self.file.name}")
        return int(at), size

    @property
    def file(self) -> Path:
        """The weight file of its graph."""
        return self.folder / Path(WEIGHTS).name

    def same(self, other: Constant) -> bool:
        """Whether two constants of one type and shape have the same bytes."""
        x, y = self._bytes(), other._bytes()
        pieces = range(0, len(x), PIECE)
        return len(x) == len(y) and all(
            np.array_equal(x[at : at + PIECE], y[at : at + PIECE]) for at in pieces
        )

    def _bytes(self) -> np.ndarray[Any, Any]:
        if self.place is None or not self.place[1]:
            return np.frombuffer(self.raw, np.uint8)
        at, size = self.place
        return np.memmap(self.file, np.uint8, "r", at, (size,))


def compared(old: Path, new: Path, name: str) -> list[Constant]:
    """Return the float constants of `new`, a graph that is `old` but for their values.

    Errors: E437.
    """

    def need(ok: object, what: str) -> None:
        if not ok:
            hint = "trained numbers may differ, not what a graph does with them: compile anew"
            raise PccError("E437", f"the plan of '{name}' is of another graph: {what}", hint=hint)

    a, b = (_graph(p) for p in (old, new))
    need(len(a.node) == len(b.node), f"{len(a.node)} nodes, not {len(b.node)}")
    for x, y in zip(a.node, b.node, strict=True):
        need(_node(x) == _node(y), f"{x.name[:80]!r} is {y.name[:80]!r}")
    for what, xs, ys in (("inputs", a.input, b.input), ("outputs", a.output, b.output)):
        need([_value(v) for v in xs] == [_value(v) for v in ys], f"its {what}")
    names = [[i.name for i in g.initializer] for g in (a, b)]
    need(names[0] == names[1] and not a.sparse_initializer, "its constants")
    out = []
    for x, y in zip(a.initializer, b.initializer, strict=True):
        kinds = [(i.data_type, list(i.dims)) for i in (x, y)]
        need(kinds[0] == kinds[1], f"the size of {y.name[:60]!r}")
        earlier, constant = Constant(x, old.parent), Constant(y, new.parent)
        constant.changed = not constant.same(earlier)
        need(constant.dtype or not constant.changed, f"{y.name[:60]!r} is no weight")
        out += [constant] * bool(constant.dtype)
    return out


def _graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load_model_from_string(read_bounded(path, MAX_GRAPH, "E437")).graph
    except OSError as e:
        raise PccError("E437", f"cannot read a graph: {e.strerror}", at=str(path)) from None
    except DecodeError:
        raise PccError("E437", "this is no graph", at=str(path),
                       hint="compile the bundle again") from None  # fmt: skip


def _node(n: onnx.NodeProto) -> tuple[object, ...]:
    attributes = sorted(a.SerializeToString() for a in n.attribute)
    return n.op_type, n.domain, list(n.input), list(n.output), attributes


def _value(v: onnx.ValueInfoProto) -> tuple[str, bytes]:
    return v.name, v.type.SerializeToString()
