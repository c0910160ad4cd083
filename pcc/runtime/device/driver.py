"""The CUDA driver, as little of it as engines need; every failure is a `PccError` (X30x).

Memory is addressed by integers. Work is enqueued on one stream and returns at once; whoever needs
a result waits for an event. All through `cuda-bindings`, which is imported when a GPU is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from pcc.errors import PccError
from pcc.runtime.device.handles import Functions, Held, Kernel

OLDEST = 12000  # driver API: programmatic launches and cooperative nodes in graphs
RELAXED = 2  # CUstreamCaptureMode: a runtime may allocate while its work is recorded
SYNC_STREAM, SYNC_EVENT = 1, 2  # non-blocking stream; event without times
NO_MEMORY, NO_VALUE = 2, 1  # CUresult
PARAMETERS_KNOWN = 12040  # driver API: asks what a kernel takes
MANY = 64  # handles that wait to be given back
MORE_SHARED = 48 << 10  # bytes of shared memory beyond which a kernel has to ask


def bindings() -> Any:
    """Return `cuda.bindings.driver`. Errors: X301 where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as e:
        what = "cuda-bindings is not installed"
        if "cuda" not in str(e):
            what = f"cuda-bindings cannot be imported: {str(e)[:120]}"
        raise PccError("X301", what, hint="pip install 'pcc[gpu]'") from None
    return driver


