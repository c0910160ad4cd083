"""Static ONNX graphs under ONNX Runtime's CUDA provider: every node, every array on the device."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.runtime.device.arena import ALIGN, fixed
from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory
from pcc.runtime.device.upload import Say, upload
from pcc.runtime.ort import check_provider, first_line, import_ort
from pcc.runtime.weights import FILE, pieces

PROVIDER = "CUDAExecutionProvider"
# ONNX's numbers of element types; numpy has no bf16.
ELEMENT = {"f32": 1, "i64": 7, "bool": 9, "f16": 10, "bf16": 16}
# What ONNX Runtime only warns of, and what it would cost.
FAULTS = {
    "in-place optimization": "a cache is copied whole in every round",
    "Memcpy nodes": "values travel between the device and the host within the graph",
}
WARNING, ERROR = 2, 3  # levels of its log
LOG = re.compile(rb"(\x1b\[[0-9;]*m)*\d{4}-\d\d-\d\d [0-9:.]+ \[[VIWEF]:onnxruntime:")
HEARD = 10_000  # lines of it that are looked at
_HEARING = threading.RLock()  # two that redirect at once would restore each other's file


class OrtGraphs:
    """The graphs of one bundle on one stream; large weights are bound from one copy."""

    def __init__(
        self, device: Device, folder: Path, manifest: Mapping[str, Any], stream: int,
        say: Say | None = None,
    ) -> None:  # fmt: skip
        self.device, self.folder, self.manifest, self.stream = device, folder, manifest, stream
        self.say = say
        self._sessions: dict[str, Any] = {}
        self._weights: tuple[Memory, dict[tuple[int, int], int]] | None = None

    def executor(self, query: str) -> OrtExecutor:
        """Return a query's graph with a binding of its own. Errors: B221, B223, X203, X305."""
        spec = self.manifest["queries"][query]
        if query not in self._sessions:
            self._sessions[query] = self._open(inside(self.folder, str(spec["graph"])))
        return OrtExecutor(self, self._sessions[query], spec, query)

    def _open(self, path: Path) -> Any:
        ort = import_ort()
        check_provider("cuda")
        options = ort.SessionOptions()
        options.log_severity_level = WARNING
        # Where a node has no CUDA kernel the session is refused, and not run on the host in part.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        settings = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.stream),
            "use_tf32": "0",  # fp32 is fp32
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        _libraries(ort)

        def made() -> Any:
            return ort.InferenceSession(str(path), options, providers=[(PROVIDER, settings)])

        try:
            session = watched(made, str(path))
        except PccError:
            raise
        except Exception as e:  # onnxruntime raises its own types, none of them exported
            raise self._refused(e, path) from None
        if session.get_providers()[0] != PROVIDER:
            hint = "check the GPU driver and the CUDA and cuDNN libraries with `pcc doctor`"
            got = session.get_providers()[0]
            raise PccError("X203", f"asked for {PROVIDER}, got {got}", hint=hint)
        session.disable_fallback()
        return session

    def _refused(self, e: Exception, path: Path) -> PccError:
        if lacked_memory(e):
            return self.device.too_little(path.stat().st_size)
        what = f"onnxruntime refuses the graph on the GPU: {first_line(e)}"
        if "assigned to the default CPU EP" in str(e):
            what = "some nodes of the graph have no CUDA kernel in this onnxruntime"
        return PccError("B221", what, at=str(path), hint="compile with --target onnx-cuda")

    def weights(self, listed: list[Mapping[str, Any]]) -> dict[str, int]:
        """Return the addresses of a graph's weights by name; all graphs share them."""
        if not listed:
            return {}
        if self._weights is None:
            self._weights = self._upload()
        where = self._weights[1]
        return {name: where[place] for name, place in pieces(self.folder, listed).items()}

    def _upload(self) -> tuple[Memory, dict[tuple[int, int], int]]:
        """Place every weight of every graph on the device, each place of the file once."""
        every = [w for s in self.manifest["queries"].values() for w in s.get("weights", ())]
        places = [p for w in every for p in pieces(self.folder, [w]).values()]
        offsets: dict[tuple[int, int], int] = {}
        total = 0
        for place in sorted(set(places)):
            offsets[place] = total
            total += -(-max(place[1], 1) // ALIGN) * ALIGN
        free, _ = self.device.memory()
        if total > free:
            raise self.device.too_little(total)
        memory = Memory(self.device, total)
        where = {place: memory.address + at for place, at in offsets.items()}
        parts = [(offset, size, where[offset, size]) for offset, size in offsets]
        upload(self.device, inside(self.folder, FILE), parts, self.stream, self.say)
        return memory, where


class OrtExecutor:
    """One graph with its binding (`pcc.runtime.device.executor.Executor`)."""

    def __init__(
        self, graphs: OrtGraphs, session: Any, spec: Mapping[str, Any], query: str
    ) -> None:
        self.graphs, self.session, self.query = graphs, session, query
        self.binding = session.io_binding()
        self.inputs = {i["name"]: i for i in spec["inputs"]}
        self.outputs = {o["onnx"]: o for o in spec["outputs"]}
        self.batch = int(spec["batch"])
        self.options = import_ort().RunOptions()
        # A wait at the end would stall the host, and cannot be recorded.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.options.log_severity_level = WARNING
        self.fork, self.join = graphs.device.event(), graphs.device.event()
        self.ran = False
        listed = list(spec.get("weights", ()))
        where = graphs.weights(listed)
        for w in listed:
            self._input(w["name"], w["dtype"], list(w["shape"]), where[w["name"]])

    def _input(self, name: str, dtype: str, shape: list[int], address: int) -> None:
        at = self.graphs.device.ordinal
        self.binding.bind_input(name, "cuda", at, ELEMENT[dtype], shape, address)

    def bind(self, name: str, address: int) -> None:
        """Say where an array lies on the device."""
        at = self.graphs.device.ordinal
        if (io := self.inputs.get(name)) is not None:
            self._input(name, io["dtype"], self._shape(io), address)
        elif (io := self.outputs.get(name)) is not None:
            kind = ELEMENT[io["dtype"]]
            self.binding.bind_output(name, "cuda", at, kind, self._shape(io), address)
        else:
            raise PccError("R102", f"'{self.query}' has no array {name[:60]!r}")
        self.ran = False

    def _shape(self, io: Mapping[str, Any]) -> list[int]:
        if all(isinstance(d, int) for d in io["shape"][1:]):
            return fixed(io, self.batch)
        shapes = {s["name"]: s["shape"] for s in self.graphs.manifest["generation"]["states"]}
        return [self.batch, *shapes[io["name"].split(".", 1)[1]]]

    def enqueue(self, stream: int) -> None:
        """Enqueue the graph. It runs on the engine's stream; another one is forked and joined.

        Errors: B222, B223, X203, X305.
        """
        device, own = self.graphs.device, self.graphs.stream
        if stream != own:
            device.record(self.fork, stream)
            device.follow(own, self.fork)
        self._run()
        if stream != own:
            device.record(self.join, own)
            device.follow(stream, self.join)

    def _run(self) -> None:
        def work() -> None:
            self.session.run_with_iobinding(self.binding, self.options)

        try:
            if self.ran:
                work()
            else:
                watched(work, self.query)
        except PccError:
            raise
        except Exception as e:  # onnxruntime raises its own types, none of them exported
            if lacked_memory(e):
                what = f"onnxruntime could not have more for '{self.query}'"
                raise self.graphs.device.too_little(0, what) from None
            what = f"onnxruntime cannot run '{self.query}': {first_line(e)}"
            raise PccError("B222", what) from None
        self.ran, self.options.log_severity_level = True, ERROR


def lacked_memory(e: Exception) -> bool:
    """Return whether ONNX Runtime ran out of memory; its arena and CUDA say so each in its way."""
    said = str(e).lower()
    return "out of memory" in said or "failed to allocate" in said


def watched(work: Callable[[], Any], at: str) -> Any:
    """Return what `work` returns; what ONNX Runtime warns of meanwhile may be an error (B223)."""
    out, failed = None, None
    with _said() as said:
        try:
            out = work()
        except Exception as e:  # judged below: the reason may be in what was said before it
            failed = e
    if any(f"Failed to create {PROVIDER}" in x for x in said):
        what = "onnxruntime finds no CUDA or cuDNN libraries of its version"
        hint = "pip install 'onnxruntime-gpu[cuda,cudnn]', or put them on LD_LIBRARY_PATH"
        raise PccError("X203", what, at=at, hint=hint)
    if failed is not None:
        raise failed
    for part, cost in FAULTS.items():
        if line := next((x for x in said if part in x), ""):
            what = f"onnxruntime warns: {cost} ({' '.join(line.split())[-160:]})"
            raise PccError("B223", what, at=at, hint="report this graph, or use --target cuda")
    return out


@contextmanager
def _said() -> Iterator[list[str]]:
    """Collect what is written to the process's standard error: ONNX Runtime's log goes there.

    What is not of the log, of other threads too, is passed on at the end.
    """
    lines: list[str] = []
    try:
        sys.stderr.flush()
    except (AttributeError, ValueError):  # a window program has none
        pass
    with _HEARING, tempfile.TemporaryFile() as file:
        try:
            kept = os.dup(2)
        except OSError:  # standard error is closed: nothing can be heard
            yield lines
            return
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += _sorted(file)


def _sorted(file: IO[bytes]) -> list[str]:
    """Return what was written, at most `HEARD` lines; what is no entry of the log goes on.

    An entry may have more lines than one, so that the others are returned too.
    """
    lines: list[str] = []
    for line in iter(lambda: file.readline(1 << 16), b""):
        if not LOG.match(line):
            _write(line)
        if len(lines) < HEARD:
            lines.append(line.decode("utf-8", "replace").rstrip())
    return lines


def _write(data: bytes) -> None:
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:  # nobody reads it any more
        pass


def _libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from Python packages where they are there; the system's otherwise."""
    if hasattr(ort, "preload_dlls"):
        from contextlib import redirect_stdout

        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            ort.preload_dlls(directory="")
