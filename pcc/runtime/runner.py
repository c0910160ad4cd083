"""Where an engine's graphs run: on the host under ONNX Runtime, or on a device.

Sessions ask their `Place` for states and calls, and do not know which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.runtime.buffers import Call, States
from pcc.runtime.ort import answer, check_opset, check_provider, open_session
from pcc.runtime.philox import Uniforms

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

Values = np.ndarray[Any, Any]
# Formats of bundles by provider, and which providers run them.
RUN_BY = {"onnx": ("cpu", "cuda"), "cuda": ("cuda",), "tensorrt": ("tensorrt",)}


class Shows(Protocol):
    """A named array of a call."""

    @property
    def array(self) -> Values:
        """The array, on the host."""


class Calls(Protocol):
    """A graph bound to its buffers: fill `self[name]`, `run()`, read `self[name]`."""

    @property
    def inputs(self) -> Mapping[str, Shows]:
        """Input arrays by name, states aside."""

    @property
    def outputs(self) -> Mapping[str, Shows]:
        """Output arrays by name, states aside."""

    def __getitem__(self, name: str) -> Values:
        """Return an input or output, on the host."""

    def attach(self, states: Any) -> None:
        """Bind the state buffers, after every resize."""

    def run(self) -> None:
        """Run the graph over its buffers, and wait for its outputs."""


class Holds(Protocol):
    """The states of B rows: `past.X` and `present.X`."""

    rows: int
    past: Any

    def bytes_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the memory that states of these per-row shapes take."""

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Allocate states of these per-row shapes, keeping what was in the old rows."""

    def settle(self) -> None:
        """Make the present of the last call the past of the next."""

    def read(self, name: str) -> Values:
        """Return a state, on the host."""

    def write(self, name: str, value: Values) -> None:
        """Replace a state by an array of its shape and type."""


class Place(Protocol):
    """What one session runs on: its states, and graphs bound to arrays of their own."""

    @property
    def states(self) -> Holds:
        """The states; nothing of a round that may be under way is in them."""

    def call(self, query: str) -> Calls:
        """Return a graph that is not bound to the states yet."""

    def round(self, query: str, uniforms: Uniforms | None) -> Calls:
        """Return the graph of a round, with what it draws its uniforms from."""

    def quiet(self) -> None:
        """Drop whatever was launched ahead: the host is going to read or replace states."""


class Runner(Protocol):
    """Runs the graphs of one bundle."""

    @property
    def opened(self) -> Mapping[str, Any]:
        """ONNX Runtime sessions that are open, by graph."""

    def place(self, specs: Sequence[Mapping[str, Any]], batch: int) -> Place:
        """Return room for a session of `batch` rows. Errors: R104 where graphs take others."""

    def executor(self, query: str) -> tuple[Any, Any]:
        """Return the device, and a query's graph on it with nothing bound."""

    def answer(self, query: str, feed: Mapping[str, Values], rows: int) -> list[Values]:
        """Return the outputs of a query in the manifest's order."""


def runner_of(engine: Engine) -> Runner:
    """Return what runs a bundle under the provider that was asked for. Errors: R108, R112, X2xx."""
    kind = format_of(engine.manifest, str(engine.path))
    check_provider(engine.provider, kind)
    if engine.provider not in RUN_BY[kind]:
        what = f"provider={engine.provider!r} does not run a bundle for {kind!r}"
        raise PccError("R112", what, at=str(engine.path),
                       hint=f"load it with provider={RUN_BY[kind][0]!r}")  # fmt: skip
    if kind == "onnx":
        check_opset(engine.manifest["opset"])
    static = all("batch" in s for s in engine.queries.values())
    if kind != "onnx" and not static:
        raise PccError("B215", "the manifest's queries have no 'batch'", at=str(engine.path),
                       hint="it is damaged: compile the bundle again")  # fmt: skip
    # Graphs whose sizes are open have nodes that compute sizes, on the host: no static addresses.
    if engine.provider == "cpu" or (kind == "onnx" and not static):
        return HostRunner(engine)
    from pcc.runtime.device.gpu import DeviceRunner

    return DeviceRunner(engine, kind)