class Device:
    """One GPU: its primary context, and the calls of the driver that engines need."""

    def __init__(self, ordinal: int = 0, cu: Any = None) -> None:
        self.cu = bindings() if cu is None else cu
        self._kept: dict[str, Functions] = {}
        self._buried: tuple[list[tuple[str, Any]], ...] = ([], [])
        self.ordinal = ordinal
        try:
            self._start(ordinal)
        except PccError:
            raise
        except (RuntimeError, OSError, ImportError) as e:  # cuda-bindings finds no library
            what = f"no NVIDIA driver is installed ({type(e).__name__})"
            raise PccError("X302", what, hint="install the driver; `pcc doctor` shows it") from None

    def _start(self, ordinal: int) -> None:
        code = self.cu.cuInit(0)[0]
        if int(code) == 100:
            raise PccError("X303", "there is no GPU", hint="`pcc doctor` shows what is found")
        if int(code):
            what = f"the NVIDIA driver does not start: {self._name(code)}"
            raise PccError("X302", what, hint="`nvidia-smi` says more")
        self.version = int(self("cuDriverGetVersion"))
        if self.version < OLDEST:
            have = f"{self.version // 1000}.{self.version % 1000 // 10}"
            what = f"the NVIDIA driver supports CUDA {have}, needed is {OLDEST // 1000}"
            raise PccError("X302", what, hint="install a newer driver")
        count = int(self("cuDeviceGetCount"))
        if ordinal >= count:
            what = f"there is no GPU {ordinal}" if count else "there is no GPU"
            raise PccError("X303", what, hint="`pcc doctor` shows what is found")
        self.handle = self("cuDeviceGet", ordinal)
        self.capability = (
            self._attribute("COMPUTE_CAPABILITY_MAJOR"),
            self._attribute("COMPUTE_CAPABILITY_MINOR"),
        )
        self.processors = self._attribute("MULTIPROCESSOR_COUNT")
        name = self("cuDeviceGetName", 128, self.handle)
        self.name = bytes(name).split(b"\0")[0].decode("utf-8", "replace")
        self.context = self("cuDevicePrimaryCtxRetain", self.handle)
        self.enter()

    def _attribute(self, name: str) -> int:
        kind = getattr(self.cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self("cuDeviceGetAttribute", kind, self.handle))

    @property
    def arch(self) -> str:
        """The architecture as compilers name it: `sm_90`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @cached_property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block may have."""
        return self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")

    def __call__(self, function: str, *args: Any) -> Any:
        """Call the driver; return its results without the code. Errors: X304, X305."""
        found = getattr(self.cu, function)(*args)
        if int(found[0]) == NO_MEMORY:
            raise self.too_little(0, f"for the driver's {function}")
        if int(found[0]):
            what = f"the driver's {function} failed: {self._name(found[0])}"
            raise PccError("X304", what, hint="`nvidia-smi` shows the state of the GPU")
        return found[1] if len(found) == 2 else found[1:] or None

    def _name(self, code: Any) -> str:
        _, name = self.cu.cuGetErrorName(code)
        return bytes(name).decode() if name else str(int(code))

    def enter(self) -> None:
        """Make this GPU the calling thread's."""
        self("cuCtxSetCurrent", self.context)

    def bury(self, end: str, handle: Any) -> None:
        """Let the driver's function `end` give a handle back when nobody can be using it."""
        self._buried[-1].append((end, handle))

    def _give_back(self) -> None:
        """Give back what was buried before the last time this was called.

        What was buried since waits: the finalizers beside it may be on their way, in any thread.
        """
        old, new = self._buried
        self._buried = (new, [])
        for end, handle in old:
            getattr(self.cu, end)(handle)

    # ------------------------------------------------------------ memory

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        free, total = self("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes, aligned to 256. Errors: X305."""
        found = self.cu.cuMemAlloc(max(size, 1))
        if int(found[0]) == NO_MEMORY:
            raise self.too_little(size)
        if int(found[0]):
            raise PccError("X304", f"the driver's cuMemAlloc failed: {self._name(found[0])}")
        return int(found[1])

    def too_little(self, size: int, why: str = "") -> PccError:
        """Return the error that says how much memory is needed or what for, and what is free."""
        _, free, total = self.cu.cuMemGetInfo()  # whatever it says: it must not fail in turn
        what = (f"too little memory on {self.name}: {why or shown(size) + ' needed'}, "
                f"{shown(int(free or 0))} of {shown(int(total or 0))} free")  # fmt: skip
        hint = "a smaller --max-seq, --batch or --precision, or end what else uses the GPU"
        return PccError("X305", what, hint=hint)

    def release(self, address: int) -> None:
        """Free what `allocate` gave."""
        self.cu.cuMemFree(address)

    def allocate_host(self, size: int) -> int:
        """Return the address of page-locked bytes."""
        found = self.cu.cuMemHostAlloc(size, 0)
        if int(found[0]) == NO_MEMORY:
            raise PccError("X305", f"the host has no {shown(size)} of page-locked memory")
        if int(found[0]):
            raise PccError("X304", f"the driver's cuMemHostAlloc failed: {self._name(found[0])}")
        return int(found[1])

    def release_host(self, address: int) -> None:
        """Free what `allocate_host` gave."""
        self.cu.cuMemFreeHost(address)

    def upload(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy from the host."""
        if size:
            self("cuMemcpyHtoDAsync", to, source, size, stream)

    def download(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy to the host."""
        if size:
            self("cuMemcpyDtoHAsync", to, source, size, stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy on the device."""
        if size:
            self("cuMemcpyDtoDAsync", to, source, size, stream)

    def zero(self, to: int, size: int, stream: int) -> None:
        """Fill with zeros."""
        if size:
            self("cuMemsetD8Async", to, 0, size, stream)

    def copy_rows(
        self, to: int, source: int, pitches: tuple[int, int], width: int, rows: int, stream: int
    ) -> None:
        """Copy `rows` pieces of `width` bytes that lie `pitches` = (to, source) bytes apart."""
        c = self.cu.CUDA_MEMCPY2D()
        c.srcMemoryType = c.dstMemoryType = self.cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        c.dstDevice, c.srcDevice = to, source
        c.dstPitch, c.srcPitch = pitches
        c.WidthInBytes, c.Height = width, rows
        self("cuMemcpy2DAsync", c, stream)

    # ------------------------------------------------------------ order

    def stream(self) -> Held:
        """Return a new stream that does not wait for the default one."""
        self._give_back()
        return Held.of(self, "cuStreamDestroy", self("cuStreamCreate", SYNC_STREAM))

    def wait(self, stream: int) -> None:
        """Return when everything enqueued so far is done."""
        self("cuStreamSynchronize", stream)

    def event(self, *, times: bool = False) -> Held:
        """Return a new event; with `times`, `elapsed` works on it."""
        if len(self._buried[-1]) > MANY:  # an engine may have one stream and many events
            self._give_back()
        return Held.of(self, "cuEventDestroy", self("cuEventCreate", 0 if times else SYNC_EVENT))

    def record(self, event: int, stream: int) -> None:
        """Make the event happen after what is enqueued so far."""
        self("cuEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """Return when the event has happened."""
        self("cuEventSynchronize", event)

    def follow(self, stream: int, event: int) -> None:
        """Let what is enqueued on a stream from now on wait for an event."""
        self("cuStreamWaitEvent", stream, event, 0)

    def elapsed(self, first: int, last: int) -> float:
        """Return the milliseconds between two events that have happened."""
        return float(self("cuEventElapsedTime", first, last))

    # ------------------------------------------------------------ graphs

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Return a graph of what `work` enqueues on the stream, ready to launch; nothing runs."""
        self("cuStreamBeginCapture", stream, self.cu.CUstreamCaptureMode(RELAXED))
        try:
            work()
        except BaseException:
            self.cu.cuStreamEndCapture(stream)  # its own failure would hide the reason
            raise
        graph = self("cuStreamEndCapture", stream)
        try:
            return int(self("cuGraphInstantiate", graph, 0))
        finally:
            self.cu.cuGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        self("cuGraphLaunch", graph, stream)

    def forget(self, graph: int) -> None:
        """Free a captured graph."""
        self.cu.cuGraphExecDestroy(graph)

    # ------------------------------------------------------------ kernels

    def load(self, image: bytes, names: Sequence[str], at: str = "") -> Functions:
        """Return functions of a cubin or PTX text by name; whoever asked frees them.

        Errors: X306 where the image is for another GPU; B241 where it is damaged or lacks one.
        """
        found = self.cu.cuModuleLoadData(image)
        code = int(found[0])
        if code in (209, 218, 222):  # no image for this GPU, invalid PTX, PTX too new
            what = f"the kernels do not run on {self.name} ({self.arch}): {self._name(found[0])}"
            raise PccError("X306", what, at=at, hint=f"compile with --gpu {self.arch}")
        if code == NO_MEMORY:
            raise self.too_little(len(image))
        if code:
            what = f"the driver refuses the kernels: {self._name(found[0])}"
            raise PccError("B241", what, at=at, hint="compile the bundle again")
        out = Functions(self, found[1])
        for name in names:
            got = self.cu.cuModuleGetFunction(found[1], name.encode())
            if int(got[0]):
                out.free()
                raise PccError("B241", f"there is no kernel {name[:60]!r}", at=at)
            out[name] = got[1]
        return out

    def once(self, key: str, image: Callable[[], bytes], name: str) -> Any:
        """Return a kernel that every session needs: loaded once, and kept with the device."""
        if key not in self._kept:
            self._kept[key] = self.load(image(), [name])
        return self._kept[key][name]

    def parameters(self, function: Any, most: int) -> list[int] | None:
        """Return the bytes of each parameter of a kernel, up to `most` and one more.

        None where the driver cannot say.
        """
        if self.version < PARAMETERS_KNOWN or not hasattr(self.cu, "cuFuncGetParamInfo"):
            return None
        sizes: list[int] = []
        for i in range(most + 1):
            try:
                found = self.cu.cuFuncGetParamInfo(function, i)
            except RuntimeError:  # the bindings know the call, the driver does not
                return None
            if int(found[0]):
                return sizes if int(found[0]) == NO_VALUE else None
            sizes.append(int(found[2]))
        return sizes

    def allow_shared(self, function: Any, size: int) -> None:
        """Let a kernel use `size` bytes of dynamic shared memory."""
        if size > MORE_SHARED:
            kind = self.cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self("cuFuncSetAttribute", function, kind, size)

    def static_shared(self, function: Any) -> int:
        """Return the bytes of shared memory that a kernel has without asking."""
        kind = self.cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        return int(self("cuFuncGetAttribute", kind, function))

    def resident(self, kernel: Kernel) -> int:
        """Return how many blocks of a kernel the GPU holds at once, alone."""
        threads = kernel.block[0] * kernel.block[1] * kernel.block[2]
        ask = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        return self.processors * int(self(ask, kernel.function, threads, kernel.shared))

    def start(self, kernel: Kernel, addresses: Sequence[int], stream: int) -> None:
        """Enqueue a kernel whose parameters are all pointers."""
        values = (ctypes.c_uint64 * max(1, len(addresses)))(*addresses)
        step, base = ctypes.sizeof(ctypes.c_uint64), ctypes.addressof(values)
        places = (ctypes.c_void_p * max(1, len(addresses)))(
            *(base + step * i for i in range(len(addresses)))
        )
        self("cuLaunchKernelEx", self._config(kernel, stream), kernel.function,
             ctypes.addressof(places), 0)  # fmt: skip

    def _config(self, kernel: Kernel, stream: int) -> Any:
        c = self.cu.CUlaunchConfig()
        c.gridDimX, c.gridDimY, c.gridDimZ = kernel.grid
        c.blockDimX, c.blockDimY, c.blockDimZ = kernel.block
        c.sharedMemBytes, c.hStream = kernel.shared, self.cu.CUstream(stream)
        attributes, kinds = [], self.cu.CUlaunchAttributeID
        if kernel.cooperative:
            a = self.cu.CUlaunchAttribute()
            a.id, a.value.cooperative = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1
            attributes.append(a)
        if kernel.overlap:
            a = self.cu.CUlaunchAttribute()
            a.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            a.value.programmaticStreamSerializationAllowed = 1
            attributes.append(a)
        c.attrs, c.numAttrs = attributes, len(attributes)
        return c


_opened: dict[int, Device] = {}


def device(ordinal: int = 0) -> Device:
    """Return a GPU; the same object for the same number."""
    if ordinal not in _opened:
        _opened[ordinal] = Device(ordinal)
    _opened[ordinal].enter()
    return _opened[ordinal]


def shown(size: int) -> str:
    """Return bytes for people."""
    for unit, step in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
