"""What a device holds for the host: memory, handles of the driver, kernels and how they start.

Each is given back with its object, or some time after it.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pcc.runtime.device.driver import Device

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Memory:
    """Bytes on the device; freed with the object."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.bytes = device, size
        self.address = device.allocate(size)

    def free(self) -> None:
        """Give the bytes back now."""
        if self.address:
            address, self.address = self.address, 0
            self.device.release(address)

    def __del__(self) -> None:
        if getattr(self, "address", 0) and not sys.is_finalizing():  # the system takes it then
            self.free()


class _Locked:
    """Page-locked memory, alive as long as an array shows it."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.address = device, device.allocate_host(size)

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():
            self.device.release_host(self.address)


class Pinned:
    """Page-locked bytes of the host, as an array: what asynchronous copies need."""

    def __init__(self, device: Device, size: int) -> None:
        owner = _Locked(device, max(size, 1))
        self.address = owner.address
        raw: Any = (ctypes.c_uint8 * max(size, 1)).from_address(owner.address)
        raw.owner = owner
        self.array: Bytes = np.ctypeslib.as_array(raw)[:size]
        self.array[:] = 0


@dataclass(frozen=True)
class Kernel:
    """A function of a loaded module and how it is launched."""

    function: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0
    cooperative: bool = False
    overlap: bool = False


class Held(int):
    """A stream or an event as a number, given back some time after the last reference to it.

    Not at once: where a session is garbage in a cycle, Python finalizes its parts in any order, and
    others still wait for their stream then (`Device.bury`).
    """

    device: Device
    end: str

    @classmethod
    def of(cls, device: Device, end: str, handle: Any) -> Held:
        """Return a handle that the driver's function `end` frees."""
        made = cls(int(handle))
        made.device, made.end = device, end
        return made

    def __del__(self) -> None:
        if hasattr(self, "end") and not sys.is_finalizing():
            self.device.bury(self.end, int(self))


class Functions(dict[str, Any]):
    """Functions of a loaded module by name, until it is freed."""

    def __init__(self, device: Device, module: Any) -> None:
        super().__init__()
        self.device, self._module = device, module

    def free(self) -> None:
        """Have the module unloaded; nothing of it may be on its way."""
        if self._module is not None:
            module, self._module = self._module, None
            self.clear()
            self.device.bury("cuModuleUnload", module)  # recorded graphs of it may be forgotten yet
