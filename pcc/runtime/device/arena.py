"""Small arrays side by side: one piece of device memory and its mirror on the host, one move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory, Pinned
from pcc.runtime.device.moves import Move, Moves
from pcc.runtime.dtypes import ITEM, STORED

Values = np.ndarray[Any, Any]
ALIGN = 256  # of each array: as an allocation of its own


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Return the bytes of a dense array."""
    return math.prod(shape) * ITEM[dtype]


def fixed(io: Mapping[str, Any], batch: int) -> list[int]:
    """Return the shape of an input or output for `batch` rows."""
    return [batch if d in ("B", "Bc") else int(d) for d in io["shape"]]


class Layout:
    """Where each of several arrays lies in one piece of memory."""

    def __init__(self, listed: Sequence[Mapping[str, Any]], batch: int) -> None:
        self.shapes = {io["name"]: fixed(io, batch) for io in listed}
        self.dtypes = {io["name"]: str(io["dtype"]) for io in listed}
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += -(-max(size_of(shape, self.dtypes[name]), 1) // ALIGN) * ALIGN

    def views(self, mirror: Pinned) -> dict[str, Values]:
        """Return the arrays as they lie in the host's mirror."""
        out = {}
        for name, shape in self.shapes.items():
            kind, at = np.dtype(STORED[self.dtypes[name]]), self.offsets[name]
            raw = mirror.array[at : at + math.prod(shape) * kind.itemsize]
            out[name] = raw.view(kind).reshape(shape)
        return out


class Arena:
    """The arrays of a layout on the device, with one or more mirrors on the host."""

    def __init__(self, device: Device, layout: Layout, mirrors: int) -> None:
        self.device, self.layout = device, layout
        self.memory = Memory(device, layout.size)
        self.mirrors = [Pinned(device, layout.size) for _ in range(mirrors)]
        self.views = [layout.views(m) for m in self.mirrors]
        self.downloads = [
            Moves(device, [Move(m.address, self.memory.address, layout.size, shown=True)])
            for m in self.mirrors
        ]

    def address(self, name: str) -> int:
        """Return where an array lies on the device."""
        return self.memory.address + self.layout.offsets[name]

    def upload(self, stream: int) -> None:
        """Enqueue the copy of the mirror to the device."""
        self.device.upload(self.memory.address, self.mirrors[0].address, self.layout.size, stream)

    def download(self, mirror: int, stream: int) -> None:
        """Enqueue the move of the device's arrays to a mirror."""
        self.downloads[mirror].enqueue(stream)
