"""Where a run of the suite compiles to and with which options; bundles of bare tensor modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pcc.bundle import read_manifest, staged
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.conformance.edge import Values
from pcc.conformance.hosted import simulated
from pcc.conformance.simulated import Simulated
from pcc.driver import Job, compile
from pcc.emission import Emission
from pcc.frontends import templates
from pcc.ir.module import Module
from pcc.package import write
from pcc.passes.manager import Manager
from pcc.runtime.engine import Engine, load
from pcc.stored import Stages
from pcc.targets import target_of
from pcc.tensor.ops import Input

SIMULATOR = "simulator"
BUILD = "build"  # the provider that runs nothing: what a target's compiler refuses is found out
HOSTED = "onnx-cuda"  # it has the modules of target cuda, and is written without nvcc
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A target, the provider that runs it, a precision and the rows of one call.

    The provider "simulator" runs plans of target cuda on the host (`pcc.conformance.simulated`);
    "build" compiles everything and runs nothing.
    """

    target: str = "onnx"
    provider: str = "cpu"
    precision: str = "fp32"
    batch: int = 1
    halves: tuple[str, ...] = ()  # half precisions whose ops are tested beside f32
    only: tuple[str, ...] = ()  # parts of names: of circuits and scenarios that are taken

    def takes(self, name: str) -> bool:
        """Return whether a circuit or a scenario is asked for."""
        return not self.only or any(part in name for part in self.only)

    engine: tuple[tuple[str, Any], ...] = ()  # of `pcc.compile`, as pairs

    @property
    def fixed(self) -> int:
        """The batch to compile for: 1 where graphs take any."""
        return self.batch if target_of(self.target, self.precision).static else 1

    @property
    def compiled(self) -> str:
        """The target that bundles are compiled to."""
        return HOSTED if self.provider == SIMULATOR else self.target

    def options(self) -> dict[str, Any]:
        """Return the options of `pcc.compile`."""
        how = {"target": self.compiled, "precision": self.precision, "batch": self.fixed}
        return {**how, "engine": dict(self.engine)} if self.engine else how


def write_modules(setting: Setting, modules: Mapping[str, Module], out: Path) -> None:
    """Write a bundle whose queries are tensor modules, through the target's own writer."""
    circuit = templates.ff(2, 2)  # a manifest has one; nothing here asks it anything
    target = target_of(setting.target, setting.precision)
    job = Job(
        circuit, Manager(validate=False), target, lambda _: None,
        precision=setting.precision, batch=setting.fixed, engine=dict(setting.engine),
    )  # fmt: skip
    job.stages.append(("circuit", circuit.module()))
    for name, module in modules.items():
        inputs = tuple(n for n in module.nodes() if isinstance(n, Input))
        job.emissions[name] = Emission(module, inputs)
    with staged(out, force=False) as work:
        write(job, work, "context")


def open_bundle(setting: Setting, path: Path) -> Engine:
    """Open a bundle under the provider of a setting."""
    if setting.provider == SIMULATOR:
        return simulated(path)
    return load(path, setting.provider, threads=1 if setting.provider == "cpu" else None)


class Order(Protocol):
    """In which order things are judged (`pcc.conformance.prebuild`)."""

    def of(self, items: Iterable[T], place: Callable[[T], Path]) -> Iterator[T]:
        """Yield each item, whose bundle is put at `place`, once."""
        ...


class InOrder:
    """As they are listed."""

    def of(self, items: Iterable[T], place: Callable[[T], Path]) -> Iterator[T]:
        """Yield each item."""
        yield from items


class Answers(Protocol):
    """What runs queries by name: a loaded bundle, or plans on the host."""

    @property
    def queries(self) -> dict[str, dict[str, Any]]:
        """Inputs by query."""

    def run(self, query: str, /, **inputs: Values) -> dict[str, Values]:
        """Return the outputs of a query by name."""


def modules_to(setting: Setting, modules: Mapping[str, Module], out: Path) -> None:
    """Compile bare modules under a setting, once."""
    if not out.exists():
        write_modules(setting, modules, out)


def answers_of(setting: Setting, modules: Mapping[str, Module], out: Path) -> Answers:
    """Return what runs bare modules under a setting, from a bundle at `out` if it needs one."""
    if setting.provider == SIMULATOR:
        return Simulated(modules, setting.batch)
    modules_to(setting, modules, out)
    return open_bundle(setting, out)


def compiled_to(setting: Setting, circuit: Circuit, out: Path) -> None:
    """Compile a circuit under a setting, once."""
    if not out.exists():
        compile(circuit, out=out, validate=False, **setting.options())


def answers_to(setting: Setting, circuit: Circuit, out: Path) -> Answers:
    """Return what answers the queries of a circuit under a setting, compiled to `out` once."""
    compiled_to(setting, circuit, out)
    if setting.provider != SIMULATOR:
        return open_bundle(setting, out)
    stages = Stages(out, read_manifest(out)["files"])
    names = [q for q in QUERIES if f"tensor-{q}" in stages.names]
    return Simulated({q: stages.module(f"tensor-{q}") for q in names}, setting.batch)


def module_of(answers: Answers, query: str) -> Module:
    """Return the tensor module that a query was lowered from."""
    if isinstance(answers, Simulated):
        return answers.modules[query]
    assert isinstance(answers, Engine)
    return Stages(answers.path, answers.manifest["files"]).module(f"tensor-{query}")
