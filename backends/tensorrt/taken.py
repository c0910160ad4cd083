"""Plans of an earlier bundle for graphs that differ from its own in trained numbers alone.

A plan that was built with `refit` takes other weights. So a bundle for another head of the same
shapes needs no build: its graphs are written as always, each is compared with the earlier bundle's,
and the plan is taken over; the runtime fills it when it is loaded. Anything but the values of float
constants must be equal: E437 names the first difference.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from pcc.backends.tensorrt.build import Built, Sizes
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.bundle import REFIT, WEIGHTS, inside, read_manifest
from pcc.errors import PccError
from pcc.files import read_bounded

MAX_GRAPH = 1 << 31  # bytes of a graph file, which holds no large arrays
MAX_LIST = 64 << 20  # bytes of a list of weights
FLOATS: dict[int, str] = {onnx.TensorProto.FLOAT: "f32", onnx.TensorProto.FLOAT16: "f16",
          onnx.TensorProto.BFLOAT16: "bf16"}  # fmt: skip
PIECE = 1 << 24  # bytes compared at once


class Taken:
    """Gives the plans of an earlier bundle, as `Builder` builds them.

    `weights`: by graph, where each float constant lies and whether it differs from the earlier one.
    """

    def __init__(self, r: TensorRt, options: BuildOptions, given: Mapping[str, Any]) -> None:
        self.folder = Path(options.plans)
        self.manifest = read_manifest(self.folder)
        listed = self.manifest.get("variants") or ()
        variant: dict[str, Any] = next(
            (v for v in listed if v.get("format") == "tensorrt"), {"runtime": "nothing"}
        )
        if variant["runtime"] != r.name:
            what = f"it has plans for {str(variant['runtime'])[:20]}, not for TensorRT {r.name}"
            raise PccError("E437", what, at=str(self.folder))
        self.runtime, self.arch, self.cache = r, str(variant["gpu"]), b""
        self.options = self._options(variant, given)
        self.module = SimpleNamespace(__version__=variant["version"])
        self.variant = variant
        self.weights: dict[str, list[Weight]] = {}
        self._otherwise: dict[str, set[str]] = {}

    def _options(self, variant: Mapping[str, Any], given: Mapping[str, Any]) -> BuildOptions:
        """Return the options of the plans; none that are given may say otherwise."""
        options = BuildOptions.of(variant["options"])
        for name, value in given.items():
            old = str(getattr(options, name, value))
            if name != "plans" and str(value).lower() not in (old.lower(), *_words(old)):
                what = f"the plans were built with {name}={old[:40]}, not {str(value)[:40]!r}"
                raise PccError("E437", what, at=str(self.folder))
        if options.refit != "refit":
            what = f"the plans were built with refit={options.refit}: their weights cannot change"
            hint = "compile the first bundle with --engine refit=refit"
            raise PccError("E437", what, at=str(self.folder), hint=hint)
        return options

    def build(self, model: ir.Model, path: Path, profiles: Sequence[Sizes] = ()) -> Built:
        """Return the earlier plan of the graph at `path`. Errors: E437 for another graph."""
        name = path.stem
        file = next((f for f in self._engines() if Path(f).stem == name), "")
        if not file:
            raise PccError("E437", f"no plan of '{name}' is there", at=str(self.folder))
        listed = self.variant.get("profiles", {}).get(file, [])
        if [p["shapes"] for p in listed] != [dict(p) for p in profiles]:
            raise PccError("E437", f"the plan of '{name}' has other profiles", at=str(self.folder))
        old = inside(self.folder, f"graphs/{name}.onnx")
        self.weights[name] = compared(old, path, name)
        for w in self.weights[name]:  # of a bundle that took its plans from another one
            w.changed = w.changed or w.name in self._changed(file, name)
        made = self._engines()[file]
        with inside(self.folder, file).open("rb") as f:
            plan = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return Built(plan, int(made["layers"]), 0.0, [], dict(made["pinned"]))

    def _changed(self, file: str, name: str) -> set[str]:
        """Return the constants that the plan itself has otherwise than the earlier bundle."""
        if not self.variant.get("refit"):
            return set()
        if name not in self._otherwise:
            path = inside(self.folder, f"{Path(file).parent.as_posix()}/{REFIT}")
            listed = json.loads(read_bounded(path, MAX_LIST, "E437"))[name]
            self._otherwise[name] = {w["name"] for w in listed if w["changed"]}
        return self._otherwise[name]

    def _engines(self) -> dict[str, Any]:
        found = self.variant.get("engines")
        if not isinstance(found, dict):
            raise PccError("E437", "the bundle does not list its engines", at=str(self.folder),
                           hint="compile it again")  # fmt: skip
        return found


def _words(value: str) -> tuple[str, ...]:
    """Return other spellings of a truth value."""
    return {"True": ("yes", "1"), "False": ("no", "0")}.get(value, ())


class Weight:
    """A float constant of a graph: its array, or where it lies in the weight file."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        self.name, self.shape = tensor.name, list(tensor.dims)
        self.dtype, self.folder = FLOATS[tensor.data_type], folder
        self.place: tuple[int, int] | None = None
        self.raw = b""
        self.changed = False
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            listed = {e.key: e.value for e in tensor.external_data}
            if listed.get("location") != Path(WEIGHTS).name:
                raise PccError("E437", f"{tensor.name[:60]!r} lies in another file")
            self.place = int(listed.get("offset", 0)), int(listed["length"])
        else:
            self.raw = onnx.numpy_helper.to_array(tensor).tobytes()

    def same(self, other: Weight) -> bool:
        """Whether two constants have the same bytes."""
        if self.place is None or other.place is None:
            return self.place == other.place and self.raw == other.raw
        (a, size), (b, length) = self.place, other.place
        if size != length:
            return False
        files = [np.memmap(w.folder / Path(WEIGHTS).name, np.uint8, "r") for w in (self, other)]
        return all(
            np.array_equal(files[0][a + at : a + end], files[1][b + at : b + end])
            for at in range(0, size, PIECE)
            for end in (min(at + PIECE, size),)
        )


