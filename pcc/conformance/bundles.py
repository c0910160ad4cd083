"""Where a run of the suite compiles to and with which options; bundles of bare tensor modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcc.bundle import staged
from pcc.driver import Job
from pcc.emission import Emission
from pcc.frontends import templates
from pcc.ir.module import Module
from pcc.package import write
from pcc.passes.manager import Manager
from pcc.runtime.engine import Engine, load
from pcc.targets import target_of
from pcc.tensor.ops import Input


@dataclass(frozen=True)
class Setting:
    """A target, the provider that runs it, a precision and the rows of one call."""

    target: str = "onnx"
    provider: str = "cpu"
    precision: str = "fp32"
    batch: int = 1
    halves: tuple[str, ...] = ()  # half precisions whose ops are tested beside f32

    @property
    def fixed(self) -> int:
        """The batch to compile for: 1 where graphs take any."""
        return self.batch if target_of(self.target, self.precision).static else 1

    def options(self) -> dict[str, Any]:
        """Return the options of `pcc.compile`."""
        return {"target": self.target, "precision": self.precision, "batch": self.fixed}


def write_modules(setting: Setting, modules: Mapping[str, Module], out: Path) -> None:
    """Write a bundle whose queries are tensor modules, through the target's own writer."""
    circuit = templates.ff(2, 2)  # a manifest has one; nothing here asks it anything
    target = target_of(setting.target, setting.precision)
    job = Job(
        circuit, Manager(validate=False), target, lambda _: None,
        precision=setting.precision, batch=setting.fixed,
    )  # fmt: skip
    job.stages.append(("circuit", circuit.module()))
    for name, module in modules.items():
        inputs = tuple(n for n in module.nodes() if isinstance(n, Input))
        job.emissions[name] = Emission(module, inputs)
    with staged(out, force=False) as work:
        write(job, work, "context")


def open_bundle(setting: Setting, path: Path) -> Engine:
    """Open a bundle under the provider of a setting."""
    return load(path, setting.provider, threads=1 if setting.provider == "cpu" else None)
