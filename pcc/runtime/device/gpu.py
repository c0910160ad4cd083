"""A bundle on one GPU: one stream, the weights once, and room for sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pcc.runtime.device.arena import Values
from pcc.runtime.device.call import DeviceCall, StepCall, Turn
from pcc.runtime.device.driver import Device, device
from pcc.runtime.device.executor import Executor, Opener
from pcc.runtime.device.states import DeviceStates
from pcc.runtime.philox import Uniforms
from pcc.runtime.runner import check_rows

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine


class DeviceRunner:
    """Runs the graphs of one bundle on the GPU, through whatever its format needs."""

    def __init__(self, engine: Engine, kind: str, on: Device | None = None) -> None:
        self.path, self.manifest, self.queries = engine.path, engine.manifest, engine.queries
        self.options = engine  # `run_ahead` may change
        self.device = device() if on is None else on
        self.stream = self.device.stream()
        self.opener = self._opener(kind)
        self._alone: dict[str, DeviceCall] = {}

    def _opener(self, kind: str) -> Opener:
        if kind == "tensorrt":
            from pcc.runtime.device.tensorrt import Opener as TensorRt

            return TensorRt(self.device, self.path, self.manifest, self.stream)
        if kind == "cuda":
            from pcc.runtime.device.own import Plans

            return Plans(self.device, self.path, self.manifest, self.stream, self.options.progress)
        from pcc.runtime.device.ort_cuda import OrtGraphs

        return OrtGraphs(self.device, self.path, self.manifest, self.stream, self.options.progress)

    @property
    def opened(self) -> Mapping[str, Any]:
        """None: memory on the device is not what `memory` of a host's sessions means."""
        return {}

    def executor(self, query: str) -> tuple[Device, Executor]:
        """Return the device, and a query's graph on it with nothing bound."""
        self.device.enter()
        return self.device, self.opener.executor(query)

    def place(self, specs: Sequence[Mapping[str, Any]], batch: int) -> DevicePlace:
        """Return room for a session of `batch` rows; nothing is allocated yet."""
        check_rows(self.queries, batch)
        self.device.enter()
        return DevicePlace(self, specs, batch)

    def answer(self, query: str, feed: Mapping[str, Values], rows: int) -> list[Values]:
        """Return the outputs of a query in the manifest's order; states where it has any."""
        spec = self.queries[query]
        place, call = self._ready(query, spec, feed)
        for name, shown in call.inputs.items():
            shown.array[:] = feed[name]
        call.run()
        found = {name: shown.array.copy() for name, shown in call.outputs.items()}
        for o in spec["outputs"]:
            kind, _, state = o["name"].partition(".")
            if kind == "present" and o["name"] not in found:
                found[o["name"]] = place.states.value(place.states.present[state])
        return [found[o["name"]] for o in spec["outputs"]]

    def _ready(
        self, query: str, spec: Mapping[str, Any], feed: Mapping[str, Values]
    ) -> tuple[DevicePlace, DeviceCall]:
        """Return a call, kept where it has no states; else states as they are fed."""
        batch, past = int(spec["batch"]), {k[5:]: v for k, v in feed.items() if k[:5] == "past."}
        place = DevicePlace(self, (self.manifest["generation"] or {}).get("states", ()), batch)
        if not past:
            if query not in self._alone:
                self._alone[query] = place.call(query)
            return place, self._alone[query]
        call = place.call(query)
        place.states.resize({k: v.shape[1:] for k, v in past.items()})
        for name, value in past.items():
            place.states.write(name, value)
        call.attach(place.states)
        return place, call


class DevicePlace:
    """What one session runs on: states on the device, and calls that take turns."""

    def __init__(
        self, runner: DeviceRunner, specs: Sequence[Mapping[str, Any]], batch: int
    ) -> None:
        self.runner, self.batch = runner, batch
        self.turn = Turn(runner.device, runner.stream)
        self.states = DeviceStates(runner.device, runner.stream, specs, batch)

    def call(self, query: str) -> DeviceCall:
        """Return a graph that is not bound to the states yet."""
        executor, spec = self.runner.opener.executor(query), self.runner.queries[query]
        return DeviceCall(self.turn, executor, spec, self.batch)

    def round(self, query: str, uniforms: Uniforms | None) -> StepCall:
        """Return the graph of a round.

        Uniforms of another kind than the protocol's are filled in by the host, round by round.
        """
        executor, spec = self.runner.opener.executor(query), self.runner.queries[query]
        own = uniforms if type(uniforms) is Uniforms else None
        ahead = bool(self.runner.options.run_ahead)
        return StepCall(self.turn, executor, spec, self.batch, own, ahead=ahead)

    def quiet(self) -> None:
        """Drop whatever was launched ahead, and wait until the device is idle."""
        self.turn.alone()
        self.runner.device.wait(self.runner.stream)
