"""One graph on the device behind the arrays of a `Call`; rounds that are launched ahead.

A call's small arrays lie side by side: one copy to the device, the graph, one move back, recorded
as one CUDA graph. Host arrays are page-locked: copies do not wait, and kernels write them.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pcc.errors import PccError
from pcc.knobs import EVA_SPAN
from pcc.runtime.device.arena import Arena, Layout, Values
from pcc.runtime.device.driver import Device
from pcc.runtime.device.executor import Executor
from pcc.runtime.device.moves import Move, Moves
from pcc.runtime.device.philox import Draws
from pcc.runtime.device.states import DeviceStates

if TYPE_CHECKING:
    from pcc.runtime.philox import Uniforms

# What a round hands to the next, and where: in this order at the beginning of both arenas, so that
# one move on the device does it.
CHAIN = {"next_window": "window", "next_draft_q": "draft_q", "next_length": "length"}
WARM = 2  # plain runs before a graph is recorded: runtimes allocate in them


class Shown:
    """An array of a call as the host sees it; outputs lie in the mirror of the last run."""

    def __init__(self, call: DeviceCall, name: str, mirrors: list[dict[str, Values]]) -> None:
        self.arrays = [m[name] for m in mirrors]
        self.call = weakref.proxy(call)

    @property
    def array(self) -> Values:
        """The array; outputs stay as they are until the call after the next."""
        return self.arrays[self.call.mirror if len(self.arrays) > 1 else 0]


@dataclass
class Turn:
    """What the calls of one session share: whose round is on its way, unseen by the host."""

    device: Device
    stream: int
    ahead: weakref.ReferenceType[StepCall] | None = field(default=None)

    def alone(self, call: DeviceCall | None = None) -> None:
        """Drop what was launched ahead, unless it is this call's own."""
        other = self.ahead() if self.ahead is not None else None
        if other is not None and other is not call:
            other.drop()


class DeviceCall:
    """A graph bound to its buffers: fill `self[name]`, `run()`, read `self[name]`."""

    mirrors = 1

    def __init__(self, turn: Turn, executor: Executor, spec: Mapping[str, Any], batch: int) -> None:
        self.turn, self.device, self.executor = turn, turn.device, executor
        listed = [i for i in spec["inputs"] if not i["name"].startswith("past.")]
        made = [o for o in spec["outputs"] if not o["name"].startswith("present.")]
        self.chained = self._chained(listed, made)
        listed.sort(key=lambda i: _place(i["name"], self.chained.values()))
        made.sort(key=lambda o: _place(o["name"], self.chained))
        self.into = Arena(self.device, Layout(listed, batch), 1)
        self.out = Arena(self.device, Layout(made, batch), self.mirrors)
        self.mirror = 0
        self.inputs = {i["name"]: Shown(self, i["name"], self.into.views) for i in listed}
        self.outputs = {o["name"]: Shown(self, o["name"], self.out.views) for o in made}
        for i in listed:
            executor.bind(i["name"], self.into.address(i["name"]))
        for o in made:
            executor.bind(o["onnx"], self.out.address(o["name"]))
        self.presents = {o["name"] for o in spec["outputs"]} - set(self.outputs)
        self.states: DeviceStates | None = None
        self.graphs: dict[str, int] = {}
        self.done = [self.device.event() for _ in range(self.mirrors)]
        self.runs = 0
        self.plain = ""  # why nothing is recorded, if so

    def _chained(self, inputs: list[Any], outputs: list[Any]) -> dict[str, str]:
        """Return what this graph hands to its next call, if it is a round."""
        have = {i["name"] for i in inputs}
        given = {o["name"] for o in outputs}
        return {o: i for o, i in CHAIN.items() if o in given and i in have}

    def attach(self, states: DeviceStates) -> None:
        """Bind the state buffers, after every resize."""
        self.turn.alone()
        self.states = states
        for name, s in states.past.items():
            self.executor.bind(f"past.{name}", s.address)
        for name, s in states.present.items():
            if f"present.{name}" in self.presents:
                self.executor.bind(f"present.{name}", s.address)
        self._forget()

    def __getitem__(self, name: str) -> Values:
        shown = self.inputs.get(name) or self.outputs[name]
        return shown.array

    def run(self) -> None:
        """Run the graph over its buffers, and wait for its outputs."""
        self.device.enter()
        self.turn.alone(self)
        self._launch("fresh", self._fresh, 0)
        self._wait(0)

    def _fresh(self) -> None:
        self.into.upload(self.turn.stream)
        self.executor.enqueue(self.turn.stream)
        self.out.download(0, self.turn.stream)

    def _launch(self, name: str, work: Callable[[], None], mirror: int) -> None:
        """Enqueue some work, recorded once the graph has run plainly a few times."""
        if self.runs < WARM or self.plain:
            work()
        else:
            if name not in self.graphs and not self._record(name, work):
                work()
            else:
                self.device.launch(self.graphs[name], self.turn.stream)
        self.device.record(self.done[mirror], self.turn.stream)
        self.runs += 1

    def _record(self, name: str, work: Callable[[], None]) -> bool:
        """Record some work as a CUDA graph; where that fails, say so and go on without."""
        self.device.wait(self.turn.stream)
        try:
            self.graphs[name] = self.device.capture(self.turn.stream, work)
        except PccError as e:
            self.plain = e.what
            what = f"rounds run without a CUDA graph, and slower: {e.what}"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
            return False
        return True

    def _wait(self, mirror: int) -> None:
        self.device.wait_event(self.done[mirror])
        self.mirror = mirror

    def _forget(self) -> None:
        for g in self.graphs.values():
            self.device.forget(g)
        self.graphs.clear()
        self.runs = 0

    def __del__(self) -> None:
        if hasattr(self, "plain") and not sys.is_finalizing():
            self.device.wait(self.turn.stream)  # a round that nobody waited for writes into mirrors
            self._forget()


