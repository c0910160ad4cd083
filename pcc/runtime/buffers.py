"""Named arrays that a graph reads and writes in place, allocated once and bound to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.dtypes import ITEM, NUMPY
from pcc.runtime.ort import first_line, import_ort

Values = np.ndarray[Any, Any]


class Buffer:
    """An array and the ONNX Runtime value that shares its memory."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        # Zeros, not empty: rows beyond the length are masked, but 0 * NaN would still be NaN.
        try:
            self.array: Values = np.zeros(tuple(shape), NUMPY[dtype])
        except (MemoryError, ValueError):
            what = f"no memory for an array of shape {tuple(shape)}"
            hint = "shorter sequences, or fewer rows at a time"
            raise PccError("X211", what, hint=hint) from None
        self.value = import_ort().OrtValue.ortvalue_from_numpy(self.array)
        if self.value.data_ptr() != self.array.ctypes.data and self.array.size:
            raise PccError(
                "X210",
                "this onnxruntime copies arrays that are bound to it",
                hint="use onnxruntime 1.24 or later with the CPU provider",
            )


class States:
    """The state tensors of a model for B rows: `past.X` and `present.X` are one buffer.

    States with a rows axis (caches) are bound in place. The others are small and are read by more
    than the op that writes them, so they have a second buffer and are copied after each call.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]], batch: int) -> None:
        self.specs = list(specs)
        self.batch = batch
        self.rows = 0  # of the buffers, as the manifest counts them
        self.past: dict[str, Buffer] = {}
        self.present: dict[str, Buffer] = {}

    def bytes_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the memory that states of these per-row shapes take."""
        total = 0
        for s in self.specs:
            size = int(np.prod(shapes[s["name"]], dtype=np.int64)) * self.batch
            copies = 1 if s["rows_axis"] is not None else 2
            total += size * ITEM[s["dtype"]] * copies
        return total

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Allocate the states with these per-row shapes, keeping what was in the old rows."""
        for s in self.specs:
            name, axis = s["name"], s["rows_axis"]
            old = self.past.get(name)
            full = (self.batch, *shapes[name])
            if old is not None and old.array.shape == full:
                continue
            new = Buffer(full, s["dtype"])
            if old is not None:
                keep = min(old.array.shape[axis + 1], full[axis + 1])
                at = (slice(None),) * (axis + 1) + (slice(keep),)
                new.array[at] = old.array[at]
            self.past[name] = new
            self.present[name] = new if axis is not None else Buffer(full, s["dtype"])

    def settle(self) -> None:
        """Make the present of the last call the past of the next."""
        for name, new in self.present.items():
            if new is not self.past[name]:
                np.copyto(self.past[name].array, new.array)

    def read(self, name: str) -> Values:
        """Return a state; it changes with the next call."""
        return self.past[name].array

    def write(self, name: str, value: Values) -> None:
        """Replace a state by an array of its shape and type."""
        self.past[name].array[:] = value


def bytes_bound(spec: Mapping[str, Any], batch: int) -> int:
    """Return the bytes of a graph's inputs and outputs, states aside."""
    total = 0
    for io in (*spec["inputs"], *spec["outputs"]):
        if not io["name"].startswith(("past.", "present.")):
            sizes = [batch if d in ("B", "Bc") else d for d in io["shape"]]
            total += int(np.prod(sizes, dtype=np.int64)) * ITEM[io["dtype"]]
    return total


class Call:
    """One graph bound to its buffers: fill `self[name]`, `run()`, read `self[name]`."""

    def __init__(self, session: Any, spec: Mapping[str, Any], batch: int) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.inputs: dict[str, Buffer] = {}
        self.outputs: dict[str, Buffer] = {}
        for i in spec["inputs"]:
            if not i["name"].startswith("past."):
                self.inputs[i["name"]] = self._make(i, batch)
        for o in spec["outputs"]:
            if not o["name"].startswith("present."):
                self.outputs[o["name"]] = self._make(o, batch)
        for name, b in self.inputs.items():
            self.binding.bind_ortvalue_input(name, b.value)
        onnx = {o["name"]: o.get("onnx", o["name"]) for o in spec["outputs"]}
        for name, b in self.outputs.items():
            self.binding.bind_ortvalue_output(onnx[name], b.value)
        self.names = {k for k in onnx if k.startswith("present.")}

    def _make(self, io: Mapping[str, Any], batch: int) -> Buffer:
        sizes = [batch if d in ("B", "Bc") else d for d in io["shape"]]
        return Buffer(sizes, io["dtype"])

    def attach(self, states: States) -> None:
        """Bind the state buffers, after every resize."""
        for name, b in states.past.items():
            self.binding.bind_ortvalue_input(f"past.{name}", b.value)
        for name, b in states.present.items():
            if f"present.{name}" in self.names:
                self.binding.bind_ortvalue_output(f"present.{name}", b.value)

    def give(self, name: str, value: Values) -> None:
        """Bind an input that never changes, where it lies."""
        self.binding.bind_ortvalue_input(name, import_ort().OrtValue.ortvalue_from_numpy(value))

    def __getitem__(self, name: str) -> Values:
        buffer = self.inputs.get(name) or self.outputs[name]
        return buffer.array

    def run(self) -> None:
        """Run the graph over its buffers."""
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as e:  # onnxruntime raises its own types, none of them exported
            what = f"onnxruntime cannot run the graph: {first_line(e)}"
            raise PccError("B222", what) from None