def format_of(manifest: Mapping[str, Any], at: str) -> str:
    """Return the format of a bundle's graphs. Errors: B215."""
    variants = manifest.get("variants", [])
    plain = isinstance(variants, list) and all(isinstance(v, dict) for v in variants)
    kind = variants[0].get("format", "onnx") if plain and variants else "onnx"
    if not isinstance(kind, str) or not plain or kind not in RUN_BY:
        what = f"the manifest's variants have no format of {', '.join(RUN_BY)}"
        raise PccError("B215", what, at=at, hint="it is damaged, or of a later pcc")
    return str(kind)


def check_rows(queries: Mapping[str, Mapping[str, Any]], batch: int) -> None:
    """Refuse other numbers of rows than static graphs were compiled for. Errors: R104."""
    fixed = {int(s["batch"]) for s in queries.values() if "batch" in s}
    if fixed and batch not in fixed:
        what = f"{batch} sequences at once, the graphs take {max(fixed)}"
        raise PccError("R104", what, hint=f"compile with --batch {batch}")


class HostPlace:
    """States and arrays in the memory of the host."""

    def __init__(self, runner: HostRunner, specs: Sequence[Mapping[str, Any]], batch: int) -> None:
        self.runner, self.batch = runner, batch
        self.states = States(specs, batch)

    def call(self, query: str) -> Call:
        """Return a graph that is not bound to the states yet."""
        made = Call(self.runner.session_of(query, self.batch), self.runner.spec(query), self.batch)
        for name, value in self.runner.weights(query).items():
            made.give(name, value)
        return made

    def round(self, query: str, uniforms: Uniforms | None) -> Call:
        """Return the graph of a round; its uniforms are filled in by the session."""
        return self.call(query)

    def quiet(self) -> None:
        """Nothing is ever under way."""


class HostRunner:
    """ONNX Runtime over arrays of the host."""

    def __init__(self, engine: Engine) -> None:
        self.path, self.queries = engine.path, engine.queries
        self.provider, self.threads = engine.provider, engine.threads
        self._sessions: dict[str, Any] = {}
        self._weights: dict[tuple[Any, ...], Values] = {}

    @property
    def opened(self) -> dict[str, Any]:
        """ONNX Runtime sessions that are open, by graph."""
        return dict(self._sessions)

    def spec(self, query: str) -> dict[str, Any]:
        """Return the manifest's entry of a query."""
        return self.queries[query]

    def session_of(self, query: str, rows: int = 0) -> Any:
        """Return the ONNX Runtime session of a query: for calls with one row, or any number.

        Where large weights meet one vector, a CPU does best to read them as they lie in the file,
        and with more rows to hold a copy in blocks: there are two graphs then.
        """
        spec = self.spec(query)
        one = rows == 1 and self.provider == "cpu" and spec.get("one_row")
        name: str = one or spec["graph"]
        if name not in self._sessions:
            graph = inside(self.path, name)
            self._sessions[name] = open_session(graph, self.provider, self.threads)
        return self._sessions[name]

    def weights(self, query: str) -> dict[str, Values]:
        """Return the weights that a graph takes as inputs, as they lie in their file."""
        from pcc.runtime.weights import mapped

        return mapped(self.path, self.spec(query).get("weights", ()), self._weights)

    def place(self, specs: Sequence[Mapping[str, Any]], batch: int) -> HostPlace:
        """Return room for a session of `batch` rows."""
        check_rows(self.queries, batch)
        return HostPlace(self, specs, batch)

    def executor(self, query: str) -> tuple[Any, Any]:
        """There is none."""
        raise PccError("R115", f"'{query}' runs on the host, not on a device")

    def answer(self, query: str, feed: Mapping[str, Values], rows: int) -> list[Values]:
        """Return the outputs of a query in the manifest's order."""
        names = [o["onnx"] for o in self.spec(query)["outputs"]]
        full = {**feed, **self.weights(query)}
        return answer(self.session_of(query, rows), names, full, str(self.path))
