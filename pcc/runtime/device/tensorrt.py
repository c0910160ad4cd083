"""TensorRT engines of a bundle on a device: opened with care, bound by address, enqueued.

An engine of another release, another GPU or damaged bytes is refused with one line (X33x) before
anything runs. A 64-bit integer of the manifest may be a pair of 32-bit ones in the engine: the same
bytes (docs/tensorrt.md).
"""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.runtime.device.driver import Device
from pcc.runtime.device.executor import Executor, arrays, bytes_of
from pcc.runtime.device.handles import Memory
from pcc.runtime.device.parts import Part, PartsExecutor, parts_of, select
from pcc.runtime.device.refit import fill
from pcc.runtime.device.upload import upload
from pcc.variants import MODULES, variant_of

# A type of the manifest in an engine. Where there are no 64-bit integers, one is a pair of words.
IN_ENGINE = {"f32": ("FLOAT",), "f16": ("HALF",), "bf16": ("BF16",), "bool": ("BOOL",),
             "i64": ("INT64", "INT32")}  # fmt: skip
NO_MEMORY = ("out of memory", "outofmemory", "could not be allocated", "failed to allocate")
ENGINE_ITEM = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}
MESSAGES = 50
AGAIN = "compile the bundle again on this machine"


class _Said:
    """What TensorRT reported last; there is one logger to a process and module."""

    loggers: dict[str, tuple[Any, list[str]]] = {}  # noqa: RUF012

    @classmethod
    def of(cls, module: Any) -> tuple[Any, list[str]]:
        """Return the logger of a module and the errors that it collects."""
        if module.__name__ not in cls.loggers:
            errors: list[str] = []
            least = int(module.ILogger.Severity.ERROR)

            class Collector(module.ILogger):  # type: ignore[misc]
                def __init__(self) -> None:
                    module.ILogger.__init__(self)

                def log(self, severity: Any, text: str) -> None:
                    if int(severity) <= least and len(errors) < MESSAGES:
                        errors.append(" ".join(text.split())[:240])

            cls.loggers[module.__name__] = Collector(), errors
        return cls.loggers[module.__name__]


def import_tensorrt(variant: Mapping[str, Any]) -> Any:
    """Import the module that an engine needs, of its version. Errors: X330, X331."""
    name, want = variant["module"], variant["version"]
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        reason = (str(e).splitlines() or [""])[0][:120]
        what = f"{name} cannot be imported: {reason}"
        raise PccError("X330", what, hint=f"pip install '{MODULES[name]}=={want[:20]}'") from None
    have = str(module.__version__)
    loose = bool(variant["options"].get("version_compatible"))
    if not _runs(want, have, loose):
        what = f"the engines were built with {name} {want[:40]}, installed is {have}"
        raise PccError("X331", what, hint=f"pip install '{MODULES[name]}=={want[:20]}', or {AGAIN}")
    return module


def _runs(want: str, have: str, loose: bool) -> bool:
    """Whether a plan of release `want` runs under `have`: bindings of 8.6.1 run libraries of 8.6.0.

    A version-compatible plan runs under the later releases of its major version.
    """
    a, b = ([int(p) if p.isdigit() else -1 for p in x.split(".")[:2]] for x in (want, have))
    return a == b or (loose and len(a) == len(b) == 2 and a[0] == b[0] and a[1] <= b[1])


def check_gpu(device: Device, variant: Mapping[str, Any]) -> None:
    """Raise X333 where an engine was built for another GPU."""
    built, here = variant["gpu"], device.arch
    plus = variant["options"].get("hardware") == "ampere_plus"
    if built == here or (plus and device.capability >= (8, 0)):
        return
    what = f"the engines were built for {built[:20]}, {device.name} is {here}"
    raise PccError("X333", what, hint=AGAIN)


