"""`compile`: from a source to a bundle."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pcc
from pcc.bundle import RUNTIME_OF_OPSET, staged, write_manifest
from pcc.circuit import ops as c
from pcc.circuit import text
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES, Query, query_inputs
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, tensor
from pcc.ir.module import Module
from pcc.ir.text import resources
from pcc.passes.manager import Manager, Pass, Record
from pcc.passes.pipelines import circuit_pipeline, tensor_pipeline
from pcc.passes.to_tensor import slots_of
from pcc.tensor.ops import Input

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """A compiled bundle: where it is, its manifest, and what the passes did."""

    path: Path
    manifest: dict[str, Any]
    records: tuple[Record, ...]
    seconds: float


@dataclass
class Job:
    """One compilation."""

    circuit: Circuit
    manager: Manager
    opset: int
    say: Progress
    of: list[str] = field(default_factory=list)  # what each record of the manager is about
    stages: list[tuple[str, Module]] = field(default_factory=list)
    modules: dict[str, Module] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, module: Module, pipeline: Sequence[Pass]) -> Module:
        """Run a pipeline, and remember that its records are about `name`."""
        module = self.manager.run(module, pipeline)
        self.of += [name] * (len(self.manager.records) - len(self.of))
        return module

    def root(self, query: str) -> Op:
        """Return the optimised circuit that a query is asked of."""
        stages = dict(self.stages)
        name = "optimised-max" if query == "mode" and "optimised-max" in stages else "optimised"
        return stages[name].roots[0]


def load_source(source: str | Path | Circuit, **options: Any) -> Circuit:
    """Return the circuit of a `.pcir` file, an MTPC checkpoint folder, or itself."""
    if not isinstance(source, Circuit) and Path(source).is_dir():
        from pcc.frontends.mtpc import load_mtpc

        return load_mtpc(source, **options)
    if options:
        what = f"{', '.join(options)}: only a checkpoint folder has such an option"
        raise PccError("E145", what, at="" if isinstance(source, Circuit) else str(source))
    if isinstance(source, Circuit):
        return source
    path = Path(source)
    if path.suffix == ".pcir":
        module = text.load(path)
        if len(module.outputs) != 1:
            raise PccError("E121", "expected a circuit with one output", at=str(path))
        from pcc.ir.verify import verify

        verify(module, stage="circuit")
        return Circuit(module.outputs[0][1], module.cards, module.name)
    what = "is neither a checkpoint folder nor a .pcir file" if path.exists() else "does not exist"
    raise PccError("E140", f"the source {what}", at=str(path))


def compile(
    source: str | Path | Circuit,
    verifier: str | Path | None = None,
    queries: Sequence[str] | None = None,
    target: str = "onnx",
    precision: str = "fp32",
    max_seq: int = 2048,
    window: int | None = None,
    out: str | Path | None = "m.pcc",
    *,
    parameters: str = "context",
    opset: int = 24,
    validate: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    **frontend: Any,
) -> Artifact:
    """Compile a circuit to a bundle of ONNX graphs, one per query, over one weight file.

    `queries=None` compiles every query that the circuit supports and lists the others in the
    manifest with the reason. `window` drafts fewer variables: the later ones are summed out.
    `parameters="logits"` takes the circuit's logits as inputs instead of a context. `out=None`
    writes to a temporary folder. Raises `PccError`; nothing is left behind on failure.
    """
    start = time.perf_counter()
    _supported(verifier, target, precision, parameters, queries)
    with _place(out, force) as folder, staged(folder, force=force) as work:
        circuit = load_source(source, **frontend)
        if window is not None:
            from pcc.passes.restrict import restrict

            circuit = restrict(circuit, window)
        if parameters == "logits":
            circuit = circuit.with_logits()
        for name, i in circuit.inputs().items():
            if not i.batch:
                raise PccError("E144", f"input {name!r} has no batch axis", at=i.loc)
        job = Job(circuit, Manager(validate=validate), opset, progress or (lambda _: None))
        _circuit(job)
        for q in queries or QUERIES:
            _query(job, q, required=bool(queries))
        if not job.modules:
            why = next(iter(job.unsupported.values()))
            raise PccError("E146", f"no query can be compiled: {why}")
        manifest = _write(job, work, parameters)
    return Artifact(folder, manifest, tuple(job.manager.records), time.perf_counter() - start)


def _supported(
    verifier: object, target: str, precision: str, parameters: str, queries: Sequence[str] | None
) -> None:
    for name, value, only in (
        ("verifier", verifier, (None,)),
        ("target", target, ("onnx",)),
        ("precision", precision, ("fp32",)),
        ("parameters", parameters, ("context", "logits")),
    ):
        if value not in only:
            hint = f"built is: {', '.join(map(str, only))}"
            raise PccError("E141", f"{name}={str(value)[:60]!r} is not supported", hint=hint)
    for q in queries or ():
        if q not in QUERIES:
            raise PccError("E142", f"unknown query {q!r}", hint=f"one of {', '.join(QUERIES)}")


@contextmanager
def _place(out: str | Path | None, force: bool) -> Iterator[Path]:
    """Yield where the bundle goes: a temporary folder, gone on failure, if `out` is None."""
    if out is not None:
        yield Path(out)
        return
    folder = Path(tempfile.mkdtemp(prefix="pcc-"))
    try:
        yield folder / "m.pcc"
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _circuit(job: Job) -> None:
    module = job.circuit.module()
    job.stages.append(("circuit", module))
    job.say("passes over the circuit")
    job.stages.append(("optimised", job.run("circuit", module, circuit_pipeline())))
    # Folding sums into sums or tables keeps p(x), but not the largest term of p(x).
    same = all(
        r.name not in ("sum-collapse", "fold-leaf-sums") or not r.changed
        for r in job.manager.records
    )
    if not same:
        kept = job.run("circuit-max", module, circuit_pipeline(maximise=True))
        job.stages.append(("optimised-max", kept))


def query_module(circuit: Circuit, root: Op, query: str) -> tuple[Module, tuple[Input, ...]]:
    """Return the module that asks `query` of a circuit, and the graph's inputs in order."""
    discrete = all(circuit.cards)
    if QUERIES[query].finite and not discrete:
        raise PccError("E132", f"'{query}' needs every variable to be finite")
    if query == "draft" and circuit.n < 2:
        raise PccError("E134", "'draft' needs at least two variables")
    slots = len(slots_of(root, query))
    asked = query_inputs(query, circuit.n, slots, "i64" if discrete else "f32")
    card = max(circuit.cards, default=0) or 1
    args = tuple(asked.values())
    outs = tuple((o, Query(root, args, query, o, card)) for o, _, _ in QUERIES[query].outputs)
    params = [n for n in postorder(root) if isinstance(n, Input)]
    return Module(query, circuit.cards, outs), (*args, *params)


