"""Whether the launches of a plan can run on the GPU at hand, before the first of them does."""

from __future__ import annotations

import math
import warnings

from pcc.errors import PccError
from pcc.runtime.device.driver import Device, shown
from pcc.runtime.device.handles import Kernel
from pcc.runtime.device.plan import ARCH, Launch, Plan

OVERLAP = (9, 0)  # compute capability from which kernels wait by themselves


def check_arch(device: Device, arch: str, at: str) -> None:
    """Raise X306 where code for `arch` does not run on a GPU.

    Code for sm_XY runs on X.Y and later of the same X; with a letter, on X.Y alone ("f": on X).
    """
    match = ARCH.fullmatch(arch)
    assert match is not None
    major, minor, only = int(match[1]), int(match[2]), match[3]
    have = device.capability
    fits = have[0] == major and (have[1] == minor if only == "a" else have[1] >= minor)
    if not fits:
        what = f"the engine was built for {arch}, {device.name} is {device.arch}"
        raise PccError("X306", what, at=at, hint=f"compile with --gpu {device.arch}")


def check_shared(device: Device, launch: Launch, static: int, at: str) -> None:
    """Raise X306 where a launch takes more shared memory than a block may have."""
    most = device.block_shared
    if launch.shared + static > most:
        what = (
            f"kernel {launch.kernel[:60]!r} takes {shown(launch.shared + static)} of shared memory,"
            f" {device.name} has {shown(most)} for a block"
        )
        raise PccError("X306", what, at=at, hint=f"compile with --gpu {device.arch}")


def check_resident(device: Device, kernel: Kernel, name: str, at: str) -> None:
    """Raise X306 where blocks wait for each other and do not all fit on the GPU at once."""
    blocks = math.prod(kernel.grid)
    if kernel.cooperative and blocks > (most := device.resident(kernel)):
        what = f"{blocks} blocks of kernel {name[:60]!r} run at once, {device.name} holds {most}"
        hint = f"compile with --gpu {device.arch}:{device.processors}"
        raise PccError("X306", what, at=at, hint=hint)


def note_division(device: Device, plan: Plan) -> None:
    """Warn where work was divided for another number of multiprocessors: slower, not wrong."""
    if plan.processors not in (0, device.processors):
        what = (
            f"the engine was divided for {plan.processors} multiprocessors, {device.name} has "
            f"{device.processors}: right, but slower than it could be; compile with "
            f"--gpu {device.arch}:{device.processors}"
        )
        warnings.warn(what, RuntimeWarning, stacklevel=2)