def compared(old: Path, new: Path, name: str) -> list[Weight]:
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
    before = {i.name: i for i in a.initializer}
    need(list(before) == [i.name for i in b.initializer], "its constants")
    out = []
    for tensor in b.initializer:
        earlier = before[tensor.name]
        kind = earlier.data_type, list(earlier.dims)
        need(kind == (tensor.data_type, list(tensor.dims)), f"the size of {tensor.name[:60]!r}")
        if tensor.data_type not in FLOATS:
            same = earlier.SerializeToString() == tensor.SerializeToString()
            need(same or _integers(earlier, old, tensor, new), f"{tensor.name[:60]!r} is no weight")
            continue
        weight = Weight(tensor, new.parent)
        weight.changed = not weight.same(Weight(earlier, old.parent))
        out.append(weight)
    return out


def _graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load_model_from_string(read_bounded(path, MAX_GRAPH, "E437")).graph
    except OSError as e:
        raise PccError("E437", f"cannot read a graph: {e.strerror}", at=str(path)) from None


def _integers(a: onnx.TensorProto, old: Path, b: onnx.TensorProto, new: Path) -> bool:
    """Whether integers that lie in the weight files are equal."""
    x, y = (onnx.numpy_helper.to_array(v, str(p.parent)) for v, p in ((a, old), (b, new)))
    return bool(np.array_equal(x, y))


def _node(n: onnx.NodeProto) -> tuple[object, ...]:
    attributes = sorted(a.SerializeToString() for a in n.attribute)
    return n.op_type, n.domain, list(n.input), list(n.output), attributes


def _value(v: onnx.ValueInfoProto) -> tuple[str, bytes]:
    return v.name, v.type.SerializeToString()
