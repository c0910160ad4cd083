"""`pcc refit`: other trained numbers in the engines of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pcc
from pcc.cli.bundles import Bundle, describe
from pcc.cli.checkpoints import HmmBias, Step, reading
from pcc.cli.output import Json, emit, progress


def refit_command(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write.")],
    head: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder or .pcir file; none: the verifier's own heads."),
    ] = None,
    verifier: Annotated[
        Path | None, typer.Option(help="Model folder, where the bundle generates.")
    ] = None,
    step: Step = None,
    hmm_bias: HmmBias = None,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    validate: Annotated[bool, typer.Option(help="Check every pass.")] = True,
    as_json: Json = False,
) -> None:
    """Write a bundle for another head of the same shapes, with the TensorRT engines of this one."""
    how = reading(step, hmm_bias)
    artifact = pcc.refit(
        bundle, head, verifier, out, validate=validate, force=force, progress=progress, **how
    )
    if as_json:
        emit({"path": str(artifact.path), "seconds": artifact.seconds, **artifact.manifest})
        return
    describe(artifact.path, artifact.manifest)
    print(f"refitted in {artifact.seconds:.2f} s; nothing was built")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command("refit")(refit_command)
