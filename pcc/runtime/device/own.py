"""The engine of our own: plans of kernel launches, their code and weights on the device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.runtime.device.driver import Device
from pcc.runtime.device.fit import (
    OVERLAP,
    check_arch,
    check_resident,
    check_shared,
    note_division,
)
from pcc.runtime.device.handles import Functions, Kernel, Memory
from pcc.runtime.device.plan import MAX_ARGS, Plan, read_plan
from pcc.runtime.device.upload import Say, upload

MAX_CUBIN_BYTES = 256 << 20
POINTER = 8  # bytes of a parameter


@dataclass(frozen=True)
class Loaded:
    """A plan on the device: its kernels in order, and its scratch memory."""

    plan: Plan
    functions: Functions
    kernels: tuple[Kernel, ...]
    scratch: Memory

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.scratch.free()  # waits for the device, so that no kernel is on its way
            self.functions.free()


class Plans:
    """The plans of one bundle; all read one copy of the weights."""

    def __init__(
        self, device: Device, folder: Path, manifest: Mapping[str, Any], stream: int,
        say: Say | None = None,
    ) -> None:  # fmt: skip
        self.device, self.folder, self.manifest, self.stream = device, folder, manifest, stream
        self.say = say
        self._loaded: dict[str, Loaded] = {}
        self._weights: dict[str, Memory] = {}

    def executor(self, query: str) -> PlanExecutor:
        """Return a query's graph with addresses of its own. Errors: B240, B241, X305, X306."""
        if query not in self._loaded:
            self._loaded[query] = self._load(query)
        loaded = self._loaded[query]
        return PlanExecutor(self.device, query, loaded, self._base(loaded.plan.weights))

    def _load(self, query: str) -> Loaded:
        spec = self.manifest["queries"][query]
        states = (self.manifest["generation"] or {}).get("states", ())
        plan = read_plan(self.folder, query, spec, states)
        check_arch(self.device, plan.arch, str(self.folder))
        if not self._loaded:  # the graphs of a bundle are divided alike
            note_division(self.device, plan)
        path = inside(self.folder, plan.cubin)
        image = read_bounded(path, MAX_CUBIN_BYTES, "B240")
        functions = self.device.load(image, sorted({x.kernel for x in plan.launches}), str(path))
        self._check_parameters(plan, functions, str(path))
        kernels = self._kernels(plan, functions)
        scratch = Memory(self.device, plan.scratch_bytes)
        for b in plan.buffers:
            if b.kind == "scratch" and b.zero:  # counters: kernels leave them at zero
                self.device.zero(scratch.address + b.offset, b.bytes, self.stream)
        self.device.wait(self.stream)
        return Loaded(plan, functions, kernels, scratch)

    def _kernels(self, plan: Plan, functions: Functions) -> tuple[Kernel, ...]:
        """Return what each launch starts; all of them can run here. Errors: X306."""
        device, at = self.device, str(self.folder)
        most: dict[str, int] = {}
        static = {name: device.static_shared(f) for name, f in functions.items()}
        for x in plan.launches:
            check_shared(device, x, static[x.kernel], at)
            most[x.kernel] = max(x.shared, most.get(x.kernel, 0))
        for name, size in most.items():
            device.allow_shared(functions[name], size)
        waits = device.capability >= OVERLAP
        kernels = []
        for x in plan.launches:
            overlap = x.overlap and waits
            made = Kernel(functions[x.kernel], x.grid, x.block, x.shared, x.cooperative, overlap)
            check_resident(device, made, x.kernel, at)
            kernels.append(made)
        return tuple(kernels)

    def _check_parameters(self, plan: Plan, functions: Functions, at: str) -> None:
        """Need that each launch gives a kernel the pointers that it takes, where that is known."""
        known: dict[str, list[int] | None] = {}
        for x in plan.launches:
            if x.kernel not in known:
                known[x.kernel] = self.device.parameters(functions[x.kernel], MAX_ARGS)
            takes = known[x.kernel]
            if takes is not None and takes != [POINTER] * len(x.args):
                what = f"kernel {x.kernel[:60]!r} does not take {len(x.args)} pointers"
                raise PccError("B241", what, at=at, hint="compile the bundle again")

    def _base(self, name: str) -> int:
        """Return where a weight file lies on the device."""
        if name not in self._weights:
            path = inside(self.folder, name)
            size = path.stat().st_size
            free, _ = self.device.memory()
            if size > free:
                raise self.device.too_little(size)
            memory = Memory(self.device, size)
            upload(self.device, path, [(0, size, memory.address)], self.stream, self.say)
            self._weights[name] = memory
        return self._weights[name].address


class PlanExecutor:
    """One plan over arrays that the caller binds (`pcc.runtime.device.executor.Executor`)."""

    def __init__(self, device: Device, query: str, loaded: Loaded, weights: int) -> None:
        self.device, self.query, self.loaded = device, query, loaded
        self.addresses: list[int] = []
        self.places: dict[str, list[int]] = {}
        for i, b in enumerate(loaded.plan.buffers):
            base = {"weight": weights, "scratch": loaded.scratch.address}.get(b.kind)
            self.addresses.append(0 if base is None else base + b.offset)
            if base is None:
                self.places.setdefault(b.name, []).append(i)

    @property
    def document(self) -> Mapping[str, Any]:
        """The plan as it stands in its file."""
        return self.loaded.plan.document

    @property
    def scratch(self) -> int:
        """Bytes of scratch memory."""
        return self.loaded.plan.scratch_bytes

    def bind(self, name: str, address: int) -> None:
        """Say where an array lies on the device; one that the plan does not read is ignored."""
        kind, _, state = name.partition(".")
        names = (name, state) if kind in ("past", "present") else (name,)
        for n in names:
            for i in self.places.get(n, ()):
                self.addresses[i] = address

    def enqueue(self, stream: int) -> None:
        """Enqueue every launch in order."""
        self.enqueue_some(range(len(self.loaded.kernels)), stream)

    def enqueue_some(self, launches: Sequence[int], stream: int) -> None:
        """Enqueue some of the launches, by index: to time them alone."""
        if 0 in self.addresses:
            name = self.loaded.plan.buffers[self.addresses.index(0)].name
            raise PccError("R103", f"'{self.query}' has no address for {name[:60]!r}")
        at, kernels = self.addresses, self.loaded.kernels
        for i in launches:
            args = [at[j] for j in self.loaded.plan.launches[i].args]
            self.device.start(kernels[i], args, stream)
