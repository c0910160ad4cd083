"""`pcc opt`: passes over a `.pcir` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcc.cli.output import say
from pcc.errors import PccError

if TYPE_CHECKING:
    from pcc.passes.manager import Pass, Record


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
    any_order: Annotated[bool, typer.Option(help="Allow an order known to be wrong.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Run passes over a .pcir file (default: those that `compile` runs over a circuit)."""
    from pcc.circuit import text
    from pcc.ir.verify import verify
    from pcc.passes.manager import Manager

    pipeline = _pipeline(passes, [*(explain or ()), *([stop_after] if stop_after else ())],
                         any_order=any_order)  # fmt: skip
    beside = [p for p in (out, out and out.with_suffix(".safetensors")) if p and p.exists()]
    if beside and not force:
        hint = "another name, or --force"
        raise PccError("C112", "the output exists", at=str(beside[0]), hint=hint)
    module = text.load(file)
    verify(module)
    manager = Manager(
        validate=validate, dump=dump_after_change, stop_after=stop_after, reproducers=reproducers
    )
    module = manager.run(module, pipeline)
    _report(manager.records, explain or [], times=time_passes)
    if out is not None:
        text.save(module, out)
        return
    print(text.show(module), end="")
    if text.resources(module):
        say("arrays are named by hash only: -o FILE writes them beside the text")


def _pipeline(passes: str, asked: list[str], *, any_order: bool) -> tuple[Pass, ...]:
    """Return the passes to run, in an order that is known to work; `asked` must be among them."""
    from pcc.passes.pipelines import check, circuit_pipeline
    from pcc.passes.registry import parse_pipeline

    pipeline = parse_pipeline(passes) if passes else circuit_pipeline()
    names = tuple(p.name for p in pipeline)
    if not any_order:
        check(names)
    for name in asked:
        if name not in names:
            raise PccError("C102", f"pass {name!r} does not run", hint=f"these do: {list(names)}")
    return pipeline


def _report(records: list[Record], explain: list[str], *, times: bool) -> None:
    for r in records:
        if times:
            change = f"{r.before} -> {r.after} nodes" if r.changed else "unchanged"
            say(f"{r.name:20} {r.ms:8.1f} ms  check {r.check_ms:8.1f} ms  {change}")
        if r.name in explain:
            for line in r.notes or ("no candidate",):
                say(f"{r.name}: {line}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(opt)