def _query(job: Job, query: str, *, required: bool) -> None:
    job.say(f"query '{query}'")
    root = job.root(query)
    try:
        module, _ = query_module(job.circuit, root, query)
        job.modules[query] = job.run(query, module, tensor_pipeline())
    except PccError as e:
        if required or e.code not in ("E132", "E133", "E134"):
            raise
        job.of += [query] * (len(job.manager.records) - len(job.of))
        job.unsupported[query] = e.what


def _write(job: Job, folder: Path, parameters: str) -> dict[str, Any]:
    from pcc.backends.onnx.lower import lower, onnx_name
    from pcc.backends.onnx.weights import save_models
    from pcc.samples import write_samples

    models: dict[str, Any] = {}
    specs: dict[str, Any] = {}
    for q, module in job.modules.items():
        root = job.root(q)
        _, inputs = query_module(job.circuit, root, q)
        job.say(f"graph '{q}'")
        doc = {"pcc.query": q, "pcc.circuit": job.circuit.name}
        models[q] = lower(module, opset=job.opset, inputs=inputs, doc=doc)
        names = {i.key for i in inputs}
        specs[q] = {
            "graph": f"graphs/{q}.onnx",
            "inputs": [_io(i.key, i) for i in inputs],
            "outputs": [{**_io(o, v), "onnx": onnx_name(o, names)} for o, v in module.outputs],
            "nodes": len(models[q].graph),
        }
        if slots := slots_of(root, q):
            listed = [{"role": s.role, "layer": s.layer, "index": s.index} for s in slots]
            specs[q]["random"] = {"slots": listed}
        if q == "mode":
            specs[q]["exact"] = _deterministic(root)
    graphs, irs = folder / "graphs", folder / "ir"
    graphs.mkdir()
    irs.mkdir()
    save_models(models, graphs)
    stages = [*job.stages, *((f"tensor-{q}", m) for q, m in job.modules.items())]
    for i, (name, module) in enumerate(stages):
        (irs / f"{i:02d}-{name}.pcir").write_text(text.show(module))
    arrays: dict[str, Any] = {}
    for _, module in stages:
        arrays.update(resources(module))
    if arrays:
        from safetensors.numpy import save

        (irs / "arrays.safetensors").write_bytes(save(arrays))
    job.say("samples")
    measured = write_samples(job.circuit, job.modules, specs, folder)
    return write_manifest(folder, _manifest(job, specs, measured, parameters))