def _place(name: str, first: Any) -> int:
    order = list(first)
    return order.index(name) if name in order else len(order)


@dataclass(frozen=True)
class Flight:
    """A round that was launched ahead: into which mirror, and for which state of the host."""

    mirror: int
    active: bytes


class StepCall(DeviceCall):
    """The graph of a round, whose next round is launched before the host has seen this one.

    The round ahead takes window, q and length from this one's outputs, draws its uniforms on the
    device, and is used if that is what the host then asks for; else it is dropped. What it wrote
    beyond the length counts nowhere, so dropping costs its time only. Two mirrors: the host reads
    one while the device writes the other.
    """

    mirrors = 2

    def __init__(
        self, turn: Turn, executor: Executor, spec: Mapping[str, Any], batch: int,
        uniforms: Uniforms | None, *, ahead: bool,
    ) -> None:  # fmt: skip
        super().__init__(turn, executor, spec, batch)
        self.width = self["window"].shape[-1]
        self.flight: Flight | None = None
        self.first: Moves | None = None  # of a round ahead, once there are states
        self.draws: Draws | None = None
        self.may = ahead and self._joins()
        if self.may and "u" in self.inputs:
            if uniforms is None:
                self.may = False
            else:  # the length as the round before says it: the input is written at the same time
                places = self.out.address("next_length"), self.into.address("u")
                self.draws = Draws(self.device, uniforms, *places, turn.stream)

    def attach(self, states: DeviceStates) -> None:
        """Bind the state buffers, after every resize."""
        super().attach(states)
        if self.may:
            last = list(self.chained)[-1]
            size = self.out.layout.offsets[last] + self.out.views[0][last].nbytes
            handed = Move(self.into.memory.address, self.out.memory.address, size)
            self.first = Moves(self.device, [handed, *states.chain()], self.draws)

    def _joins(self) -> bool:
        """Whether the arrays that a round hands on lie alike in both arenas."""
        a, b = self.out.layout, self.into.layout
        if "length" not in self.chained.values() or "active" not in self.inputs:
            return False
        return all(
            (a.offsets[o], a.shapes[o], a.dtypes[o]) == (b.offsets[i], b.shapes[i], b.dtypes[i])
            for o, i in self.chained.items()
        )

    def run(self) -> None:
        """Run a round, or take the one that was launched ahead; launch the next one ahead."""
        self.device.enter()
        self.turn.alone(self)
        if self.flight is not None and self._wanted(self.flight):
            mirror, self.flight = self.flight.mirror, None
        else:
            self.drop()
            mirror = 0
            self._launch("fresh", self._fresh, 0)
        if self.states is not None:
            self.states.ahead = False
        if self._room():
            self._ahead(1 - mirror)
        if self.states is not None:
            self.states.accepted = False
        self._wait(mirror)

    def _wanted(self, flight: Flight) -> bool:
        """Whether the host asks for just what the round ahead was launched from."""
        if self.states is not None and not self.states.accepted:
            return False
        if flight.active != self["active"].tobytes():
            return False
        small = {o: i for o, i in self.chained.items() if i != "draft_q"}  # drawn with the window
        return all(
            bool(self.outputs[o].array.tobytes() == self[i].tobytes()) for o, i in small.items()
        )

    def _room(self) -> bool:
        """Whether the buffers hold the next round wherever this one ends."""
        if not self.may or self.plain or self.runs < WARM or self.states is None:
            return False
        if 2 * self.width > EVA_SPAN and any(s["ring"] for s in self.states.specs):
            return False  # were this round to fail, the next would have overwritten what it read
        most = int(self["length"].max()) + 2 * self.width
        return bool(most <= self.states.rows)

    def _ahead(self, mirror: int) -> None:
        assert self.states is not None
        self._launch(f"ahead{mirror}", lambda: self._next(mirror), mirror)
        self.states.ahead = True
        self.flight = Flight(mirror, self["active"].tobytes())
        self.turn.ahead = weakref.ref(self)

    def _next(self, mirror: int) -> None:
        """The work of a round that goes on from the outputs of the one before.

        The first launch of a plan may begin before the moves have ended (`overlap`): it waits for
        them before it reads, and lets no other begin before that. Attentions read lengths without
        waiting (docs/cuda.md); no plan begins with one.
        """
        assert self.first is not None
        self.first.enqueue(self.turn.stream)
        self.executor.enqueue(self.turn.stream)
        self.out.download(mirror, self.turn.stream)

    def drop(self) -> None:
        """Forget the round that was launched ahead."""
        self.flight = None
        self.turn.ahead = None
        if self.states is not None:
            self.states.drop()
