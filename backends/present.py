"""The GPU that is present, as the driver describes it: no package is needed for that."""

from __future__ import annotations

import ctypes

PROCESSORS, MAJOR, MINOR = 16, 75, 76  # CUdevice_attribute: multiprocessors, compute capability


def attributes(*numbers: int) -> tuple[int, ...] | None:
    """Return attributes of the first GPU by number; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    out = []
    for number in numbers:
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device):
            return None
        out.append(value.value)
    return tuple(out)
