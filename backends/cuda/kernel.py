"""What a kernel is to the rest of the compiler: source, launch sizes and the buffers it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcc.backends.cuda.plan import ITEM

Dim = tuple[int, int, int]
READ, WRITE, UPDATE, SCRATCH = "read", "write", "update", "scratch"


@dataclass(frozen=True)
class Argument:
    """One pointer of a kernel: a dense array.

    `role`: "read"; "write" (each element is written); "update" (read and written in place);
    "scratch" (of no meaning outside; with `zero` it must hold zeros before the first launch of all,
    each launch leaves it so, and no kernel that may run at the same time shares it).
    `early`: a kernel with `overlap` may read it before it waits, so that the launch right before
    must not write it (`pcc.backends.cuda.early`).
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    zero: bool = False
    early: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM[self.dtype]


@dataclass(frozen=True)
class Kernel:
    """One `extern "C" __global__` function `name`, its launch and its arguments in order.

    `source` includes headers of `kernels/` by name. `overlap`: the kernel waits for the launches
    before it by itself (`griddepcontrol.wait`), so it may be launched with the attribute
    programmatic stream serialization, and then starts while they end.
    """

    name: str
    source: str
    grid: Dim
    block: Dim
    shared: int
    cooperative: bool
    args: tuple[Argument, ...]
    overlap: bool = False
