"""What opens engines, against a stand-in for TensorRT: refusals, addresses, copies of caches."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pcc.errors import PccError
from pcc.runtime.device.tensorrt import Opener, TensorRtExecutor
from pcc.variants import variant_of

SHAPES = {"length": (1, 2), "past.key.0": (1, 2, 8, 4), "y": (1, 3), "present.key.0": (1, 2, 8, 4)}
KINDS = {"length": "INT32"}  # a pair of words


class Engine:
    """An engine of one cache; `aliased` writes it in place."""

    def __init__(self, aliased: bool, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.names = shapes, list(shapes)
        self.num_io_tensors, self.device_memory_size = len(shapes), 100
        self.addresses: dict[str, int] = {}
        self.ran: list[int] = []
        self.fails = False
        if aliased:
            self.get_aliased_input_tensor = lambda name: "past." + name[8:]

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=KINDS.get(name, "FLOAT"))

    def create_execution_context(self) -> Any:
        return SimpleNamespace(
            get_tensor_shape=self.get_tensor_shape,
            set_tensor_address=lambda n, a: self.addresses.__setitem__(n, a) is None,
            execute_async_v3=lambda stream: self.ran.append(stream) is None and not self.fails,
        )


class Device:
    """Memory by counting; remembers copies."""

    arch, capability, name = "sm_90", (9, 0), "a stand-in"

    def __init__(self) -> None:
        self.next, self.copies = 1000, list[tuple[int, int, int, int]]()

    def enter(self) -> None: ...

    def allocate(self, size: int) -> int:
        self.next += 1000
        return self.next

    def release(self, address: int) -> None: ...

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self.copies.append((to, source, size, stream))

    def too_little(self, size: int) -> PccError:
        return PccError("X305", f"{size} bytes")


def spec() -> dict[str, Any]:
    def io(name: str, dtype: str, shape: list[Any]) -> dict[str, Any]:
        return {"name": name, "onnx": name, "dtype": dtype, "shape": shape}

    return {
        "graph": "engines/t/step.plan", "batch": 1,
        "inputs": [io("length", "i64", ["B"]), io("past.key.0", "f32", ["B", 2, 8, 4])],
        "outputs": [io("y", "f32", ["B", 3]), io("present.key.0", "f32", ["B", 2, 8, 4])],
    }  # fmt: skip


def manifest(**changes: Any) -> dict[str, Any]:
    variant = {
        "provider": "tensorrt", "format": "tensorrt", "gpu": "sm_90", "runtime": "8.6",
        "module": "tensorrt", "version": "8.6.1", "options": {}, **changes,
    }  # fmt: skip
    return {"variants": [variant], "queries": {"step": spec()}, "generation": None}


@pytest.fixture
def trt(monkeypatch: Any) -> Any:
    """Stand in for the module `tensorrt`, which a test may change."""
    module = ModuleType("tensorrt")
    state: Any = module

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, WARNING=2)

    state.__version__, state.ILogger = "8.6.1", ILogger
    state.engine = Engine(False, dict(SHAPES))
    state.says = []  # errors of the next attempt to open

    def runtime(logger: Any) -> Any:
        def deserialize(data: Any) -> Any:
            for text in state.says:
                logger.log(1, text)
            return state.engine if bytes(data[:4]) == b"plan" else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    state.Runtime = runtime
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def bundle(folder: Path, data: bytes = b"plan...") -> Path:
    (folder / "engines/t").mkdir(parents=True)
    (folder / "engines/t/step.plan").write_bytes(data)
    return folder


def opened(trt: Any, folder: Path, **changes: Any) -> tuple[TensorRtExecutor, Device]:
    device: Any = Device()
    found = Opener(device, bundle(folder), manifest(**changes)).executor("step")
    return found, device


def bound(run: TensorRtExecutor) -> None:
    for i, name in enumerate(("length", "past.key.0", "y")):
        run.bind(name, 16 * (i + 1))
    run.bind("present.key.0", 32)


def test_caches_that_are_returned_whole_are_copied_where_the_past_lies(
    trt: Any, tmp_path: Path
) -> None:
    run, device = opened(trt, tmp_path)
    bound(run)
    run.enqueue(7)
    own = run.own["present.key.0"]
    assert own.bytes == 4 * 2 * 8 * 4
    assert trt.engine.addresses == {
        "length": 16, "past.key.0": 32, "y": 48, "present.key.0": own.address,
    }  # fmt: skip
    assert device.copies == [(32, own.address, own.bytes, 7)]
    run.bind("past.key.0", 96)  # the buffers moved
    run.bind("present.key.0", 96)
    run.enqueue(8)
    assert trt.engine.addresses["past.key.0"] == 96
    assert device.copies[-1] == (96, own.address, own.bytes, 8)
    assert trt.engine.ran == [7, 8]


def test_a_cache_of_two_buffers_needs_no_copy(trt: Any, tmp_path: Path) -> None:
    run, device = opened(trt, tmp_path)
    bound(run)
    run.bind("present.key.0", 64)
    run.enqueue(7)
    assert trt.engine.addresses["present.key.0"] == 64
    assert not device.copies


def test_caches_written_in_place_have_one_address(trt: Any, tmp_path: Path) -> None:
    trt.engine = Engine(True, dict(SHAPES))
    run, device = opened(trt, tmp_path)
    bound(run)
    run.enqueue(7)
    assert trt.engine.addresses["present.key.0"] == 32
    assert not device.copies
    run.bind("present.key.0", 64)
    with pytest.raises(PccError, match="in place"):
        run.enqueue(7)


def test_nothing_runs_before_everything_has_an_address(trt: Any, tmp_path: Path) -> None:
    run, _ = opened(trt, tmp_path)
    run.bind("length", 16)
    with pytest.raises(PccError, match=r"no address for 'past\.key\.0'"):
        run.enqueue(7)
    with pytest.raises(PccError, match="no array 'other'"):
        run.bind("other", 16)
    assert not trt.engine.ran


def test_a_run_that_fails_is_one_line(trt: Any, tmp_path: Path) -> None:
    run, _ = opened(trt, tmp_path)
    bound(run)
    trt.engine.fails = True
    with pytest.raises(PccError, match="cannot run 'step'") as found:
        run.enqueue(7)
    assert found.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": "8.5.3"}, "X331"),
        ({"version": "10.3.0"}, "X331"),
        ({"version": "8.6.0"}, ""),
        ({"version": "8.4.0", "options": {"version_compatible": True}}, ""),
        ({"version": "8.7.0", "options": {"version_compatible": True}}, "X331"),
        ({"version": "nonsense"}, "X331"),
        ({"gpu": "sm_89"}, "X333"),
        ({"gpu": "sm_80", "options": {"hardware": "ampere_plus"}}, ""),
        ({"gpu": "sm_80", "options": {"hardware": "same"}}, "X333"),
        ({"module": "os"}, "B215"),
        ({"module": 5}, "B215"),
        ({"options": []}, "B215"),
        ({"format": "onnx"}, "B215"),
    ],
)
def test_engines_of_other_machines_are_refused(
    trt: Any, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    device: Any = Device()
    if not code:
        Opener(device, bundle(tmp_path), manifest(**changes)).executor("step")
        return
    with pytest.raises(PccError) as found:
        Opener(device, bundle(tmp_path), manifest(**changes)).executor("step")
    assert found.value.code == code
    assert found.value.exit_code == (3 if code[0] == "X" else 2)


@pytest.mark.parametrize("data", [b"", b"torn"])
def test_damaged_plans_are_refused(trt: Any, tmp_path: Path, data: bytes) -> None:
    device: Any = Device()
    opener = Opener(device, bundle(tmp_path, data), manifest())
    with pytest.raises(PccError) as found:
        opener.executor("step")
    assert found.value.code == "X334"


@pytest.mark.parametrize("name", ["length", "y", "present.key.0"])
def test_an_engine_of_other_shapes_is_refused(trt: Any, tmp_path: Path, name: str) -> None:
    trt.engine = Engine(False, {**SHAPES, name: (1, 1, 9)})
    with pytest.raises(PccError, match=f"'{name}' of 'step' takes"):
        opened(trt, tmp_path)
    trt.engine = Engine(False, {k: v for k, v in SHAPES.items() if k != name})
    with pytest.raises(PccError, match="other arrays"):
        opened(trt, tmp_path / "again")


@pytest.mark.parametrize(
    "says",
    ["[defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)",
     "Requested amount of GPU memory (68719476736 bytes) could not be allocated. There may not be "
     "enough free memory for allocation to succeed.",
     "[globWriter.cpp::addMemory] Error Code 2: OutOfMemory (no further information)"],
)  # fmt: skip
def test_a_lack_of_memory_while_opening_is_said_as_such(
    trt: Any, tmp_path: Path, says: str
) -> None:
    device: Any = Device()
    trt.says = ["a first error, of what follows", says]
    opener = Opener(device, bundle(tmp_path, b"torn"), manifest())
    with pytest.raises(PccError) as found:
        opener.executor("step")
    assert found.value.code == "X305"
    trt.says = ["the plan is damaged"]  # what was said before is forgotten
    with pytest.raises(PccError, match="refuses the engine: the plan is damaged") as found:
        opener.executor("step")
    assert found.value.code == "X334"


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [("y", "INT32", (1, 3)), ("past.key.0", "INT32", (1, 2, 8, 4)), ("length", "FLOAT", (1, 2)),
     ("y", "HALF", (1, 6))],
)  # fmt: skip
def test_an_engine_of_other_types_is_refused_though_its_bytes_are_as_many(
    trt: Any, tmp_path: Path, monkeypatch: Any, name: str, kind: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setitem(KINDS, name, kind)
    trt.engine = Engine(False, {**SHAPES, name: shape})
    with pytest.raises(PccError, match=f"'{name}' of 'step' is {kind}, not ") as found:
        opened(trt, tmp_path)
    assert found.value.code == "X334"


def test_a_missing_library_is_exit_3(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    device: Any = Device()
    with pytest.raises(PccError) as found:
        Opener(device, bundle(tmp_path), manifest())
    assert found.value.code == "X330"


def test_a_graph_without_an_engine_is_named(trt: Any, tmp_path: Path) -> None:
    device: Any = Device()
    made = manifest()
    made["queries"]["step"]["graph"] = "graphs/step.onnx"
    with pytest.raises(PccError, match="'step' has no engine"):
        Opener(device, bundle(tmp_path), made).executor("step")


def test_a_bundle_without_engines_has_no_variant() -> None:
    with pytest.raises(PccError, match="no TensorRT engines"):
        variant_of({"variants": []}, "m.pcc")
