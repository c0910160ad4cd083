"""The generation part of a bundle: verifier and head in one graph per round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcc import knobs
from pcc.bundle import sha256
from pcc.circuit.circuit import Circuit
from pcc.emission import Emission, Part
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.frontends.provenance import backbone_of
from pcc.ir.core import tensor
from pcc.models.base import Model, StateSpec
from pcc.models.divided import PASS, halves
from pcc.models.load import load_model
from pcc.models.proposal import ff_from_heads
from pcc.models.step import StepGraph, StepOptions, Steps
from pcc.passes.manager import Manager
from pcc.shapes import Synthetic
from pcc.tensor.ops import Const, Input

EXTRAS = ("margin", "log_probs")  # outputs that every engine has


@dataclass(frozen=True)
class Generation:
    """What a compilation with a verifier adds: the graphs and what the runtime must know."""

    model: Model
    graphs: dict[str, StepGraph]
    manifest: dict[str, Any]
    vocabulary: dict[str, Any]
    verifier: dict[str, Any]
    parts: Callable[[str], tuple[Part, ...]]  # of a graph by name


@dataclass(frozen=True)
class Request:
    """A verifier, a folder or a shape with random weights, and the choices of `compile`."""

    folder: Path | Synthetic
    max_seq: int
    chunk: int = knobs.PREFILL_CHUNK
    proposal: str = knobs.PROPOSAL
    draft_mode: str = knobs.DRAFT_MODE
    lora: Path | None = None
    precision: str = "fp32"
    int8: bool = False  # the matrices of its layers
    static: bool = False  # one size of buffers
    truncation: bool = True  # settings of the draft's law

    def __post_init__(self) -> None:
        for name, least in (("max_seq", 2), ("chunk", 1)):
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, int) or not least <= v <= knobs.MAX_SEQ:
                what = f"{name}={v!r} is not in {least} .. {knobs.MAX_SEQ}"
                raise PccError("M150", what)

    def read(self, n: int) -> Model:
        """Read the verifier for windows of `n` tokens."""
        rows = self.max_seq + max(n, self.chunk)
        return load_model(self.folder, max_rows=rows, lora=self.lora,
                          precision=self.precision, int8=self.int8)  # fmt: skip


def own_heads(request: Request) -> Circuit:
    """Return the fully factorised circuit of a verifier's own prediction heads (slot 1: head 0)."""
    plain = replace(request, precision="fp32", int8=False)
    heads = getattr(plain.read(1), "heads", None)
    if not isinstance(heads, Const) or heads.value.shape[0] < 2:
        raise PccError(
            "M153",
            "the verifier has no prediction heads of its own to draft with",
            at=str(request.folder),
            hint="give a checkpoint of a head",
        )
    return ff_from_heads(heads.value.value, "own-heads")


def build(
    request: Request, circuit: Circuit, manager: Manager, say: Callable[[str], None]
) -> Generation:
    """Build every graph of generation. Raises M1xx where head and verifier do not match."""
    if circuit.n < 2:
        raise PccError("M151", "drafting needs a window of two or more tokens")
    say("reading the verifier")
    model = request.read(circuit.n)
    options = StepOptions(request.proposal, request.draft_mode, request.truncation, EXTRAS,
                          maps=request.static)  # fmt: skip
    rows = request.max_seq + max(circuit.n, request.chunk)
    work = Steps(model, circuit, rows, options, manager)
    graphs: dict[str, StepGraph] = {}
    for name, make in _makers(work, request.chunk).items():
        say(f"graph '{name}'")
        graphs[name] = make()
    verifier = {
        "kind": type(model).__name__,
        "config_hash": _config_hash(request.folder),
        "draft_layers": len(getattr(model, "draft", None) or ()),
        "trained_with_head": _trained_together(request, say),
    }
    if isinstance(request.folder, Synthetic):
        verifier["synthetic"] = {"shape": request.folder.shape, "seed": request.folder.seed}
    return Generation(
        model, graphs, _manifest(request, circuit, model, graphs), _ids(model), verifier,
        lambda name: _divided(work, request.chunk, name, graphs[name]),
    )  # fmt: skip


def _makers(work: Steps, chunk: int) -> dict[str, Callable[[], StepGraph]]:
    """Return what makes each graph, by name."""
    return {
        "step": work.step,
        "step_greedy": work.step_greedy,
        "prefill": lambda: work.prefill(chunk),
        "prefill_greedy": lambda: work.prefill_greedy(chunk),
        "verify": lambda: work.verify(work.n),
        "decode": lambda: work.verify(1, "decode"),
    }


