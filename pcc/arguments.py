"""What `compile` is given: types, ranges, words, and options that nothing would read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pcc import knobs
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.errors import PccError
from pcc.models.proposal import GREEDY_KINDS, KINDS
from pcc.targets import Target, int8_of

PATH = (str, Path, NoneType)
TYPES: Mapping[str, tuple[type, ...]] = {
    "source": (*PATH, Circuit), "verifier": PATH, "out": PATH, "window": (int, NoneType),
    "max_seq": (int,), "opset": (int, NoneType), "chunk": (int,), "batch": (int,),
    "gpu": (str, NoneType), "engine": (dict, NoneType), "truncation": (bool, NoneType),
    "validate": (bool,), "force": (bool,),
}  # fmt: skip

# Options that only some bundles read, with their defaults: those that generate, and `seed`: those
# with random weights.
GENERATION: Mapping[str, Any] = {
    "max_seq": knobs.SEQUENCE, "chunk": knobs.PREFILL_CHUNK, "proposal": knobs.PROPOSAL,
    "draft_mode": knobs.DRAFT_MODE, "truncation": None,
}  # fmt: skip
USUAL: Mapping[str, Any] = {**GENERATION, "seed": knobs.SEED}


def typed(**arguments: object) -> None:
    """Refuse arguments of other types, and sizes below 1. Errors: E148, M150."""
    for name, v in arguments.items():
        kinds = TYPES[name]
        right = isinstance(v, kinds) and (bool in kinds or not isinstance(v, bool))
        if not right or (isinstance(v, int) and bool not in kinds and v < 1):
            known = ", ".join(k.__name__ for k in kinds if k is not NoneType)
            hint = "a positive int" if int in kinds else f"one of {known}"
            code = "M150" if name in ("max_seq", "chunk") else "E148"
            raise PccError(code, f"{name}={str(v)[:60]!r} ({type(v).__name__})", hint=hint)


def worded(parameters: str, queries: Sequence[str] | None, proposal: str, draft_mode: str) -> None:
    """Refuse words that mean nothing, read or not. Errors: E141, E142, E148, M142."""
    if parameters not in ("context", "logits"):
        what = f"parameters={str(parameters)[:60]!r} is not supported"
        raise PccError("E141", what, hint="context or logits")
    if isinstance(queries, str) or not isinstance(queries, Iterable | None):
        raise PccError("E148", f"queries={str(queries)[:60]!r}", hint="a list of names")
    for q in queries or ():
        if not isinstance(q, str) or q not in QUERIES:
            raise PccError("E142", f"unknown query {q!r}", hint=f"one of {', '.join(QUERIES)}")
    for name, word, known in (
        ("proposal", proposal, KINDS), ("draft_mode", draft_mode, GREEDY_KINDS),
    ):  # fmt: skip
        if word not in known:
            hint = f"one of {', '.join(known)}"
            raise PccError("M142", f"{name}={str(word)[:60]!r}", hint=hint)


def fitting(
    target: Target, batch: int, gpu: str | None, engine: Mapping[str, Any] | None
) -> None:  # fmt: skip
    """Refuse options that a target has no use for. Errors: E141."""
    if engine and target.format != "tensorrt":
        raise PccError("E141", f"target {target.name!r} has no engine options")
    if gpu is not None and not gpu.strip():
        raise PccError("E180", "gpu='' names no architecture", hint="like sm_90, or leave it out")
    if gpu is not None and target.format == "onnx":
        what = f"target {target.name!r} is not built for an architecture, as gpu={gpu[:40]!r} asks"
        raise PccError("E141", what, hint="leave gpu out: its graphs run on any")
    if batch > (knobs.MAX_BATCH if target.static else 1):
        what = f"batch={batch} is not supported by target {target.name!r}"
        hint = f"at most {knobs.MAX_BATCH}" if target.static else "its graphs take any batch"
        raise PccError("E141", what, hint=hint)


def integers(
    target: Target, precision: str, int8: str | None, drafts: tuple[str, str], *, verifier: bool
) -> tuple[bool, bool]:
    """Return whether head and verifier are stored in 8-bit integers. Errors: E141."""
    found = int8_of(target, precision, int8)
    if found[0] and "latent-first" in drafts:
        what = "latent-first drafts read single rows of the head's matrices, not their products"
        raise PccError("E141", what, hint="compile with int8='verifier', or another draft")
    if found[1] and not verifier:
        raise PccError("E141", f"int8={int8!r}: there is no verifier", hint="int8='head'")
    return found


def given(**options: object) -> list[str]:
    """Return which options of `USUAL` have another value than the default."""
    return [name for name, v in options.items() if v != USUAL[name]]


def refuse_unread(names: Collection[str], *, verifier: bool, shape: bool) -> None:
    """Refuse options, by name, that nothing would read. Errors: E145, M162.

    `verifier`: whether the bundle generates. `shape`: whether its weights are random.
    """
    unread = [name for name in GENERATION if name in names and not verifier]
    if unread:
        what = f"{', '.join(unread)}: only a bundle that generates has such an option"
        raise PccError("E145", what, hint="give a verifier, or leave it out")
    if "seed" in names and not shape:
        what = "a seed is of random weights, and there is no shape"
        raise PccError("M162", what, hint="--shape NAME --seed S")
