"""How graphs are timed, against a device that only notes what it is told and keeps bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.runtime.measure_gpu import WARM, Bench, Timer, copy_bandwidth, parts_of, plausible


class Notes:
    """A device in this process: memory is real, a launch takes a millisecond on its own clock."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.clock, self.launches, self.marks = 0.0, 0, []
        self.graphs: list[Callable[[], None]] = []
        self.recording = False

    def stream(self) -> int:
        return 1

    def event(self, *, times: bool = False) -> int:
        assert times
        self.marks.append(float("nan"))
        return len(self.marks) - 1

    def record(self, event: int, stream: int) -> None:
        self.marks[event] = self.clock

    def elapsed(self, first: int, last: int) -> float:
        return self.marks[last] - self.marks[first]

    def wait(self, stream: int) -> None:
        pass

    def allocate(self, size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def release(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, to: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(to, source, size)

    def zero(self, to: int, size: int, stream: int) -> None:
        ctypes.memset(to, 0, size)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(to, source, size)
        self.clock += 0.5

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        self.graphs.append(work)
        self.recording = True
        work()
        self.recording = False
        return len(self.graphs) - 1

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        self.clock += 1.0


class Graph:
    """An executor that notes bindings; two of its launches are of one part."""

    def __init__(self) -> None:
        self.bound: dict[str, int] = {}
        self.enqueued = 0
        self.some: list[tuple[int, ...]] = []
        self.document = {"launches": [
            {"op": "x", "layer": "l.0.a", "bytes": {"weights": 500_000_000}}, {"op": "y"},
            {"op": "x", "layer": "l.1.a", "bytes": {"weights": 500_000_000}},
        ]}  # fmt: skip

    def bind(self, name: str, address: int) -> None:
        self.bound[name] = address

    def enqueue(self, stream: int) -> None:
        self.enqueued += 1

    def enqueue_some(self, launches: Any, stream: int) -> None:
        self.some.append(tuple(launches))


def io(name: str, dtype: str, *shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def given(name: str, *rest: Any) -> dict[str, Any]:
    return {**io(name, *rest), "onnx": name}


SPEC = {
    "inputs": [io("window", "i64", "B", 4), io("length", "i64", "B"), io("u", "f32", "B", 6),
               io("active", "bool", "B"), io("past.key.0", "f16", "B", 2, "rows", 3),
               io("past.recent", "i64", "B", 2)],
    "outputs": [given("emitted", "i64", "B", 4), given("present.key.0", "f16", "B", 2, "rows", 3),
                given("present.recent", "i64", "B", 2),
                {**io("window", "i64", "B", 4), "onnx": "window_out"}],
}  # fmt: skip
STATES = [{"name": "key.0", "rows_axis": 1, "shape": [2, 8, 3]},
          {"name": "recent", "rows_axis": None, "shape": [2]}]  # fmt: skip


def bench(batch: int = 2) -> tuple[Notes, Graph, Bench]:
    device: Any = Notes()
    graph: Any = Graph()
    fill = plausible(SPEC, 700, 50, batch)
    return device, graph, Bench(device, graph, SPEC, STATES, batch, fill)


def test_every_name_is_bound_and_caches_are_one_buffer() -> None:
    device, graph, made = bench()
    assert set(graph.bound) == {x.get("onnx", x["name"]) for k in SPEC for x in SPEC[k]}
    assert graph.bound["window"] != graph.bound["window_out"]
    assert graph.bound["past.key.0"] == graph.bound["present.key.0"]
    assert graph.bound["past.recent"] != graph.bound["present.recent"]
    assert len(device.blocks) == 9
    assert len(device.blocks[graph.bound["past.key.0"]]) == 2 * 2 * 8 * 3 * 2
    made.free()
    assert not device.blocks


def test_inputs_are_those_of_a_text_at_the_context() -> None:
    device, graph, _ = bench()
    length = np.frombuffer(device.blocks[graph.bound["length"]], np.int64)[:2]
    assert length.tolist() == [700, 700]
    window = np.frombuffer(device.blocks[graph.bound["window"]], np.int64)
    assert ((window >= 0) & (window < 50)).all()
    assert len(set(window.tolist())) > 1
    u = np.frombuffer(device.blocks[graph.bound["u"]], np.float32)
    assert ((u >= 0) & (u < 1)).all()


def test_each_repeat_is_one_launch_between_two_events() -> None:
    device, graph, made = bench()
    assert graph.enqueued == 3  # twice as it is, once to be recorded
    assert made.times(20) == {"p10": 1.0, "p50": 1.0, "p90": 1.0}
    assert device.launches == 20 + WARM
    assert made.wall(10)["p50"] >= 0
    assert device.launches == 30 + 2 * WARM


def test_parts_are_launched_alone() -> None:
    _, graph, made = bench()
    x, y = parts_of(made, 5, bandwidth=2.0)
    assert (x["part"], x["layer"], x["launches"]) == ("x", "l.*.a", 2)
    assert x["of_copy"] == pytest.approx(0.5)  # 1 GB at 2 TB/s take half a millisecond
    assert (y["launches"], y["of_copy"]) == (1, None)
    assert set(graph.some) == {(0, 2), (1,)}


def test_a_copy_counts_what_is_read_and_written() -> None:
    device: Any = Notes()
    size = 1 << 20
    assert copy_bandwidth(device, size, 5) == pytest.approx(2 * size / 0.5e-3 / 1e12)
    assert not device.blocks
    assert Timer(device).times(lambda: None, 3) == [0.0] * 3


def test_open_sizes_are_refused() -> None:
    device: Any = Notes()
    graph: Any = Graph()
    spec = {"inputs": [io("x", "f32", "B", "N")], "outputs": []}
    with pytest.raises(PccError, match="R120"):
        Bench(device, graph, spec, STATES, 1, {})
