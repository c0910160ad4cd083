"""`pcc opt`: passes over a `.pcir` file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcc.cli.output import say
from pcc.errors import PccError


def opt(
    file: Annotated[Path, typer.Argument(help=".pcir file.")],
    passes: Annotated[
        str, typer.Option("-p", "--passes", help="e.g. 'canonicalize,fold-leaf-sums{grow=2},dce'")
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", help="Write here, not to stdout.")] = None,
    dump_after_change: Annotated[Path | None, typer.Option(help="Folder for IR dumps.")] = None,
    explain: Annotated[list[str] | None, typer.Option(help="Say what a pass did, and why.")] = None,
    time_passes: Annotated[bool, typer.Option(help="Print times on stderr.")] = False,
    stop_after: Annotated[str, typer.Option(help="Stop after this pass.")] = "",
    reproducers: Annotated[Path, typer.Option(help="Folder for failing cases.")] = Path("."),
    validate: Annotated[bool, typer.Option(help="Check every pass.")] = True,
) -> None:
    """Run passes over a .pcir file (default: those that `compile` runs over a circuit)."""
    from pcc.circuit import text
    from pcc.ir.verify import verify
    from pcc.passes.manager import Manager
    from pcc.passes.pipelines import circuit_pipeline
    from pcc.passes.registry import parse_pipeline

    pipeline = parse_pipeline(passes) if passes else circuit_pipeline()
    names = [p.name for p in pipeline]
    for asked in (*(explain or ()), *([stop_after] if stop_after else ())):
        if asked not in names:
            raise PccError("C102", f"pass {asked!r} does not run", hint=f"these do: {names}")
    module = text.load(file)
    verify(module)
    manager = Manager(
        validate=validate, dump=dump_after_change, stop_after=stop_after, reproducers=reproducers
    )
    module = manager.run(module, pipeline)
    for r in manager.records:
        if time_passes:
            change = f"{r.before} -> {r.after} nodes" if r.changed else "unchanged"
            say(f"{r.name:20} {r.ms:8.1f} ms  check {r.check_ms:8.1f} ms  {change}")
        if explain and r.name in explain:
            for line in r.notes or ("no candidate",):
                say(f"{r.name}: {line}")
    if out is not None:
        text.save(module, out)
        return
    print(text.show(module), end="")
    if text.resources(module):
        say("arrays are named by hash only: -o FILE writes them beside the text")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(opt)
