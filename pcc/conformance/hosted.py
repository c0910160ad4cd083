"""Bundles whose graphs run as tensor modules in this process, behind all that an engine offers.

Two things run a module: the float64 evaluator, the judge, which rounds where the IR rounds; and the
plans of the CUDA engine on the host (`pcc.conformance.simulated`). Sessions do not know the
difference: states and calls are arrays of this process. Graphs have fixed sizes, so that states
are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.check_generation import affordable
from pcc.conformance.edge import Values
from pcc.conformance.simulated import Simulated
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import dtype_of
from pcc.ir.semiring import Semiring
from pcc.runtime.engine import Engine
from pcc.runtime.philox import Uniforms
from pcc.runtime.runner import check_rows
from pcc.stored import Stages

Work = Callable[[Mapping[str, Values]], Mapping[str, Values]]  # inputs to outputs, by name


def evaluated(path: Path) -> Engine:
    """Open a bundle of any target in the float64 evaluator. Errors: B217 (no such stage), V110."""
    return Engine(path, "cpu", None, runner=lambda e: ModuleRunner(e, _evaluator(e)))


def simulated(path: Path) -> Engine:
    """Open a bundle of static graphs as plans of the CUDA engine. Errors: X405 (no C++ compiler).

    Its provider is that of the plans: only their outputs are read, as of a device.
    """

    def runner(engine: Engine) -> ModuleRunner:
        stages = Stages(engine.path, engine.manifest["files"])
        batch = {int(s["batch"]) for s in engine.queries.values()}
        plans = Simulated({q: stages.module(f"tensor-{q}") for q in engine.queries}, max(batch))
        return ModuleRunner(engine, lambda q: plans.simulator(q).run, fixed=True)

    return Engine(path, "cuda", None, runner=runner)


def _evaluator(engine: Engine) -> Callable[[str], Work]:
    """Return what makes a query's module a function, in float64."""
    stages = Stages(engine.path, engine.manifest["files"])

    def work(query: str) -> Work:
        module = stages.module(f"tensor-{query}")
        affordable(module, "model")
        names = [name for name, _ in module.outputs]

        def answer(feed: Mapping[str, Values]) -> Mapping[str, Values]:
            return dict(zip(names, run(module.roots, feed, Semiring()), strict=True))

        return answer

    return work


@dataclass(frozen=True)
class Held:
    """A named array of a call."""

    array: Values


class HostedStates:
    """`past.X` of B rows; what a call computes becomes the past when it is settled."""

    def __init__(self, specs: Sequence[Mapping[str, Any]], batch: int) -> None:
        self.specs, self.batch = list(specs), batch
        self.rows = 0  # as the manifest counts them
        self.past: dict[str, Values] = {}
        self.present: dict[str, Values] = {}

    def bytes_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the memory that states of these per-row shapes take."""
        return sum(self._zeros(s, shapes).nbytes for s in self.specs)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Allocate the states, once: graphs of fixed sizes have one size of them."""
        for s in self.specs:
            new = self._zeros(s, shapes)
            if self.past.setdefault(s["name"], new).shape != new.shape:
                raise ValueError(f"state {s['name']} has another shape than {new.shape}")

    def _zeros(self, spec: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Values:
        return np.zeros((self.batch, *shapes[spec["name"]]), dtype_of(spec["dtype"]))

    def take(self, outputs: Mapping[str, Values]) -> None:
        """Keep the states among a call's outputs, in the type that they are stored in."""
        for name, past in self.past.items():
            value = outputs.get(f"present.{name}")
            if value is not None:
                whole = np.broadcast_to(value, past.shape) if value.shape != past.shape else value
                self.present[name] = np.require(whole, past.dtype, ["C", "W"])

    def settle(self) -> None:
        """Make the present of the last call the past of the next."""
        self.past |= self.present
        self.present = {}

    def read(self, name: str) -> Values:
        """Return a state; it changes with the next call."""
        return self.past[name]

    def write(self, name: str, value: Values) -> None:
        """Replace a state by an array of its shape and type."""
        self.past[name][:] = value


class HostedCall:
    """A graph bound to arrays: fill `self[name]`, `run()`, read `self[name]`."""

    def __init__(self, work: Work, spec: Mapping[str, Any], batch: int) -> None:
        self.work = work
        self.inputs = {i["name"]: _held(i, batch) for i in spec["inputs"] if _own(i)}
        self.outputs = {o["name"]: _held(o, batch) for o in spec["outputs"] if _own(o)}
        self.states: HostedStates | None = None

    def attach(self, states: HostedStates) -> None:
        """Read and write these states from now on."""
        self.states = states

    def __getitem__(self, name: str) -> Values:
        return (self.inputs.get(name) or self.outputs[name]).array

    def run(self) -> None:
        """Compute the outputs, and the states that follow."""
        feed = {name: held.array for name, held in self.inputs.items()}
        if self.states is not None:
            feed |= {f"past.{name}": value for name, value in self.states.past.items()}
        found = self.work(feed)
        for name, held in self.outputs.items():
            held.array[...] = found[name]
        if self.states is not None:
            self.states.take(found)


def _own(io: Mapping[str, Any]) -> bool:
    return not io["name"].startswith(("past.", "present."))


def _held(io: Mapping[str, Any], batch: int) -> Held:
    sizes = [batch if d in ("B", "Bc") else d for d in io["shape"]]
    return Held(np.zeros(sizes, dtype_of(io["dtype"])))


class HostedPlace:
    """What one session runs on."""

    def __init__(self, runner: ModuleRunner, specs: Sequence[Mapping[str, Any]], batch: int):
        self.runner, self.batch = runner, batch
        self.states = HostedStates(specs, batch)

    def call(self, query: str) -> HostedCall:
        """Return a graph that is not bound to the states yet."""
        return HostedCall(self.runner.work(query), self.runner.queries[query], self.batch)

    def round(self, query: str, uniforms: Uniforms | None) -> HostedCall:
        """Return the graph of a round; its uniforms are filled in by the session."""
        return self.call(query)

    def quiet(self) -> None:
        """Nothing is ever under way."""


class ModuleRunner:
    """Runs a bundle's modules; `make` gives what computes one, when it is first asked for.

    `fixed`: it takes the number of rows that the bundle was compiled for, and no other.
    """

    def __init__(
        self, engine: Engine, make: Callable[[str], Work], *, fixed: bool = False
    ) -> None:  # fmt: skip
        self.queries, self.make, self.fixed = engine.queries, make, fixed
        self.opened: dict[str, Any] = {}
        self._works: dict[str, Work] = {}

    def work(self, query: str) -> Work:
        """Return what computes a query."""
        if query not in self._works:
            self._works[query] = self.make(query)
        return self._works[query]

    def place(self, specs: Sequence[Mapping[str, Any]], batch: int) -> HostedPlace:
        """Return room for a session of `batch` rows. Errors: R104."""
        if self.fixed:
            check_rows(self.queries, batch)
        return HostedPlace(self, specs, batch)

    def executor(self, query: str) -> tuple[Any, Any]:
        """There is none."""
        raise PccError("R115", f"'{query}' runs on the host, not on a device")

    def answer(self, query: str, feed: Mapping[str, Values], rows: int) -> list[Values]:
        """Return the outputs of a query in the manifest's order, in the types that it says."""
        found = self.work(query)({k: v.copy() for k, v in feed.items()})
        outputs = self.queries[query]["outputs"]
        return [found[o["name"]].astype(dtype_of(o["dtype"]), copy=False) for o in outputs]
