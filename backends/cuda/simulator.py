"""Runs a plan on the host: hand-written kernels by their stand-ins, generated ones as C++.

What it proves is the plan: that patterns are equal to what they replace, that arrays have the
layouts that kernels expect, and that no scratch is used again too early (what is free is filled
with NaN). It says nothing about the machine code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc.backends.cuda.builder import Builder, Drawn
from pcc.backends.cuda.codegen.generate import Generated
from pcc.backends.cuda.codegen.host import Host
from pcc.backends.cuda.kernel import SCRATCH, Argument, Kernel
from pcc.backends.cuda.plan import Buffer
from pcc.backends.cuda.standins import copy, stand_in
from pcc.emission import graph_name
from pcc.ir.array import dtype_of

Values = np.ndarray[Any, Any]
Work = Callable[[Mapping[str, Values]], None]
Around = Callable[[Drawn, Mapping[str, Values]], Callable[[], None]]


def host_dtype(kind: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a buffer."""
    return np.dtype({"u32": "<u4", "u8": "u1"}[kind]) if kind in ("u32", "u8") else dtype_of(kind)


def _is_generated(kernel: Kernel) -> bool:
    return isinstance(kernel, Generated)


class Simulator:
    """One graph's plan with its weights, ready to run again and again; states are the caller's."""

    def __init__(self, builder: Builder) -> None:
        self.plan = builder.plan("")
        self._launches = builder.launches
        inputs = {x.key for x in builder.graph.inputs}  # outputs have their names in the module
        self._names = {graph_name(n, inputs): n for n in builder.graph.outputs.values()}
        with tempfile.TemporaryDirectory() as folder:
            builder.weights.write(Path(folder) / "weights.bin")
            self._weights = np.fromfile(Path(folder) / "weights.bin", np.uint8)
        self._arena = np.full(self.plan.scratch_bytes, 0xFF, np.uint8)
        for b in self.plan.buffers:
            if b.kind == "scratch" and b.zero:
                self._arena[b.offset : b.offset + b.bytes] = 0
        generated = {x.kernel.name: x.kernel for x in self._launches if _is_generated(x.kernel)}
        self._host = Host(list(generated.values()))
        self.seed = 0
        self._work = [self._works(x) for x in self._launches]
        self._ends = self._last_uses()

    def _last_uses(self) -> list[list[Buffer]]:
        last: dict[int, int] = {}
        for i, launch in enumerate(self.plan.launches):
            last |= dict.fromkeys(launch.args, i)
        out: list[list[Buffer]] = [[] for _ in self.plan.launches]
        for at, i in last.items():
            b = self.plan.buffers[at]
            if b.kind == "scratch" and not b.zero:
                out[i].append(b)
        return out

    def _works(self, launch: Drawn) -> Work:
        found = stand_in(launch.kernel)
        if found is not None:
            return found
        if not _is_generated(launch.kernel):
            return lambda arrays: copy({}, arrays)
        kernel, host = launch.kernel, self._host
        return lambda arrays: host(kernel.name, [arrays[a.name] for a in kernel.args], self.seed)

    def run(self, given: Mapping[str, Values], around: Around | None = None) -> dict[str, Values]:
        """Return outputs and states (as `present.X`) for inputs and states (`past.X`) by name.

        States with one buffer are changed in place. `around` is called with each launch and its
        arrays by argument; what it returns is called once the launch is done.
        """
        bound: dict[int, Values] = {}
        for i, b in enumerate(self.plan.buffers):
            if b.kind in ("input", "output", "state"):
                bound[i] = self._bound(b, given)
        for launch, work, ends in zip(self._launches, self._work, self._ends, strict=True):
            arrays = {
                a.name: self._array(a, at, bound)
                for a, at in zip(launch.kernel.args, launch.args, strict=True)
            }
            after = around(launch, arrays) if around is not None else None
            work(arrays)
            if after is not None:
                after()
            for a in launch.kernel.args:
                if a.role == SCRATCH and a.zero and arrays[a.name].any():
                    raise AssertionError(f"{launch.kernel.name} left {a.name} other than zero")
            for b in ends:
                self._arena[b.offset : b.offset + b.bytes] = 0xFF
        out: dict[str, Values] = {}
        for i, b in enumerate(self.plan.buffers):
            if b.kind == "output" or (b.kind == "state" and not b.name.startswith("past.")):
                plain = b.kind == "output" or b.name.startswith("present.")
                name = self._names.get(b.name, b.name)
                out[name if plain else f"present.{name}"] = bound[i]
        return out

    def _bound(self, b: Buffer, given: Mapping[str, Values]) -> Values:
        names = (b.name, f"past.{b.name}") if b.kind == "state" else (b.name,)
        found = next((given[n] for n in names if n in given), None)
        if found is None:
            fresh = np.empty(b.shape, host_dtype(b.dtype))
            fresh.reshape(-1).view(np.uint8)[:] = 0xFF
            return fresh
        if found.shape != b.shape or found.dtype != host_dtype(b.dtype):
            raise AssertionError(f"{b.name} is {found.dtype}{found.shape}, the plan has {b}")
        return np.ascontiguousarray(found)

    def _array(self, a: Argument, at: int, bound: Mapping[int, Values]) -> Values:
        b, kind = self.plan.buffers[at], host_dtype(a.dtype)
        if at in bound:
            return bound[at].reshape(a.shape)
        memory = self._weights if b.kind == "weight" else self._arena
        return memory[b.offset : b.offset + b.bytes].view(kind).reshape(a.shape)
