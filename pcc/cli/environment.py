"""`pcc doctor`: what this machine has and lacks."""

from __future__ import annotations

import typer

from pcc.cli.output import Json, emit, table


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and how to get it; exit 3 if a needed part is."""
    from pcc.environment import examine

    findings = examine()
    if as_json:
        emit([vars(f) for f in findings])
    else:
        rows = [[f.name, f.version or "-", f.state, f.remedy] for f in findings]
        table("environment", ["part", "version", "state", "remedy"], rows)
    raise typer.Exit(3 if any(f.required and f.state != "ok" for f in findings) else 0)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(doctor)