class Opener:
    """Opens engines of one bundle with one TensorRT runtime."""

    def __init__(
        self, device: Device, folder: Path, manifest: Mapping[str, Any], stream: int = 0
    ) -> None:
        self.device, self.folder, self.manifest, self.stream = device, folder, manifest, stream
        self.variant = variant_of(manifest, str(folder))
        self.module = import_tensorrt(self.variant)
        check_gpu(device, self.variant)
        self.logger, self.errors = _Said.of(self.module)
        self.runtime = self.module.Runtime(self.logger)
        if self.runtime is None:
            raise PccError("X334", f"TensorRT does not start: {self.why()}")
        self._engines: dict[str, Any] = {}
        self._tables: dict[str, Memory] = {}

    def why(self) -> str:
        """Return the first error since the last call."""
        out = self.errors[0] if self.errors else "it gives no reason"
        self.errors.clear()
        return out

    def failed(self, code: str, what: str, at: Path, size: int) -> PccError:
        """Return the error of a call that failed: X305 where TensorRT lacked memory for `size`."""
        lacked = any(part in e.lower() for e in self.errors for part in NO_MEMORY)
        why = self.why()
        if lacked:
            return self.device.too_little(size)
        return PccError(code, f"{what}: {why}", at=str(at), hint=AGAIN)

    def executor(self, query: str) -> Executor:
        """Open the engines of a query. Errors: X330 to X335, X305, B215."""
        spec = self.manifest["queries"][query]
        name = str(spec["graph"])
        if not name.endswith(".plan"):
            hint = f"compile again, with {query} among `only`"
            raise PccError("X334", f"'{query}' has no engine in this bundle", hint=hint)
        if parts := parts_of(spec, query, self.manifest):
            return PartsExecutor(self, query, spec, parts)
        return TensorRtExecutor(self, self._engine(name), spec, query)

    def part(self, part: Part, query: str) -> TensorRtExecutor:
        """Return one of the engines of a query."""
        tables = {name: size for name, (_, size) in part.tables.items()}
        return TensorRtExecutor(
            self, self._engine(part.graph), part.spec, query, part.profile, tables
        )

    def tables(self, file: str) -> Memory:
        """Return a file of tables on the device."""
        if file not in self._tables:
            path = inside(self.folder, file)
            size = path.stat().st_size
            memory = Memory(self.device, size)
            upload(self.device, path, [(0, size, memory.address)], self.stream)
            self._tables[file] = memory
        return self._tables[file]

    def _engine(self, name: str) -> Any:
        if name not in self._engines:
            self._engines[name] = self._open(inside(self.folder, name))
        return self._engines[name]

    def _open(self, path: Path) -> Any:
        self.errors.clear()
        self.device.enter()
        with path.open("rb") as f:
            if path.stat().st_size == 0:
                raise PccError("X334", "the engine is empty", at=str(path), hint=AGAIN)
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = memoryview(data)
                try:
                    engine = self.runtime.deserialize_cuda_engine(view)
                finally:
                    view.release()
        if engine is None:
            size = path.stat().st_size
            raise self.failed("X334", "TensorRT refuses the engine", path, size)
        if self.variant["options"].get("strip") or self.variant.get("refit"):
            fill(self, engine, path)
        return engine


