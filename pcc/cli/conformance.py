"""`pcc conformance`: whether a backend computes what the IR says, op by op and text by text."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcc.cli.engine_options import engine_options
from pcc.cli.named import named
from pcc.cli.output import say, table
from pcc.errors import PccError
from pcc.files import finite

if TYPE_CHECKING:
    from pcc.conformance.bundles import Setting
    from pcc.conformance.report import Finding
    from pcc.conformance.scenarios import Scenario

EVERY = 2.0  # seconds between reports of a run that is not complete: one that is cut off has some
SHOWN = 40  # findings that are not good, in the table; the JSON has all

Where = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, tensorrt, simulator (target cuda on the host), or build (runs nothing)."
    ),
]
Parts = Annotated[list[str] | None, typer.Option(help="ops, queries or protocol (repeatable).")]
Halves = Annotated[
    list[str] | None, typer.Option(help="Test ops on stored f16 or bf16 too (repeatable).")
]
Only = Annotated[
    list[str] | None, typer.Option(help="Circuits and verifiers named like this (repeatable).")
]
Verifier = Annotated[
    Path | None, typer.Option(help="Check the protocol on this model instead of tiny ones.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(help="Check the protocol on the published checkpoints in this folder."),
]
SaveExpected = Annotated[
    Path | None, typer.Option(help="Only write the CPU's texts to this file (.gz: packed).")
]
Expected = Annotated[
    Path | None, typer.Option(help="Compare with these texts instead of making them here.")
]
Engine = Annotated[
    list[str] | None,
    typer.Option(help="Of the target's build: NAME=VALUE, e.g. level=1 (repeatable)."),
]
Work = Annotated[
    Path | None, typer.Option(help="Keep what is compiled in this new or empty folder.")
]


def conformance(
    ctx: typer.Context,
    target: Annotated[str, typer.Option(help="What to compile to.")] = "onnx",
    provider: Where = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    part: Parts = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows (repeatable).")] = None,
    half: Halves = None,
    only: Only = None,
    verifier: Verifier = None,
    head: Annotated[Path | None, typer.Option(help="With --verifier: the head, if any.")] = None,
    checkpoints: Checkpoints = None,
    save_expected: SaveExpected = None,
    expected: Expected = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write a report.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Bundles compiled at a time.")] = 1,
    work: Work = None,
    engine: Engine = None,
) -> None:
    """Run the suite that every backend must pass; exit 1 if something differs, or nothing is equal.

    Without --part, all parts are run.
    """
    from pcc.conformance.asked import PARTS, check_setting
    from pcc.conformance.bundles import BUILD, Setting
    from pcc.conformance.suite import check, expectations
    from pcc.conformance.texts import read, write

    batches = tuple(dict.fromkeys(batch or (1, 3)))
    for path in (json_out, save_expected):
        _writable(path)
    if save_expected is not None:
        _alone(ctx)
        texts = expectations(say, batches, _scenarios(None, None, checkpoints))
        write(save_expected, texts)
        return
    scenarios = _scenarios(head, verifier, checkpoints)
    if expected is not None and provider == BUILD:
        raise PccError("C144", "--expected is not read where nothing is run", hint="leave it out")
    stored = None if expected is None else read(expected)
    setting = Setting(
        target, provider, precision, halves=tuple(half or ()), only=tuple(only or ()),
        engine=tuple(engine_options(engine).items()),
    )  # fmt: skip
    check_setting(setting)
    parts = tuple(dict.fromkeys(part)) if part else PARTS
    models = {"verifier": verifier, "checkpoints": checkpoints}
    run = _Run(setting, parts, batches, models, json_out)
    findings = check(setting, say, parts=parts, batches=batches, stored=stored, folder=work,
                     jobs=jobs, scenarios=scenarios)  # fmt: skip
    for f in findings:
        run.add(f)
    final = run.end()
    show(final, run.found)
    raise typer.Exit(0 if final["ok"] else 1)


def _alone(ctx: typer.Context) -> None:
    """Refuse what writing the CPU's texts does not read. Errors: C144."""
    for name in named(ctx):
        if name not in ("save_expected", "batch", "checkpoints"):
            option = "--json" if name == "json_out" else f"--{name.replace('_', '-')}"
            what = f"{option} is not read with --save-expected"
            raise PccError("C144", what, hint="leave it out")