def _manifest(
    job: Job, specs: dict[str, Any], measured: dict[str, float], parameters: str
) -> dict[str, Any]:
    circuit, module = job.circuit, job.stages[0][1]
    return {
        "producer": f"pcc {pcc.__version__}",
        "opset": job.opset,
        "circuit": {
            "name": circuit.name, "kind": circuit.kind, "n": circuit.n, "r": circuit.rank,
            "V": max(circuit.cards, default=0), "cards": list(circuit.cards),
            "structure_hash": structure_hash(module),
            "content_hash": hashlib.sha256(text.show(module).encode()).hexdigest(),
            "parameters": parameters if circuit.inputs() else "trained",
        },
        "vocabulary": {"byte_offset": None, "bos": None, "eos": [], "pad": None, "special": []},
        "verifier": None,
        "kv": None,
        "queries": specs,
        "unsupported": job.unsupported,
        "precision": {"default": "fp32"},
        # null: measured, but not finite (a draw that rounding moved to another value)
        "numerics": {"max_abs_error": {q: e if math.isfinite(e) else None
                                       for q, e in measured.items()},
                     "runtime": _runtime() if measured else None},
        "variants": [{"provider": "any", "format": "onnx", "gpu": None,
                      "onnxruntime": f">={RUNTIME_OF_OPSET[job.opset]}"}],
        "passes": [
            {"name": r.name, "of": of, "changed": r.changed,
             "nodes_before": r.before, "nodes_after": r.after,
             "ms": round(r.ms, 3), "check_ms": round(r.check_ms, 3), "error": r.error}
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


def _io(name: str, n: Op) -> dict[str, Any]:
    kind = tensor(n)
    batch = {"b": ["B"], "c": ["Bc"], "": []}[kind.batch]
    return {"name": name, "dtype": kind.dtype, "shape": [*batch, *kind.shape]}


def _deterministic(root: Op) -> bool:
    """Whether max-product is the true maximum: proved only where no sum has a choice."""
    sums = [n for n in postorder(root) if isinstance(n, c.Sum | c.Mix | c.Tucker | c.Cpt | c.Cp)]
    return not any(_choices(n) > 1 for n in sums)


def _choices(n: Op) -> int:
    weights = n.ws if isinstance(n, c.Cp) else (n.w,)  # type: ignore[attr-defined]
    return max(int(np.prod(tensor(w).shape[2:])) for w in weights)
