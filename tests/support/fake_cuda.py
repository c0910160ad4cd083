"""`cuda.bindings.driver` over host memory: work waits in a queue until somebody waits for it.

Addresses are real ones of the host. What is enqueued runs when an event or the stream is waited
for, up to there and no further, so that a host that reads or overwrites too early is found out.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import ptx_threads

Work = Callable[[], None]
INVALID_HANDLE = 400


class _Number(int):
    """A result code or enumeration member of the bindings."""


class Cuda:
    """The functions of the bindings that `pcc.runtime.device.driver` calls."""

    def __init__(
        self, *, memory: int = 1 << 34, capability: tuple[int, int] = (9, 0), unified: bool = True
    ) -> None:
        self.room, self.capability, self.unified = memory, capability, unified
        self.held: dict[int, Any] = {}
        self.used = 0
        self.working = False
        self.queue: list[tuple[int, Work]] = []  # (number of the event that it is, or 0; work)
        self.recorded: list[Work] | None = None  # while a graph is captured
        self.graphs: dict[int, list[Work]] = {}
        self.calls: Counter[str] = Counter()
        self.numbers = 0
        self.kernels: dict[str, Callable[..., None]] = {}  # of modules that are no PTX
        self.fails: dict[str, int] = {}  # function: code
        self.launched: list[Any] = []
        self.block_shared, self.static_shared, self.blocks_each = 227 << 10, 16, 1
        self.open: Counter[str] = Counter()  # streams, events, modules that are not given back
        self.ended: set[int] = set()  # streams that were given back
        self.CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="processors",
            CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING="unified",
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared",
        )
        self.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
        self.CUfunction_attribute = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8
        )  # fmt: skip
        self.CUlaunchAttributeID = SimpleNamespace(
            CU_LAUNCH_ATTRIBUTE_COOPERATIVE=2,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6,
        )
        self.CUstreamCaptureMode = self.CUstream = int
        self.CUDA_MEMCPY2D = self.CUlaunchConfig = SimpleNamespace

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return object.__getattribute__(self, name)
        self.calls[name] += 1
        code = self.fails.get(name, 0)
        if code:
            return lambda *a: (_Number(code), 0)
        return object.__getattribute__(self, name)

    @staticmethod
    def CUlaunchAttribute() -> Any:  # noqa: N802
        return SimpleNamespace(value=SimpleNamespace())

    def _number(self) -> int:
        self.numbers += 1
        return self.numbers

    # ------------------------------------------------------------ the queue

    def enqueue(self, work: Work, event: int = 0) -> None:
        """Append some work, to the graph that is captured or to the stream."""
        if self.recorded is not None:
            assert not event, "an event in a captured graph"
            self.recorded.append(work)
        else:
            self.queue.append((event, work))

    def drain(self, event: int = 0) -> None:
        """Do what was enqueued, up to an event or all of it."""
        assert self.recorded is None, "the host waits while it captures"
        if self.working:
            return  # memory that is freed while something runs waits for its turn
        if event and not any(e == event for e, _ in self.queue):
            return  # it has happened
        while self.queue:
            found, work = self.queue.pop(0)
            self.working = True
            try:
                work()
            finally:
                self.working = False
            # The last record of an event is the one that counts.
            if event and found == event and not any(e == event for e, _ in self.queue):
                return

    # ------------------------------------------------------------ the device

    def cuInit(self, flags: int) -> Any:  # noqa: N802
        return (_Number(0),)

    def cuDriverGetVersion(self) -> Any:  # noqa: N802
        return _Number(0), 13000

    def cuDeviceGetCount(self) -> Any:  # noqa: N802
        return _Number(0), 1

    def cuDeviceGet(self, at: int) -> Any:  # noqa: N802
        return _Number(0), at

    def cuDeviceGetAttribute(self, kind: str, dev: int) -> Any:  # noqa: N802
        major, minor = self.capability
        known = {
            "major": major, "minor": minor, "processors": 2, "unified": int(self.unified),
            "shared": self.block_shared,
        }  # fmt: skip
        return _Number(0), known[kind]

    def cuDeviceGetName(self, size: int, dev: int) -> Any:  # noqa: N802
        return _Number(0), b"Fake GPU\0\0"

    def cuDevicePrimaryCtxRetain(self, dev: int) -> Any:  # noqa: N802
        return _Number(0), 1

    def cuCtxSetCurrent(self, context: int) -> Any:  # noqa: N802
        return (_Number(0),)

    def cuGetErrorName(self, code: Any) -> Any:  # noqa: N802
        return _Number(0), f"CUDA_ERROR_{int(code)}".encode()

    # ------------------------------------------------------------ memory

    def cuMemGetInfo(self) -> Any:  # noqa: N802
        return _Number(0), self.room - self.used, self.room

    def cuMemAlloc(self, size: int) -> Any:  # noqa: N802
        assert self.recorded is None, "memory is allocated while a graph is captured"
        if self.used + size > self.room:
            return _Number(2), 0
        raw = np.full(size + 256, 0xA5, np.uint8)  # garbage: nothing may rely on zeros
        address = -(-raw.ctypes.data // 256) * 256
        self.held[address] = raw
        self.used += size
        return _Number(0), address

    def cuMemFree(self, address: int) -> Any:  # noqa: N802
        if self.working:  # by the collector of garbage, say: the driver waits
            self.queue.append((0, lambda: self._release(address)))
            return (_Number(0),)
        if self.recorded is None:
            self.drain()
        self._release(address)
        return (_Number(0),)

    def _release(self, address: int) -> None:
        raw = self.held.pop(address)
        self.used -= len(raw) - 256
        raw[:] = 0xEE

    def cuMemHostAlloc(self, size: int, flags: int) -> Any:  # noqa: N802
        code, address = self.cuMemAlloc(size)
        self.used -= size
        return code, address

    def cuMemFreeHost(self, address: int) -> Any:  # noqa: N802
        self.used += len(self.held[address]) - 256
        return self.cuMemFree(address)

    def _move(self, to: int, source: int, size: int, stream: int) -> Any:
        self.enqueue(lambda: ctypes.memmove(to, source, size) and None)
        return (_Number(0),)

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = _move  # noqa: N815

    def cuMemsetD8Async(self, to: int, value: int, size: int, stream: int) -> Any:  # noqa: N802
        self.enqueue(lambda: ctypes.memset(to, value, size) and None)
        return (_Number(0),)

    def cuMemcpy2DAsync(self, c: Any, stream: int) -> Any:  # noqa: N802
        def work() -> None:
            for i in range(c.Height):
                to, source = c.dstDevice + i * c.dstPitch, c.srcDevice + i * c.srcPitch
                ctypes.memmove(to, source, c.WidthInBytes)

        self.enqueue(work)
        return (_Number(0),)

    # ------------------------------------------------------------ order

    def cuStreamCreate(self, flags: int) -> Any:  # noqa: N802
        self.open["stream"] += 1
        return _Number(0), self._number()

    def cuStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        self.drain()
        return (_Number(INVALID_HANDLE if stream in self.ended else 0),)  # a true driver crashes

    def cuStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        self.open["stream"] -= 1
        self.ended.add(stream)
        return (_Number(0),)

    def cuEventCreate(self, flags: int) -> Any:  # noqa: N802
        self.open["event"] += 1
        return _Number(0), self._number()

    def cuEventDestroy(self, event: int) -> Any:  # noqa: N802
        self.open["event"] -= 1
        return (_Number(0),)

    def cuEventRecord(self, event: int, stream: int) -> Any:  # noqa: N802
        self.enqueue(lambda: None, event)
        return (_Number(0),)

    def cuEventSynchronize(self, event: int) -> Any:  # noqa: N802
        self.drain(event)
        return (_Number(0),)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        self.recorded = []
        return (_Number(0),)

    def cuStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        at, self.graphs[at] = self._number(), self.recorded or []  # type: ignore[has-type]
        self.recorded = None
        return _Number(0), at

    def cuGraphInstantiate(self, graph: int, flags: int) -> Any:  # noqa: N802
        return _Number(0), graph

    def cuGraphDestroy(self, graph: int) -> Any:  # noqa: N802
        return (_Number(0),)

    def cuGraphExecDestroy(self, graph: int) -> Any:  # noqa: N802
        del self.graphs[graph]
        return (_Number(0),)

    def cuGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        for work in self.graphs[graph]:
            self.enqueue(work)
        return (_Number(0),)

    # ------------------------------------------------------------ kernels

    def cuModuleUnload(self, module: bytes) -> Any:  # noqa: N802
        assert not self.queue, "a kernel of it may be on its way"
        self.open["module"] -= 1
        return (_Number(0),)

    def cuFuncGetParamInfo(self, function: Any, at: int) -> Any:  # noqa: N802
        if at < function.__code__.co_argcount:
            return _Number(0), 8 * at, 8
        return _Number(1), 0, 0

    def cuModuleLoadData(self, image: bytes) -> Any:  # noqa: N802
        self.open["module"] += 1
        return _Number(0), image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> Any:  # noqa: N802
        if module.startswith(b".version"):
            return _Number(0), ptx_threads.parse(module.rstrip(b"\0").decode())
        found = self.kernels.get(name.decode())
        return (_Number(0), found) if found else (_Number(500), None)

    def cuFuncSetAttribute(self, function: Any, kind: int, value: int) -> Any:  # noqa: N802
        return (_Number(0),)

    def cuFuncGetAttribute(self, kind: int, function: Any) -> Any:  # noqa: N802
        assert kind == 1, kind
        return _Number(0), self.static_shared

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(  # noqa: N802
        self, function: Any, threads: int, shared: int
    ) -> Any:
        return _Number(0), self.blocks_each

    def cuLaunchKernelEx(self, c: Any, function: Any, places: int, extra: int) -> Any:  # noqa: N802
        grid, block = (c.gridDimX, c.gridDimY, c.gridDimZ), (c.blockDimX, c.blockDimY, c.blockDimZ)
        attributes = {a.id: vars(a.value) for a in c.attrs}
        self.launched.append((grid, block, c.sharedMemBytes, attributes))
        if isinstance(function, ptx_threads.Program):
            args = _arguments(places, len(function.parameters))
            self.enqueue(lambda: function.run(args, grid[0], block[0]))
        else:
            args = _arguments(places, function.__code__.co_argcount)
            self.enqueue(lambda: function(*args))
        return (_Number(0),)


def _arguments(places: int, count: int) -> list[int]:
    """Read pointers from kernel parameters, as the driver does when a kernel is launched."""
    table = (ctypes.c_void_p * count).from_address(places)
    return [ctypes.c_uint64.from_address(p or 0).value for p in table]
