"""Graphs timed on a GPU by events, in memory of their own, beside the bandwidth of a copy.

A graph is recorded as a CUDA graph once and launched again and again on the same inputs, at one
context: lengths do not grow, so that every repeat does the same work. Weights of the shapes that
matter exceed the L2 many times, so every launch finds it cold.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.bound import quantiles
from pcc.runtime.device.driver import Device
from pcc.runtime.device.executor import Executor, arrays
from pcc.runtime.device.handles import Memory
from pcc.runtime.dtypes import ITEM, NUMPY
from pcc.runtime.parts import parts
from pcc.runtime.rounds import Rounds
from pcc.runtime.sampling import Sampling

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

Values = np.ndarray[Any, Any]
Times = dict[str, float]
COPY = 2 << 30  # bytes of the copied buffer: forty times the L2
WARM = 3  # launches before times count


class Timer:
    """Times work on one stream of a device."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.stream()

    def times(self, launch: Callable[[], None], repeats: int) -> list[float]:
        """Return the ms of each of `repeats` launches, by events between them.

        All are enqueued before the host waits, so that it is never what is timed.
        """
        for _ in range(WARM):
            launch()
        marks = [self.device.event(times=True) for _ in range(repeats + 1)]
        self.device.record(marks[0], self.stream)
        for mark in marks[1:]:
            launch()
            self.device.record(mark, self.stream)
        self.device.wait(self.stream)
        pairs = itertools.pairwise(marks)
        return [self.device.elapsed(a, b) for a, b in pairs]

    def walls(self, launch: Callable[[], None], repeats: int) -> list[float]:
        """Return the ms of launching and waiting, one after the other, on the host's clock."""
        out = []
        for _ in range(repeats + WARM):
            began = time.perf_counter()
            launch()
            self.device.wait(self.stream)
            out.append((time.perf_counter() - began) * 1e3)
        return out[WARM:]

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the launch of a CUDA graph of some work, which runs plainly before.

        Runtimes allocate in their first runs, which cannot be recorded.
        """
        for _ in range(2):
            work()
        self.device.wait(self.stream)
        graph = self.device.capture(self.stream, work)
        return lambda: self.device.launch(graph, self.stream)


def copy_bandwidth(device: Device, size: int = COPY, repeats: int = 10) -> float:
    """Return bytes read and written per second by a copy on the device, in TB/s."""
    timer, a, b = Timer(device), Memory(device, size), Memory(device, size)
    try:
        # Not zeros: what a memory system does with them is its own affair.
        noise = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
        for at in range(0, size, noise.nbytes):
            part = min(noise.nbytes, size - at)
            device.upload(a.address + at, noise.ctypes.data, part, timer.stream)
        device.wait(timer.stream)
        times = timer.times(lambda: device.copy(b.address, a.address, size, timer.stream), repeats)
        return 2 * size / quantiles(times)["p50"] * 1e3 / 1e12
    finally:
        a.free()
        b.free()


class Bench:
    """One graph of a bundle on memory of its own, filled with plausible inputs."""

    def __init__(
        self, device: Device, executor: Executor, spec: Mapping[str, Any],
        states: Sequence[Mapping[str, Any]], batch: int, fill: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.timer, self.executor = Timer(device), executor
        self.memory: list[Memory] = []
        whole = {s["name"]: s["rows_axis"] is not None for s in states}
        shapes = {s["name"]: list(s["shape"]) for s in states}
        held: dict[str, int] = {}
        for at, io in arrays(spec):
            kind, _, state = at.partition(".")
            name = at
            if kind in ("past", "present") and whole.get(state):
                name = f"past.{state}"  # one buffer, written in place
            if name not in held:
                inner = shapes[state] if kind in ("past", "present") else io["shape"][1:]
                held[name] = self._place({**io, "shape": ["B", *inner]}, batch, fill)
            executor.bind(at, held[name])
        device.wait(self.timer.stream)
        self.launch = self.timer.recorded(lambda: executor.enqueue(self.timer.stream))

    def _place(self, io: Mapping[str, Any], batch: int, fill: Mapping[str, Any]) -> int:
        """Allocate an array, and write what it starts with: zeros if nothing is said."""
        device, stream = self.timer.device, self.timer.stream
        sizes = [batch if d in ("B", "Bc") else d for d in io["shape"]]
        if not all(isinstance(d, int) for d in sizes):
            what = f"'{io['name']}' has no fixed size: {io['shape']}"
            raise PccError("R120", what, hint="compile for a target with static shapes")
        size = int(np.prod(sizes, dtype=np.int64)) * ITEM[io["dtype"]]
        made = Memory(device, size)
        self.memory.append(made)
        value = fill.get(io["name"])
        if value is None:
            device.zero(made.address, size, stream)
            return made.address
        kind = NUMPY[io["dtype"]]
        array: Values = np.ascontiguousarray(np.broadcast_to(np.asarray(value), sizes), kind)
        device.upload(made.address, array.ctypes.data, size, stream)
        device.wait(stream)  # the array is gone after this
        return made.address

    def times(self, repeats: int) -> dict[str, float]:
        """Return p10, p50, p90 in ms, by events."""
        return quantiles(self.timer.times(self.launch, repeats))

    def wall(self, repeats: int) -> dict[str, float]:
        """Return p10, p50, p90 in ms of launching and waiting, on the host's clock."""
        return quantiles(self.timer.walls(self.launch, repeats))

    def free(self) -> None:
        """Give the memory back."""
        for m in self.memory:
            m.free()