def _divided(work: Steps, chunk: int, name: str, whole: StepGraph) -> tuple[Part, ...]:
    """Return a graph as the verifier's pass and what follows it."""
    ids = whole.inputs[0]  # the window, or a piece of a prompt
    passed, (count,) = work.passed(tensor(ids).shape[0]), tensor(ids).shape
    follows = _makers(work.following(), chunk)[name]()
    cut = halves(passed.module, whole.module, follows.module)
    first = Emission(passed.module, passed.inputs)
    parts = [Part(PASS, count, first, {"input_ids": ids.key, **cut.given})]
    if cut.follows is not None:
        read = set(cut.follows.nodes())
        known = (*follows.inputs, *(n for n in cut.follows.nodes() if isinstance(n, Input)))
        inputs = tuple(i for i in dict.fromkeys(known) if i in read)
        parts.append(Part(name, count, Emission(cut.follows, inputs), cut.given))
    return tuple(parts)


def _trained_together(request: Request, say: Callable[[str], None]) -> str:
    """Return whether the head names this verifier as the one that it was trained on."""
    found = "unknown"
    if request.lora is not None and isinstance(request.folder, Path):
        found = backbone_of(request.lora, request.folder)
    if found == "differs":
        say(
            "warning: the head was trained on another verifier than this one: what is emitted "
            "stays the verifier's, but few drafts will be accepted"
        )
    return found


def _manifest(
    request: Request, circuit: Circuit, model: Model, graphs: dict[str, StepGraph]
) -> dict[str, Any]:
    most = request.max_seq + max(circuit.n, request.chunk)
    sizes, rows = [], knobs.FIRST_BUCKET
    while rows < most and not request.static:
        sizes.append(rows)
        rows *= 2
    states = model.states(most)
    return {
        "n": circuit.n,
        "vocab": model.vocab,
        "width": model.width,
        "max_seq": request.max_seq,
        "chunk": request.chunk,
        "proposal": request.proposal,
        "draft_mode": request.draft_mode,
        "states": [_state(s, most) for s in states],
        "buckets": [
            {"rows": r, "states": {s.name: list(s.shape) for s in model.states(r)}}
            for r in (*sizes, most)
        ],
        "random": {q: [[s.role, i] for i, s in _numbered(g)] for q, g in graphs.items() if g.slots},
        "chat_template": _chat_template(request.folder),
    }


def _state(s: StateSpec, rows: int) -> dict[str, Any]:
    # A cache with fewer rows than positions (a ring, summaries) cannot be rolled back by length.
    ring = s.rows_axis is not None and s.shape[s.rows_axis] < rows
    return {
        "name": s.name, "dtype": s.dtype, "shape": list(s.shape), "rows_axis": s.rows_axis,
        "ring": ring,
    }  # fmt: skip


def _numbered(g: StepGraph) -> list[tuple[int, Any]]:
    """Number the uniforms of each role: the `slot` of their Philox counters."""
    seen: dict[str, int] = {}
    out = []
    for s in g.slots:
        out.append((seen.get(s.role, 0), s))
        seen[s.role] = seen.get(s.role, 0) + 1
    return out


def _ids(model: Model) -> dict[str, Any]:
    v = model.vocabulary
    return {
        "byte_offset": v.byte_offset, "bos": v.bos, "eos": list(v.eos), "pad": v.pad,
        "special": list(v.special),
    }  # fmt: skip


def _chat_template(folder: Path | Synthetic) -> str | None:
    """Return the Jinja text beside the model, if there is one; it is not run here.

    Either a file of its own or an entry of `tokenizer_config.json`: older folders have the latter.
    """
    import json

    if isinstance(folder, Synthetic):
        return None
    own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return read_bounded(own, knobs.MAX_CONFIG_BYTES, "M152").decode("utf-8", "replace")
    if not path.is_file():
        return None
    try:
        settings = json.loads(read_bounded(path, knobs.MAX_CONFIG_BYTES, "M152").decode("utf-8"))
        template = settings.get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        raise PccError("M152", "the tokenizer's configuration is not JSON", at=str(path)) from None
    return template if isinstance(template, str) else None


def _config_hash(folder: Path | Synthetic) -> str:
    """Return the SHA-256 of the verifier's configuration file."""
    if isinstance(folder, Synthetic):
        return folder.config_hash
    found = [p for p in (folder / "config.json", folder / "config.yaml") if p.is_file()]
    return sha256(found[0]) if found else ""
