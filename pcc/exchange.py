"""`refit`: another head, or other trained numbers, in the engines of a bundle: nothing is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcc.bundle import read_manifest
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.driver import Artifact, Progress, compile
from pcc.errors import PccError
from pcc.runtime.contract import check_generation
from pcc.variants import variant_of


def refit(
    bundle: str | Path,
    head: str | Path | Circuit | None = None,
    verifier: str | Path | None = None,
    out: str | Path | None = "m.pcc",
    *,
    validate: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    **frontend: Any,
) -> Artifact:
    """Write a bundle with the engines of `bundle` and the numbers of `head` (and `verifier`).

    The bundle must have been compiled for TensorRT with `engine={"refit": "refit"}`, and the head
    must be of the same shapes: every graph is written anew and compared with the earlier one, of
    which only the values of float constants may differ. No GPU and no TensorRT is needed; engines
    are given their new weights when they are loaded. `verifier`: of a bundle that generates, which
    needs one; the same folder as before, or one trained further. `head=None`: the verifier's own
    prediction heads. `frontend`: how a checkpoint is read, `step` and `hmm_bias`, as of `compile`;
    the manifest does not hold them, so they are given again.

    Errors: B210 to B215 where the bundle is damaged or has no TensorRT engines, E437 where the
    plans cannot be used, E438 where something is missing, and `compile`'s.
    """
    manifest = read_manifest(Path(bundle))
    how = choices(manifest, str(bundle))
    generates = manifest["generation"] is not None
    if generates and verifier is None:
        raise PccError("E438", "the bundle generates: its verifier's folder is needed",
                       at=str(bundle), hint="give --verifier MODEL_DIR")  # fmt: skip
    if not generates and verifier is not None:
        raise PccError("E438", "the bundle has no verifier", at=str(bundle))
    return compile(
        head, verifier=verifier, out=out, validate=validate, force=force, progress=progress,
        engine={"plans": str(bundle)}, **how, **frontend,
    )  # fmt: skip


def choices(manifest: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Return the arguments of `compile` that a bundle was made with, but for what it was made of.

    Where one cannot be told from the manifest, the graphs will differ, and that is found.
    `manifest`: as `read_manifest` gives it. Errors: B215 where it does not say what is needed.
    """
    queries, stored = manifest["queries"], manifest.get("precision")
    target, precision = manifest.get("target"), variant_of(manifest, at).get("precision")
    good = isinstance(target, str) and isinstance(precision, str) and isinstance(stored, dict)
    if not good or not queries:
        what = "the manifest does not say of which target, precision and queries it is"
        hint = "it is damaged, or was not written by pcc"
        raise PccError("B215", what, at=at, hint=hint)
    assert isinstance(stored, dict)
    out: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "batch": next(iter(queries.values())).get("batch", 1),
        "queries": [q for q in queries if q in QUERIES] or None,
        "parameters": "logits" if manifest["circuit"]["parameters"] == "logits" else "context",
        "window": manifest["circuit"]["n"],
    }
    integers = {part for part in ("head", "verifier") if str(stored.get(part)).endswith("+int8")}
    if integers:
        out["int8"] = "all" if len(integers) == 2 else integers.pop()
    if manifest["generation"] is not None:
        generation = check_generation(manifest, at)
        out |= {k: generation[k] for k in ("max_seq", "chunk", "proposal", "draft_mode")}
        inputs = {i["name"] for i in queries["step"]["inputs"]}
        out["truncation"] = "draft_temperature" in inputs
    return out
