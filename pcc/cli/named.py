"""Which options a command line names: defaults are not given, the same values written out are."""

from __future__ import annotations

import typer


def named(ctx: typer.Context) -> list[str]:
    """Return the parameters of a command that were named, whatever their values."""
    return [name for name in ctx.params if _source(ctx, name) == "COMMANDLINE"]


def _source(ctx: typer.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    return "" if source is None else source.name
