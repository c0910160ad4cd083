"""Options of the commands that read a head from a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Step = Annotated[int | None, typer.Option(help="Checkpoint step (default: newest).")]
HmmBias = Annotated[
    list[str] | None,
    typer.Option(help="Unknown tensor to add to sum logits: NAME or NAME=LAYER (repeatable)."),
]


def reading(step: int | None, hmm_bias: list[str] | None) -> dict[str, Any]:
    """Return the options of the frontend that are given: absent ones are not passed on."""
    out: dict[str, Any] = {}
    if step is not None:
        out["step"] = step
    if hmm_bias:
        out["hmm_bias"] = _biases(hmm_bias)
    return out


def _biases(given: list[str]) -> Any:
    """Return the names, or a map from name to sum layers if any is given as NAME=LAYER."""
    parts = [g.rpartition("=") for g in given]
    if not any(eq and layer.isdecimal() for _, eq, layer in parts):
        return given
    layers: dict[str, list[int]] = {}
    for text, (name, eq, layer) in zip(given, parts, strict=True):
        if not (eq and name and layer.isdecimal() and len(layer) < 7):
            raise typer.BadParameter(f"{text!r}: give NAME=LAYER for each, or for none")
        layers.setdefault(name, []).append(int(layer))
    return layers
