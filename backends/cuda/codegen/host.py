"""Generated kernels on a CPU: the same source, compiled as C++, for tests without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pcc.backends.cuda.kernel import Kernel
from pcc.backends.cuda.nvcc import KERNELS
from pcc.backends.cuda.plan import ITEM
from pcc.errors import PccError

FLAGS = (
    "-x", "c++", "-std=c++17", "-w", "-shared", "-fPIC", "-DPCC_HOST", "-U_FORTIFY_SOURCE",
    "-fno-gnu-unique", "-ffp-contract=off",
)  # fmt: skip


class Host:
    """Kernels in a library of this process."""

    def __init__(
        self, kernels: Sequence[Kernel], *, threads: int = 64, blocks: int = 2, quick: bool = False
    ) -> None:
        """Compile with g++. Few threads and blocks do the work of many. Errors: X405.

        `quick`: nothing is optimised, which is faster where a kernel runs a few times.
        """
        self.threads, self.blocks = threads, blocks
        self.kernels = {k.name: k for k in kernels}
        compiler = shutil.which("g++")
        if compiler is None:
            raise PccError("X405", "no g++ is here", hint="install a C++ compiler")
        with tempfile.TemporaryDirectory(prefix="pcc-host-") as folder:
            source, made = Path(folder) / "k.cu", Path(folder) / "k.so"
            source.write_text("\n".join(k.source for k in self.kernels.values()), encoding="utf-8")
            level = "-O0" if quick else "-O1"
            call = [compiler, *FLAGS, level, f"-I{KERNELS}", str(source), "-o", str(made)]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PccError("X405", f"g++ refuses a kernel: {done.stderr[:4000]}")
            self.library = ctypes.CDLL(str(made))

    def __call__(self, name: str, buffers: Sequence[np.ndarray[Any, Any]], seed: int = 0) -> None:
        """Run a kernel over one C-contiguous array for each argument, of at least its bytes.

        `seed` is the order of threads between barriers: 0, 1 the latest first, else shuffled.
        """
        kernel = self.kernels[name]
        for a, b in zip(kernel.args, buffers, strict=True):
            if b.nbytes < a.bytes or not b.flags.c_contiguous:
                raise PccError("X405", f"'{a.name}' of {name} has {b.nbytes} bytes, not {a.bytes}")
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        call = self.library[f"{name}_host"]
        call.restype = ctypes.c_bool
        blocks = min(kernel.grid[0], self.blocks)
        if not call(pointers, blocks, self.threads, seed):
            raise PccError("X405", f"{name}: a thread waits for others that do not come")


__all__ = ["ITEM", "Host"]