class TensorRtExecutor:
    """One engine with its execution context (`pcc.runtime.device.executor.Executor`).

    Where the engine does not write caches in place it returns whole ones: they get a buffer of
    their own, and are copied to where the caller wants them, after each run.
    """

    def __init__(
        self, opener: Opener, engine: Any, spec: Mapping[str, Any], query: str,
        profile: int | None = None, tables: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.opener, self.engine, self.query = opener, engine, query
        self.tables = dict(tables or {})
        self.names = [*(name for name, _ in arrays(spec)), *self.tables]
        self.context = engine.create_execution_context()
        if self.context is None:
            raise opener.device.too_little(self.scratch)
        if profile is not None:
            select(engine, self.context, profile, opener.device, opener.stream, query)
        self.sizes = self._checked(spec)
        self.at: dict[str, int] = {}
        self.own: dict[str, Memory] = {}
        self.aliased = self._aliases()
        self._settled = False

    @property
    def scratch(self) -> int:
        """Bytes of activations on the device."""
        for name in ("device_memory_size_v2", "device_memory_size"):
            if hasattr(self.engine, name):
                return int(getattr(self.engine, name))
        return 0

    def _checked(self, spec: Mapping[str, Any]) -> dict[str, int]:
        """Return the bytes of each array by its name; the engine's must be the manifest's.

        Sizes are the context's. An engine with profiles leaves an open input open, but of an
        output it may give the sizes of its first profile, of which every input has one shape.
        """
        engine, batch = self.engine, int(spec.get("batch", 1))
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != set(self.names):
            lost = sorted(found ^ set(self.names))
            raise PccError("X334", f"the engine of '{self.query}' has other arrays: {lost[0]!r}",
                           hint=AGAIN)  # fmt: skip
        sizes = {}
        for name, io in arrays(spec):
            kind = engine.get_tensor_dtype(name).name
            if kind not in IN_ENGINE[io["dtype"]]:
                what = f"{io['name']!r} of '{self.query}' is {kind}, not {io['dtype']}"
                raise PccError("X334", what, hint=AGAIN)
            sizes[name] = self._bytes(name, bytes_of(io, batch, self.opener.manifest))
        return sizes | {name: self._bytes(name, want) for name, want in self.tables.items()}

    def _bytes(self, name: str, want: int) -> int:
        """Return the bytes of an array, which are to be so many."""
        kind = self.engine.get_tensor_dtype(name).name
        shape = self.context.get_tensor_shape(name)
        have = int(math.prod(shape)) * ENGINE_ITEM.get(kind, 0)
        if have != want or min(shape, default=0) < 0:
            what = f"{name!r} of '{self.query}' takes {have} bytes, not {want}"
            raise PccError("X334", what, hint=AGAIN)
        return have

    def _aliases(self) -> set[str]:
        """Return the outputs that the engine writes into an input."""
        ask = getattr(self.engine, "get_aliased_input_tensor", None)
        outs = [k for k in self.names if k.startswith("present.")]
        return {k for k in outs if ask is not None and ask(k)}

    def bind(self, name: str, address: int) -> None:
        """Say where an array lies on the device."""
        if name not in self.names:
            raise PccError("R102", f"'{self.query}' has no array {name[:60]!r}")
        self.at[name] = address
        self._settled = False

    def enqueue(self, stream: int) -> None:
        """Enqueue the engine, and the copies of caches that it does not write in place."""
        if not self._settled:
            self._settle()
        if not self.context.execute_async_v3(stream):
            what = f"TensorRT cannot run '{self.query}': {self.opener.why()}"
            raise PccError("X336", what)
        for name, memory in self.own.items():
            self.opener.device.copy(self.at[name], memory.address, memory.bytes, stream)

    def _settle(self) -> None:
        """Give every array its address."""
        if missing := [k for k in self.names if k not in self.at]:
            raise PccError("R103", f"'{self.query}' has no address for {missing[0]!r}")
        for name in self.names:
            address = self.at[name]
            if name.startswith("present."):
                address = self._present(name)
            if not self.context.set_tensor_address(name, address):
                raise PccError("X336", f"TensorRT refuses an address: {self.opener.why()}")
        self._settled = True

    def _present(self, name: str) -> int:
        past = self.at.get("past." + name.removeprefix("present."))
        if name in self.aliased:
            if self.at[name] != past:
                what = f"{name!r} is written in place: bind it where the past lies"
                raise PccError("X336", what)
            return self.at[name]
        if self.at[name] != past:
            return self.at[name]
        if name not in self.own:
            self.own[name] = Memory(self.opener.device, self.sizes[name])
        return self.own[name].address
