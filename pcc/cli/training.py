"""`pcc train`: backbones and heads from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcc.cli.output import emit


def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration; docs/training.md has all.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, e.g. optim.steps=100.")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Train a backbone or a head; an interrupted run goes on from its newest state."""
    from pcc.train import cli

    emit(cli.run(config, change or (), progress=not quiet))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)
