"""`compile`: from a source to a bundle."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pcc import arguments, knobs
from pcc.bundle import staged
from pcc.circuit import text
from pcc.circuit.circuit import Circuit
from pcc.circuit.ops import CircuitOp
from pcc.circuit.queries import QUERIES, Query, query_inputs
from pcc.emission import Emission, Order
from pcc.errors import PccError
from pcc.generation import Request, build, own_heads
from pcc.ir.core import Op, postorder
from pcc.ir.module import Module
from pcc.ir.places import fresh
from pcc.package import write
from pcc.passes.manager import Manager, Pass, Record
from pcc.passes.pipelines import circuit_pipeline, storage_pipeline, tensor_pipeline
from pcc.passes.to_tensor import slots_of
from pcc.shapes import Synthetic, synthetic
from pcc.targets import HALF_OF, Target, target_of
from pcc.tensor.ops import Input, ScaledContract

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
    target: Target
    say: Progress
    precision: str = "fp32"
    batch: int = 1
    gpu: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    int8: tuple[bool, bool] = (False, False)  # of the head, of the verifier
    of: list[str] = field(default_factory=list)  # what each record of the manager is about
    stages: list[tuple[str, Module]] = field(default_factory=list)
    emissions: dict[str, Emission] = field(default_factory=dict)
    generation: dict[str, Any] | None = None  # what the manifest says of the verifier
    unsupported: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, module: Module, pipeline: Sequence[Pass]) -> Module:
        """Run a pipeline, and remember that its records are about `name`."""
        module = self.manager.run(module, pipeline)
        self.of += [name] * (len(self.manager.records) - len(self.of))
        return module

    def order(self) -> Order:
        """Return what the target's writer is to write."""
        return Order(self.circuit.name, self.emissions, self.target, self.precision, self.batch,
                     self.gpu, self.engine)  # fmt: skip

    def precisions(self) -> dict[str, str]:
        """Return the manifest's precision map: in what each part is stored; results are fp32."""
        head = self.circuit.module()
        parts = ["head"] * (head.stored != "f32")
        parts += ["verifier", "states"] * bool(self.generation)
        out = {} if self.precision == "fp32" else dict.fromkeys(parts, self.precision)
        integers = (_in_integers(head), self.int8[1])
        for part, there in zip(("head", "verifier"), integers, strict=True):
            if there:
                out[part] = f"{self.precision}+int8"
        return {"default": "fp32", **out}

    def root(self, query: str) -> Op:
        """Return the optimised circuit that a query is asked of."""
        stages = dict(self.stages)
        name = "optimised-max" if query == "mode" and "optimised-max" in stages else "optimised"
        return stages[name].roots[0]


def load_source(source: str | Path | Circuit | None, **options: Any) -> Circuit:
    """Return the circuit of a `.pcir` file, an MTPC checkpoint folder, or itself."""
    if source is None:
        raise PccError("E140", "there is no source", hint="only a verifier may come without one")
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
    source: str | Path | Circuit | None,
    verifier: str | Path | None = None,
    queries: Sequence[str] | None = None,
    target: str = "onnx",
    precision: str = "fp32",
    max_seq: int = knobs.SEQUENCE,
    window: int | None = None,
    out: str | Path | None = "m.pcc",
    *,
    parameters: str = "context",
    opset: int | None = None,
    batch: int = 1,
    gpu: str | None = None,
    engine: Mapping[str, Any] | None = None,
    int8: str | None = None,
    validate: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    chunk: int = knobs.PREFILL_CHUNK,
    proposal: str = knobs.PROPOSAL,
    draft_mode: str = knobs.DRAFT_MODE,
    truncation: bool | None = None,
    shape: str | None = None,
    head: str | None = None,
    seed: int = knobs.SEED,
    **frontend: Any,
) -> Artifact:
    """Compile a circuit to a bundle of graphs for a target, one per query, over one weight file.

    `queries=None` compiles every query that the circuit supports and lists the others in the
    manifest with the reason. `window` drafts fewer variables: the later ones are summed out.
    `parameters="logits"` takes the circuit's logits as inputs instead of a context. `out=None`
    writes to a temporary folder. Raises `PccError`; nothing is left behind on failure.

    `target` is a name of `pcc.targets`; targets for GPUs have graphs of fixed shapes, for `batch`
    rows, and engines for the architecture `gpu` ("sm_90", target cuda also "sm_89:142"; None: the
    GPU that is present).
    `engine`: options of the target's own (docs/tensorrt.md).
    `precision` is "fp32", "fp16" or "bf16": in what large weights and caches are stored
    (docs/precision.md). `int8` is "head", "verifier" or "all": whose matrices are stored as 8-bit
    integers, with a scale for each output. `opset` is the target's unless given.

    With `verifier`, a model folder, the bundle also generates: `step`, `step_greedy`, `prefill`,
    `prefill_greedy`, `verify` and `decode` graphs for sequences of up to `max_seq` tokens, prompts
    read `chunk` tokens at a time. `source=None` drafts with the verifier's own prediction heads.
    `proposal` is "full" or "latent-first", `draft_mode` (greedy) "max-product",
    "stepwise" or "latent-first". `truncation`: whether sampled drafts take `draft_temperature` and
    `draft_top_p` (None: where the target's graphs can skip their cost).

    `shape` compiles a verifier of a published size with random weights from `seed` instead, and
    `head`, "KIND,n=N,r=R", a contextual head for it (docs/models.md); None: its own heads. Only
    the graphs of generation are made unless `queries` names others.
    """
    start = time.perf_counter()
    arguments.typed(source=source, verifier=verifier, max_seq=max_seq, window=window, out=out,
                    opset=opset, batch=batch, gpu=gpu, engine=engine, truncation=truncation,
                    chunk=chunk, validate=validate, force=force)  # fmt: skip
    arguments.worded(parameters, queries, proposal, draft_mode)
    chosen = target_of(target, precision, opset)
    arguments.fitting(chosen, batch, gpu, engine)
    random = synthetic(shape, head, seed, source, verifier)
    generates = random is not None or verifier is not None
    integers = arguments.integers(chosen, precision, int8, (proposal, draft_mode),
                                  verifier=generates)  # fmt: skip
    options: dict[str, Any] = {
        "max_seq": max_seq, "chunk": chunk, "proposal": proposal, "draft_mode": draft_mode,
    }  # fmt: skip
    given = arguments.given(**options, truncation=truncation, seed=seed)
    arguments.refuse_unread(given, verifier=generates, shape=random is not None)
    if random is not None:
        source, queries = random.head(head) if head else None, queries or ()
    options |= {"precision": precision, "int8": integers[1], "static": chosen.static,
                "truncation": chosen.branches if truncation is None else truncation}  # fmt: skip
    request = _request(source, random or verifier, parameters, options)
    with _place(out, force) as folder, staged(folder, force=force) as work:
        circuit = _narrowed(_asked(source, request, frontend), window, parameters)
        job = Job(circuit, Manager(validate=validate), chosen, progress or (lambda _: None),
                  precision, batch, gpu or "", engine or {}, integers)  # fmt: skip
        manifest = _bundled(job, queries, request, work, parameters)
    return Artifact(folder, manifest, tuple(job.manager.records), time.perf_counter() - start)


