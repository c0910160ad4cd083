"""Writing a bundle: graphs over one weight file, IR stages, samples, manifest."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pcc
from pcc.bundle import write_manifest
from pcc.circuit import text
from pcc.circuit.queries import QUERIES
from pcc.circuit.text import write as write_file
from pcc.emission import Emission, Places, listed, write_graphs
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.text import large_arrays
from pcc.knobs import CHECK_PARAMETERS
from pcc.passes.supports import deterministic

if TYPE_CHECKING:
    from pcc.driver import Job

NO_VERIFIER: dict[str, Any] = {
    "vocabulary": {"byte_offset": None, "bos": None, "eos": [], "pad": None, "special": []},
    "verifier": None,
    "kv": None,
    "generation": None,
}


def write(job: Job, folder: Path, parameters: str) -> dict[str, Any]:
    """Write everything that a compilation made into an empty folder; return the manifest."""
    from pcc.samples import write_samples

    written = write_graphs(job.order(), folder, job.say)
    specs = {q: {**_spec(job, q, e), **written.specs[q]} for q, e in job.emissions.items()}
    _write_stages(job, folder / "ir", written.placed)
    job.say("samples")
    stateless = {q: e.module for q, e in job.emissions.items() if q in QUERIES}
    # Graphs of other providers are measured by `pcc verify`, where they run.
    on_cpu = job.target.provider == "cpu"
    measured = write_samples(job.circuit, stateless, specs, folder, measure=on_cpu)
    manifest = _manifest(job, specs, measured, parameters)
    manifest["variants"] = [dict(v) for v in written.variants]
    return write_manifest(folder, manifest, written.hashes)


def _spec(job: Job, q: str, e: Emission) -> dict[str, Any]:
    """Return what the manifest says of a query whatever the format."""
    spec: dict[str, Any] = {**listed(e)}
    if job.target.static:
        spec["batch"] = job.batch
    if e.slots:
        slots = [{"role": s.role, "layer": s.layer, "index": s.index} for s in e.slots]
        spec["random"] = {"slots": slots}
    if q == "mode":
        spec["exact"] = deterministic(job.root(q))
    return spec


def _write_stages(job: Job, folder: Path, placed: Places | None) -> None:
    """Write the IR; arrays that the graphs' weight file holds are named there, not copied."""
    folder.mkdir()
    stages = [*job.stages, *((f"tensor-{q}", e.module) for q, e in job.emissions.items())]
    arrays: dict[str, Array] = {}
    for i, (name, module) in enumerate(stages):
        write_file(folder / f"{i:02d}-{name}.pcir", text.show(module).encode("utf-8"))
        arrays.update(large_arrays(module))
    shared = {ref: _place_of(array, placed) for ref, array in arrays.items()}
    lazy = {ref: a for ref, a in arrays.items() if not shared[ref] and a.recipe is not None}
    if sum(a.size for a in lazy.values()) > CHECK_PARAMETERS:
        # Too many to be evaluated, or to be written twice: the stage is to be read, not run.
        absent = {r: {"dtype": a.dtype, "shape": a.shape, "absent": True} for r, a in lazy.items()}
        shared.update(absent)
    own = {ref: array for ref, array in arrays.items() if not shared[ref]}
    if own:
        from safetensors.numpy import save_file

        save_file({ref: a.value for ref, a in own.items()}, folder / "arrays.safetensors")
    if len(own) < len(shared):
        index = {ref: entry for ref, entry in shared.items() if entry}
        write_file(folder / "weights.json", json.dumps(index).encode())


def _place_of(array: Array, placed: Places | None) -> dict[str, Any]:
    """Return where an array is found, nothing if the stages need a copy of their own.

    Random numbers are made again when they are read.
    """
    entry: dict[str, Any] = {"dtype": array.dtype, "shape": array.shape}
    if placed is not None and (found := placed.find(array)) is not None:
        (offset, _), turned = found
        return {**entry, "offset": offset} | ({"turned": True} if turned else {})
    noise = array.recipe and array.recipe.noise
    return {**entry, "noise": noise} if noise else {}


def _manifest(
    job: Job, specs: dict[str, Any], measured: dict[str, tuple[float, float]], parameters: str
) -> dict[str, Any]:
    circuit, module = job.circuit, job.stages[0][1]
    return {
        "producer": f"pcc {pcc.__version__}",
        "target": job.target.name,
        "opset": job.target.opset,
        "circuit": {
            "name": circuit.name, "kind": circuit.kind, "n": circuit.n, "r": circuit.rank,
            "V": max(circuit.cards, default=0), "cards": list(circuit.cards),
            "structure_hash": structure_hash(module),
            "content_hash": hashlib.sha256(text.show(module).encode()).hexdigest(),
            "parameters": parameters if circuit.inputs() else "trained",
        },
        **(job.generation or NO_VERIFIER),
        "queries": specs,
        "unsupported": job.unsupported,
        "precision": job.precisions(),
        # null: measured, but not finite (a draw that rounding moved to another value)
        "numerics": {"max_abs_error": {q: e if math.isfinite(e) else None
                                       for q, (e, _) in measured.items()},
                     "bound": {q: bound for q, (_, bound) in measured.items()},
                     "runtime": _runtime() if measured else None},
        "passes": [
            {"name": r.name, "of": of, "changed": r.changed,
             "nodes_before": r.before, "nodes_after": r.after,
             "ms": round(r.ms, 3), "check_ms": round(r.check_ms, 3),
             "error": r.error if math.isfinite(r.error) else None}
            for of, r in zip(job.of, job.manager.records, strict=True)
        ],
    }  # fmt: skip


def _runtime() -> str:
    from pcc.runtime.ort import import_ort

    return f"onnxruntime {import_ort().__version__}"


def structure_hash(module: Module) -> str:
    """SHA-256 of the circuit without its numbers: equal for two trainings of one structure."""
    digest, at = hashlib.sha256(repr(module.cards).encode()), dict[Op, int]()
    for n in module.nodes():
        parts: list[object] = [n.name, str(n.type), [at[a] for a in n.args]]
        for f, k in zip(n.fields, n.kinds, strict=True):
            if k not in ("Op", "tuple[Op, ...]", "Array"):
                parts.append((f, getattr(n, f)))
        digest.update(repr(parts).encode())
        at[n] = len(at)
    digest.update(repr([at[r] for r in module.roots]).encode())
    return digest.hexdigest()