def plausible(spec: Mapping[str, Any], context: int, vocab: int, batch: int) -> dict[str, Any]:
    """Return inputs of a graph in the middle of a text, by name."""
    rng = np.random.default_rng(11)
    fixed = {"length": context, "active": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
             "draft_temperature": 1.0, "draft_top_p": 1.0}  # fmt: skip
    out: dict[str, Any] = {}
    for i in spec["inputs"]:
        name, shape = i["name"], [batch if d in ("B", "Bc") else d for d in i["shape"]]
        if name in fixed:
            out[name] = fixed[name]
        elif name in ("window", "input_ids", "carry"):
            out[name] = rng.integers(0, vocab, shape)
        elif name == "draft_q":
            out[name] = 1.0 / shape[-1]
        elif name == "valid":
            out[name] = shape_of(spec, "input_ids")[-1]
        elif name == "u":
            out[name] = rng.integers(0, 1 << 24, shape) / (1 << 24)
        elif name == "context":
            out[name] = rng.normal(size=shape)
    return out


def shape_of(spec: Mapping[str, Any], name: str) -> list[Any]:
    """Return the shape of an input."""
    return next(list(i["shape"]) for i in spec["inputs"] if i["name"] == name)


def bench_of(engine: Engine, query: str, context: int, batch: int) -> Bench:
    """Return a graph of a loaded bundle, ready to be timed at a context."""
    generation = engine.generation()
    spec = engine.spec_of(query)
    most = int(generation["max_seq"])
    if not 0 < context <= most:
        what = f"a context of {context} tokens does not fit an engine for {most}"
        raise PccError("R121", what, hint="compile with a larger --max-seq")
    device, executor = engine.executor(query)
    fill = plausible(spec, context, int(generation["vocab"]), batch)
    return Bench(device, executor, spec, generation["states"], batch, fill)


def graph_times(
    engine: Engine, query: str, context: int, batch: int, repeats: int, bandwidth: float
) -> dict[str, dict[str, Any]]:
    """Return for a round's graph and those beside it their times: `events`, `wall`, `parts`."""
    out: dict[str, dict[str, Any]] = {}
    for name in beside(engine.queries, query):
        b = bench_of(engine, name, context, batch)
        try:
            out[name] = {"events": b.times(repeats), "wall": b.wall(repeats)}
            if name == query:
                out[name]["parts"] = parts_of(b, max(5, repeats // 4), bandwidth, context)
        finally:
            b.free()  # before a session has states of its own
    at = session_context(engine, context, repeats)
    out[query]["session"] = session_ms(engine, query, at, batch, repeats)
    out[query]["session_events"] = out[query]["events"]
    if at != context:  # no room for the session's rounds: its graph read other keys
        b = bench_of(engine, query, at, batch)
        out[query]["session_events"] = b.times(repeats)
        b.free()
    return out


def beside(queries: Mapping[str, Mapping[str, Any]], query: str) -> list[str]:
    """Return a round's graph, and of those beside it what the bundle can run as it runs the round.

    Of TensorRT some queries may have stayed graphs without an engine.
    """
    kind = Path(queries[query]["graph"]).suffix
    named = [name for name in (query, "verify", "decode", "draft") if name in queries]
    return [name for name in named if Path(queries[name]["graph"]).suffix == kind]


def session_context(engine: Engine, context: int, repeats: int) -> int:
    """Return the tokens before the first of a session's timed rounds: `context`, if they fit."""
    generation = engine.generation()
    room = int(generation["max_seq"]) - (repeats + WARM + 2) * int(generation["n"])
    return max(1, min(context, room))


def session_ms(engine: Engine, query: str, context: int, batch: int, repeats: int) -> Times:
    """Return p10, p50, p90 of a round as a session runs it, on the host's clock.

    Prompts of random ids are read first. Rounds are launched ahead, results copied, uniforms drawn:
    what is beyond the graph's own time is the host's.
    """
    generation = engine.generation()
    sampling = Sampling(seed=5, greedy=query == "step_greedy")
    rounds = Rounds(engine, sampling, range(batch))
    rng = np.random.default_rng(12)
    rounds.prefill(rng.integers(0, int(generation["vocab"]), (batch, context)).tolist())
    times = []
    for _ in range(repeats + WARM):
        began = time.perf_counter()
        rounds.step()
        times.append((time.perf_counter() - began) * 1e3)
    return quantiles(times[WARM:])


def parts_of(
    bench: Bench, repeats: int, bandwidth: float = 0.0, context: int = 0
) -> list[dict[str, Any]]:
    """Return the time of each part of a graph, where its executor has launches of its own.

    A part's launches are recorded alone, one after the other, as often as the graph has them: the
    same memory is moved, on whatever numbers lie there. Parts do not add up to the whole, which
    overlaps the end of a launch with the beginning of the next.
    """
    executor: Any = bench.executor
    if not hasattr(executor, "enqueue_some"):
        return []
    out = []
    for part in parts(executor.document["launches"], context):
        launch = bench.timer.recorded(partial(_some, executor, part.launches, bench.timer.stream))
        ms = quantiles(bench.timer.times(launch, repeats))["p50"]
        least = part.bytes / bandwidth / 1e9 if bandwidth else 0.0
        out.append({
            "part": part.name, "layer": part.layer, "launches": len(part.launches), "ms": ms,
            "bytes": part.bytes, "of_copy": least / ms if least and ms else None,
        })  # fmt: skip
    return out


def _some(executor: Any, launches: Sequence[int], stream: int) -> None:
    executor.enqueue_some(launches, stream)
