"""`pcc refit`: other trained numbers in the engines of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pcc
from pcc.cli.bundles import Bundle, present
from pcc.cli.checkpoints import HmmBias, Step, reading
from pcc.cli.output import Json, progress


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
    done = f"refitted in {artifact.seconds:.2f} s; nothing was built"
    present(artifact, done, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command("refit")(refit_command)