class _Run:
    """What a run has found so far; every `EVERY` seconds its report is written, if one is asked."""

    def __init__(
        self, setting: Setting, parts: tuple[str, ...], batches: tuple[int, ...],
        models: Mapping[str, Path | None], file: Path | None,
    ) -> None:  # fmt: skip
        self.about = {
            "target": setting.target, "provider": setting.provider,
            "precision": setting.precision, "batches": batches, "parts": parts,
            "only": setting.only, "halves": setting.halves, "engine": dict(setting.engine),
            **{k: None if path is None else path.name for k, path in models.items()},
        }  # fmt: skip
        self.file = file
        self.found: list[Finding] = []
        self.began = self.written = time.perf_counter()

    def add(self, f: Finding) -> None:
        """Take a finding in."""
        self.found.append(f)
        if self.file is not None and time.perf_counter() > self.written + EVERY:
            _save(self.file, self._report(complete=False))
            self.written = time.perf_counter()

    def end(self) -> dict[str, Any]:
        """Return the report of the complete run, written if it is asked for."""
        report = self._report(complete=True)
        if self.file is not None:
            _save(self.file, report)
        return report

    def _report(self, *, complete: bool) -> dict[str, Any]:
        from pcc.conformance.report import as_json

        seconds = round(time.perf_counter() - self.began, 1)
        return as_json(
            self.found, **self.about, complete=complete, seconds=seconds, versions=versions()
        )


def _scenarios(
    head: Path | None, verifier: Path | None, checkpoints: Path | None
) -> tuple[Scenario, ...]:
    """Return what the protocol is checked on. Errors: C144, F102, F103."""
    from pcc.conformance.scenarios import SCENARIOS, given

    if checkpoints is not None:
        from pcc.conformance.published import published

        if verifier is not None or head is not None:
            what = "--checkpoints names heads and verifiers already"
            raise PccError("C144", what, hint="leave out --verifier and --head")
        return published(checkpoints)
    if verifier is None:
        if head is not None:
            raise PccError("C144", "--head is read with --verifier alone", hint="--verifier MODEL")
        return SCENARIOS
    for path in (verifier, head):
        if path is not None and not path.exists():
            raise PccError("C144", "there is no such model or head", at=str(path))
    return (given(head, verifier),)


def _writable(path: Path | None) -> None:
    """Find out before the run whether a file can be written. Errors: C147."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise PccError("C147", "it is a folder", at=str(path), hint="name a file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise PccError("C147", f"cannot write there: {e.strerror}", at=str(path)) from None


def _save(path: Path, report: dict[str, Any]) -> None:
    from pcc.circuit.text import write

    write(path, json.dumps(finite(report, str), indent=1).encode())


def versions() -> dict[str, str]:
    """Return the versions of what may take part, where it is installed."""
    from importlib import metadata

    out = {}
    for package in ("pcc", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
                    "tensorrt-bindings", "tensorrt-rtx", "cuda-bindings", "torch"):  # fmt: skip
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def show(report: dict[str, Any], found: Sequence[Finding]) -> None:
    """Print a line for each suite, and what is not good."""
    from pcc.conformance.report import GOOD

    rows = [
        [s["suite"], *(str(s[k]) for k in ("ok", "built", "tie", "differs", "refused", "skipped")),
         f"{s['worst']:.1e}", f"{s['bound']:.1e}", s["worst_case"]]
        for s in report["suites"]
    ]  # fmt: skip
    verdict = "agrees" if report["ok"] else "DIFFERS"
    title = f"{report['target']} on {report['provider']}, {report['precision']}: {verdict}"
    table(f"{title} ({report['seconds']} s)",
          ["suite", "ok", "built", "ties", "differ", "refused", "skipped", "error", "bound",
           "worst"],
          rows)  # fmt: skip
    others = sorted((f for f in found if f.verdict not in GOOD), key=lambda f: not f.bad)
    if others:
        lines = [[f.verdict, f.suite, f.case, f.what, f"{f.error:.1e}", f"{f.bound:.1e}", f.note]
                 for f in others[:SHOWN]]  # fmt: skip
        table("what is not plainly equal",
              ["verdict", "suite", "case", "what", "error", "bound", "note"], lines)  # fmt: skip
    if len(others) > SHOWN:
        say(f"pcc: {len(others) - SHOWN} more are in the report (--json)")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(conformance)