def _bundled(
    job: Job, queries: Sequence[str] | None, request: Request | None, work: Path, parameters: str
) -> dict[str, Any]:
    """Make every graph and write the bundle; return its manifest."""
    layers = (n for n in job.circuit.module().nodes() if isinstance(n, CircuitOp))
    with fresh(layers):  # graphs name layers of this circuit, whatever else is alive
        _graphs(job, queries, request)
        return write(job, work, parameters)


def _request(
    source: object,
    verifier: str | Path | Synthetic | None,
    parameters: str,
    options: Mapping[str, Any],
) -> Request | None:
    """Return what is asked of the verifier; LoRA adapters are those of the source checkpoint."""
    if verifier is None:
        return None
    if parameters != "context":
        raise PccError("E147", "with a verifier, the circuit's parameters come from its context")
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    lora = Path(str(source)) if is_folder else None
    place = verifier if isinstance(verifier, Synthetic) else Path(verifier)
    return Request(place, lora=lora, **options)


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


def _asked(
    source: str | Path | Circuit | None, request: Request | None, frontend: dict[str, Any]
) -> Circuit:
    """Return the circuit to compile: every input has a batch axis."""
    if source is None and request is not None:
        if frontend:
            raise PccError("E145", f"{', '.join(frontend)}: there is no checkpoint to read")
        circuit = own_heads(request)
    else:
        circuit = load_source(source, **frontend)
    for name, i in circuit.inputs().items():
        if not i.batch:
            raise PccError("E144", f"input {name!r} has no batch axis", at=i.loc)
    return circuit


def _narrowed(circuit: Circuit, window: int | None, parameters: str) -> Circuit:
    """Return a circuit of the first variables, or with logits as inputs, where that is asked."""
    if window is not None:
        from pcc.passes.restrict import restrict

        circuit = restrict(circuit, window)
    return circuit.with_logits() if parameters == "logits" else circuit


def _graphs(job: Job, queries: Sequence[str] | None, request: Request | None) -> None:
    """Run every pass, down to one module for each graph."""
    _circuit(job)
    only_generation = request is not None and isinstance(request.folder, Synthetic)
    for q in queries or (() if only_generation else QUERIES):
        _query(job, q, required=bool(queries))
    if request is not None:
        _generation(job, request)
    if not job.emissions:
        why = next(iter(job.unsupported.values()))
        raise PccError("E146", f"no query can be compiled: {why}")


def _circuit(job: Job) -> None:
    module = job.circuit.module()
    if storage := storage_pipeline(HALF_OF[job.precision], int8=job.int8[0]):
        module = job.run("circuit", module, storage)
        job.circuit = replace(job.circuit, root=module.roots[0], logits=())
    if job.int8[0] and not _in_integers(module):
        what = "no matrix of the head can become integers of 8 bits"
        hint = "compile with int8='verifier'" if job.int8[1] else "leave int8 out"
        raise PccError("E141", what, hint=f"they map a context to parameters; {hint}")
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


def _in_integers(module: Module) -> bool:
    return any(isinstance(n, ScaledContract) for n in module.nodes())


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


def _generation(job: Job, request: Request) -> None:
    before = len(job.manager.records)
    made = build(request, job.circuit, job.manager, job.say)
    job.of += ["generation"] * (len(job.manager.records) - before)
    for name, g in made.graphs.items():
        job.emissions[name] = Emission(
            g.module, g.inputs, g.slots, {} if job.target.static else g.symbols,
            partial(made.parts, name),
        )  # fmt: skip
    job.generation = {
        "vocabulary": made.vocabulary,
        "verifier": made.verifier,
        "kv": made.manifest["states"],
        "generation": made.manifest,
    }


def _query(job: Job, query: str, *, required: bool) -> None:
    job.say(f"query '{query}'")
    root = job.root(query)
    try:
        module, inputs = query_module(job.circuit, root, query)
        made = job.run(query, module, tensor_pipeline())
        job.emissions[query] = Emission(made, inputs, tuple(slots_of(root, query)))
    except PccError as e:
        if required or e.code not in ("E132", "E133", "E134"):
            raise
        job.of += [query] * (len(job.manager.records) - len(job.of))
        job.unsupported[query] = e.what
