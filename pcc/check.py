"""`verify`: a bundle's graphs against the float64 reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcc.bundle import inside
from pcc.check_generation import affordable
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.errors import PccError
from pcc.interp.reference import check, reference
from pcc.interp.rounding import bounds, error
from pcc.ir.core import Values
from pcc.ir.verify import verify as verify_module
from pcc.runtime.arrays import read_npz
from pcc.runtime.engine import Engine, load
from pcc.samples import sample_inputs, worst
from pcc.stored import Stages


@dataclass(frozen=True)
class Check:
    """One comparison: the difference that is largest beside its bound, and that bound."""

    query: str
    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """The result of verifying a bundle."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is within its bound."""
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
    generation are compared as `pcc.check_generation` says. How far float32 may be off grows
    with the logarithms that it adds up: `pcc.interp.rounding`. Graphs of fixed sizes are given the
    rows that they were compiled for, others `rows`.
    """
    engine = load(path, provider)
    circuit = stored_circuit(engine)
    affordable(circuit.module(), "circuit")
    checks: list[Check] = []
    for query, spec in engine.queries.items():
        if query not in QUERIES:
            continue
        checks.append(_stored(engine, circuit, query))
        inputs = sample_inputs(circuit, spec, seed, int(spec.get("batch", rows)))
        outputs = engine.run(query, **inputs)
        for what, found in against(circuit, query, inputs, outputs).items():
            checks.append(Check(query, what, *found))
    if "marginal" in engine.queries:
        checks.append(_summed_out(engine, circuit, seed, rows))
    if engine.manifest.get("generation") is not None:
        from pcc.check_generation import check_generation

        checks += [Check(*c) for c in check_generation(engine, seed, progress or (lambda _: None))]
    return Report(Path(path), tuple(checks))


def _summed_out(engine: Engine, circuit: Circuit, seed: int, rows: int) -> Check:
    """Compare the sum over all variables with the reference's."""
    spec = engine.queries["marginal"]
    inputs = sample_inputs(circuit, spec, seed, int(spec.get("batch", rows)))
    inputs["observed"] = np.zeros_like(inputs["observed"])
    total, want = engine.run("marginal", **inputs), reference(circuit, "marginal", inputs)
    found = worst(circuit, "marginal", inputs, want, total)
    return Check("marginal", "everything summed out", *found)


def stored_circuit(engine: Engine) -> Circuit:
    """Return the circuit that a bundle was compiled from."""
    module = Stages(engine.path, engine.manifest["files"]).module("circuit")
    if len(module.outputs) != 1:
        raise PccError("E121", "the bundle's circuit has several outputs", at=str(engine.path))
    verify_module(module, stage="circuit")
    return Circuit(module.outputs[0][1], module.cards, module.name)


def _stored(engine: Engine, circuit: Circuit, query: str) -> Check:
    arrays = read_npz(inside(engine.path, f"samples/{query}.npz"))
    inputs = {k[3:]: v for k, v in arrays.items() if k.startswith("in.")}
    outputs = in_batches(engine, query, inputs)
    if missing := [k for k in outputs if f"out.{k}" not in arrays]:
        what = f"the samples of '{query}' have no output {missing[0]!r}"
        raise PccError("B216", what, at=str(engine.path), hint="compile the bundle again")
    want = {k: arrays[f"out.{k}"] for k in outputs}
    if bad := [
        k for k, v in want.items() if v.shape != outputs[k].shape or v.dtype.kind not in "fi"
    ]:
        what = f"the samples of '{query}' hold another kind of {bad[0]!r}"
        raise PccError("B216", what, at=str(engine.path), hint="compile the bundle again")
    return Check(query, "stored samples", *worst(circuit, query, inputs, want, outputs))


def in_batches(engine: Engine, query: str, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Run any number of rows: a graph for a fixed number gets that many at a time."""
    spec = engine.queries[query]
    names = [i["name"] for i in spec["inputs"] if i["shape"][:1] == ["B"] and i["name"] in inputs]
    rows = len(inputs[names[0]]) if names else 0
    fixed = spec.get("batch")
    if fixed is None or rows in (0, fixed):
        return engine.run(query, **inputs)
    pieces = []
    for start in range(0, rows, fixed):
        at = np.minimum(np.arange(start, start + fixed), rows - 1)  # the last row fills up
        pieces.append(engine.run(query, **{**inputs, **{k: inputs[k][at] for k in names}}))
    return {
        o["name"]: np.concatenate([p[o["name"]] for p in pieces])[:rows]
        if o["shape"][:1] == ["B"]
        else pieces[0][o["name"]]
        for o in spec["outputs"]
    }


def against(
    circuit: Circuit, query: str, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, tuple[float, float]]:
    """Return (error, bound) of a query's answers, judged by naive masked evaluations."""
    if query in ("sample", "mode", "draft"):
        found = check(circuit, query, dict(inputs), dict(outputs))
        limits = bounds(circuit, query, inputs, outputs)
        top = max(float(v.max(initial=0.0)) for v in limits.values())
        return {what: (err, top) for what, err in found.items()}
    want = reference(circuit, query, dict(inputs))
    limits = bounds(circuit, query, inputs, want)
    return {f"{k} against masked evaluations": error(np.asarray(want[k]), v, limits[k])
            for k, v in outputs.items()}  # fmt: skip
