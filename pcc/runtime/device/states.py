"""The state tensors of B rows on the device: caches in place, others in two buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcc.runtime.device.arena import Values, size_of
from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory
from pcc.runtime.device.moves import Move
from pcc.runtime.dtypes import ITEM, STORED


class DeviceState:
    """One dense array on the device."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: str, stream: int) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.bytes = size_of(self.shape, dtype)
        self.memory = Memory(device, self.bytes)
        # Zeros: rows beyond the length are masked, but 0 * NaN would still be NaN.
        device.zero(self.memory.address, self.bytes, stream)

    @property
    def address(self) -> int:
        """Where it lies."""
        return self.memory.address


class DeviceStates:
    """`past.X` and `present.X` of a model.

    States with an axis of rows are one buffer, written in place: rows beyond the length count
    nowhere. The others are small: `settle` makes the present of a call the past of the next. Where
    a round was launched ahead, that happened on the device already (`chain`, its first step), and
    the past of before is kept until the host has accepted the round it came from.
    """

    def __init__(self, device: Device, stream: int, specs: Sequence[Mapping[str, Any]], batch: int):
        self.device, self.stream = device, stream
        self.specs, self.batch = list(specs), batch
        self.rows = 0  # of the buffers, as the manifest counts them
        self.past: dict[str, DeviceState] = {}
        self.present: dict[str, DeviceState] = {}
        self.before: dict[str, DeviceState] = {}
        self.ahead = False  # a round was launched from the present, which is the past now
        self.accepted = True  # the host has accepted the last round that it has seen

    def bytes_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the memory that states of these per-row shapes take."""
        total = 0
        for s in self.specs:
            one = size_of((self.batch, *shapes[s["name"]]), s["dtype"])
            total += one * (1 if s["rows_axis"] is not None else 3)
        return total

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Allocate the states with these per-row shapes, keeping what was in the old rows."""
        for s in self.specs:
            name, axis = s["name"], s["rows_axis"]
            old, full = self.past.get(name), (self.batch, *shapes[name])
            if old is not None and old.shape == full:
                continue
            new = self._made(full, s["dtype"])
            if old is not None:
                self._keep(old, new, int(axis) + 1)
            self.past[name] = new
            self.present[name] = new if axis is not None else self._made(full, s["dtype"])
            if axis is None:
                self.before[name] = self._made(full, s["dtype"])
            self.device.wait(self.stream)  # the old one is freed when nothing reads it any more

    def _made(self, shape: Sequence[int], dtype: str) -> DeviceState:
        return DeviceState(self.device, shape, dtype, self.stream)

    def _keep(self, old: DeviceState, new: DeviceState, axis: int) -> None:
        item = ITEM[new.dtype]
        inner = int(np.prod(new.shape[axis + 1 :], dtype=np.int64)) * item
        pitches = (new.shape[axis] * inner, old.shape[axis] * inner)
        blocks = int(np.prod(new.shape[:axis], dtype=np.int64))
        self.device.copy_rows(new.address, old.address, pitches, min(pitches), blocks, self.stream)

    def settle(self) -> None:
        """Accept the last call: its present is the past of the next."""
        self.accepted = True
        if not self.ahead:
            self._copy(self.past, self.present)

    def chain(self) -> list[Move]:
        """Return what a round that is launched ahead begins with: before <- past <- present."""
        return [
            Move(self.past[k].address, self.present[k].address, self.past[k].bytes, kept=b.address)
            for k, b in self.before.items()  # states in one buffer have nothing to move
        ]

    def drop(self) -> None:
        """Forget a round that was launched ahead, and take the one before back if it failed."""
        if self.ahead and not self.accepted:
            self._copy(self.past, self.before)
        self.ahead = False

    def _copy(self, to: Mapping[str, DeviceState], source: Mapping[str, DeviceState]) -> None:
        for name in self.before:  # states in one buffer have nothing to copy
            a, b = to[name], source[name]
            self.device.copy(a.address, b.address, a.bytes, self.stream)

    def read(self, name: str) -> Values:
        """Return a state as it is; bf16 as its bits."""
        return self.value(self.past[name])

    def value(self, s: DeviceState) -> Values:
        """Return what one state holds."""
        out = np.empty(s.shape, STORED[s.dtype])
        self.device.download(out.ctypes.data, s.address, s.bytes, self.stream)
        self.device.wait(self.stream)
        return out

    def write(self, name: str, value: Values) -> None:
        """Replace a state by an array of its shape and type."""
        s = self.past[name]
        source = np.ascontiguousarray(value, STORED[s.dtype])
        if source.shape != s.shape:
            raise ValueError(f"state {name} has shape {s.shape}, not {source.shape}")
        self.device.upload(s.address, source.ctypes.data, s.bytes, self.stream)
        self.device.wait(self.stream)
