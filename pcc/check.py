"""`verify`: a bundle's graphs against the float64 reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.bundle import inside
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.errors import PccError
from pcc.interp.reference import check, reference
from pcc.ir.core import Values
from pcc.ir.verify import verify as verify_module
from pcc.runtime.arrays import read_npz
from pcc.runtime.engine import Engine, load
from pcc.samples import error, sample_inputs
from pcc.stored import Stages

TOLERANCE = 5e-5


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference and whether it is within the tolerance."""

    query: str
    what: str
    error: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """The result of verifying a bundle."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is within its tolerance."""
        return all(c.ok for c in self.checks)


def verify(
    path: str | Path,
    *,
    seed: int = 1,
    rows: int = 2,
    provider: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run every query of a bundle on stored and fresh inputs and compare with the reference.

    Stored samples were computed in float64 when the bundle was made. Fresh inputs are judged by
    naive evaluation of the circuit as it was before any pass (`ir/00-circuit.pcir`): one masked
    evaluation per question. Sums to one are checked by summing every variable out. Graphs of
    generation are compared as `pcc.check_generation` says.
    """
    engine = load(path, provider)
    circuit = stored_circuit(engine)
    checks: list[Check] = []
    for query, spec in engine.queries.items():
        if query not in QUERIES:
            continue
        checks.append(_stored(engine, query))
        inputs = sample_inputs(circuit, spec, seed, rows)
        outputs = engine.run(query, **inputs)
        for what, err in _against(circuit, query, inputs, outputs).items():
            checks.append(Check(query, what, err, err <= TOLERANCE))
    if "marginal" in engine.queries:
        spec = engine.queries["marginal"]
        inputs = sample_inputs(circuit, spec, seed, rows)
        inputs["observed"] = np.zeros_like(inputs["observed"])
        total = engine.run("marginal", **inputs)["log_prob"].astype(np.float64)
        want = reference(circuit, "marginal", inputs)["log_prob"]
        err = error(np.asarray(want, np.float64), total)
        checks.append(Check("marginal", "everything summed out", err, err <= TOLERANCE))
    if engine.manifest.get("generation") is not None:
        from pcc.check_generation import check_generation

        found = check_generation(engine, seed, progress or (lambda _: None))
        checks += [Check(q, what, err, err <= limit) for q, what, err, limit in found]
    return Report(Path(path), tuple(checks))


def stored_circuit(engine: Engine) -> Circuit:
    """Return the circuit that a bundle was compiled from."""
    module = Stages(engine.path, engine.manifest["files"]).module("circuit")
    if len(module.outputs) != 1:
        raise PccError("E121", "the bundle's circuit has several outputs", at=str(engine.path))
    verify_module(module, stage="circuit")
    return Circuit(module.outputs[0][1], module.cards, module.name)


def _stored(engine: Engine, query: str) -> Check:
    arrays = read_npz(inside(engine.path, f"samples/{query}.npz"))
    inputs = {k[3:]: v for k, v in arrays.items() if k.startswith("in.")}
    outputs = engine.run(query, **inputs)
    if missing := [k for k in outputs if f"out.{k}" not in arrays]:
        what = f"the samples of '{query}' have no output {missing[0]!r}"
        raise PccError("B216", what, at=str(engine.path), hint="compile the bundle again")
    worst = max(error(arrays[f"out.{k}"], v) for k, v in outputs.items())
    return Check(query, "stored samples", worst, worst <= TOLERANCE)


def _against(
    circuit: Circuit, query: str, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, float]:
    if query in ("sample", "mode", "draft"):
        return check(circuit, query, dict(inputs), dict(outputs))
    want: dict[str, Any] = reference(circuit, query, dict(inputs))
    return {f"{k} against masked evaluations": error(np.asarray(want[k], np.float64), v)
            for k, v in outputs.items()}  # fmt: skip
