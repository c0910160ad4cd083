"""Scenarios of published checkpoints: a folder of them, with the models that they name beside."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pcc.conformance.scenarios import EVERY, Scenario, given
from pcc.errors import PccError
from pcc.frontends.state import lookup, read_config

MODEL = "lm.model.from_huggingface"  # in config.yaml: the verifier, none where it is in there too
MOST = 1000  # checkpoints of a folder


def published(folder: Path) -> tuple[Scenario, ...]:
    """Return a scenario for each checkpoint in a folder, by the checkpoint's name.

    The verifier is the folder there of the name's last part ("hub/EvaByte" is `folder/EvaByte`).
    Errors: C144 where there is none, or more than `MOST`; F102, F103 for its configuration.
    """
    try:
        found = sorted(p.parent for p in folder.glob("*/config.yaml"))
    except OSError as e:
        raise PccError("C144", f"cannot list it: {e.strerror}", at=str(folder)) from None
    if not found:
        hint = "each is a folder with config.yaml and its weights"
        raise PccError("C144", "there are no checkpoints in it", at=str(folder), hint=hint)
    if len(found) > MOST:
        what = f"{len(found)} checkpoints are too many (limit {MOST})"
        raise PccError("C144", what, at=str(folder), hint="name a folder with fewer")
    return tuple(_scenario(folder, head) for head in found)


def _scenario(folder: Path, head: Path) -> Scenario:
    name = lookup(read_config(head / "config.yaml"), MODEL, at=str(head))
    verifier = head
    if name is not None:
        verifier = folder / PurePosixPath(str(name)).name
        if not (verifier / "config.json").is_file():
            what = f"the model that it names is not beside it: {str(name)[:60]!r}"
            raise PccError("C144", what, at=str(head), hint="put the model's folder there")
    return Scenario(head.name, given(head, verifier).make, precisions=EVERY, batches=(1, 2, 3, 4))
