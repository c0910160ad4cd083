"""`pcc inspect`, `pcc verify`, `pcc query`: a bundle's contents, correctness and answers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pcc
from pcc.cli.output import WIDEST, Json, emit, printable, progress, say, table
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.knobs import MAX_TEXT_BYTES

if TYPE_CHECKING:
    from pcc.check import Check
    from pcc.driver import Artifact

STATE = re.compile(r"present\.(?P<name>\S+)(?P<note>.*)")  # a state that a graph hands on
Bundle = Annotated[Path, typer.Argument(help="Bundle, a folder NAME.pcc.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.")]
Provider = Annotated[str, typer.Option(help="cpu, cuda or tensorrt; never another one instead.")]


def present(artifact: Artifact, done: str, *, as_json: bool) -> None:
    """Print what was made: a description and a closing line, or JSON."""
    if as_json:
        emit({"path": str(artifact.path), "seconds": artifact.seconds, **artifact.manifest})
        return
    describe(artifact.path, artifact.manifest)
    print(done)


def describe(path: Path, manifest: dict[str, Any]) -> None:
    """Print what a bundle holds: circuit, sizes, passes that changed it, queries."""
    c = manifest["circuit"]
    print(printable(f"{path}: {c['kind'][:80]} circuit '{c['name'][:80]}', n={c['n']} r={c['r']} "
                    f"V={c['V']}, parameters: {c['parameters'][:80]}, opset {manifest['opset']}")
         )  # fmt: skip
    size = {p: (path / p).stat().st_size for p in manifest["files"]}
    graphs = sum(v for p, v in size.items() if p.startswith("graphs/"))
    print(
        f"  {graphs / 1e6:.2f} MB of graphs and weights, {sum(size.values()) / 1e6:.2f} MB in all"
    )
    table("passes that changed something", ["pass", "of", "nodes", "ms", "check ms"],
          _passes(manifest["passes"]))  # fmt: skip
    errors = manifest["numerics"]["max_abs_error"]
    rows = [
        [q, str(s["nodes"]), ", ".join(i["name"] for i in s["inputs"]),
         ", ".join(o["name"] for o in s["outputs"]),
         "not measured" if errors.get(q) is None else f"{errors[q]:.1e}"]
        for q, s in manifest["queries"].items()
    ]  # fmt: skip
    table("queries", ["query", "onnx nodes", "inputs", "outputs", "error"], rows)
    for q, why in manifest["unsupported"].items():
        print(printable(f"  without '{q[:80]}': {why[:WIDEST]}"))


def _passes(records: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [p["name"], p["of"], f"{p['nodes_before']} -> {p['nodes_after']}", f"{p['ms']:.1f}",
         f"{p['check_ms']:.1f}"] for p in records if p["changed"]
    ]  # fmt: skip


def inspect(
    bundle: Bundle,
    ir: Annotated[str, typer.Option(help="Print the IR of a stage, e.g. optimised.")] = "",
    as_json: Json = False,
) -> None:
    """Show what a bundle holds, or the IR of a stage, after checking its hashes."""
    from pcc.bundle import inside, read_manifest

    manifest = read_manifest(bundle)
    if not ir:
        emit(manifest) if as_json else describe(bundle, manifest)
        return
    files = [f for f in manifest["files"] if f.startswith("ir/") and f.endswith(".pcir")]
    stages = {Path(f).stem.partition("-")[2]: f for f in sorted(files)}
    if ir not in stages:
        raise PccError("C101", f"no stage {ir!r}", hint=f"one of {', '.join(stages)}")
    data = read_bounded(inside(bundle, stages[ir]), MAX_TEXT_BYTES, "E010")
    text = data.decode("utf-8", "replace")
    if as_json:
        emit({"stage": ir, "text": text})
        return
    for line in text.splitlines():
        print(printable(line))


def verify(
    bundle: Bundle,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fresh inputs.")] = 1,
    provider: Provider = "cpu",
    as_json: Json = False,
) -> None:
    """Compare every query with the float64 reference; exit 1 if one differs."""
    report = pcc.verify(bundle, seed=seed, provider=provider, progress=progress)
    if as_json:
        emit({"ok": report.ok, "checks": [{**vars(c), "ok": c.ok} for c in report.checks]})
    else:
        good = sum(c.ok for c in report.checks)
        verdict = "agrees" if report.ok else "DIFFERS"
        title = f"{bundle}: {verdict}, {good} of {len(report.checks)} checks are within bounds"
        table(title, ["query", "check", "error", "bound", ""], _checks(report.checks))
    raise typer.Exit(0 if report.ok else 1)


def _checks(checks: Sequence[Check]) -> list[list[str]]:
    """Return a row for each check, what differs first; states that agree share one row a graph."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for k, x in enumerate(sorted(checks, key=lambda x: x.ok)):
        state = STATE.fullmatch(x.what) if x.ok else None
        key = (x.query, state["note"]) if state else (str(k),)
        groups.setdefault(key, []).append(x)
    rows = []
    for group in groups.values():
        x = max(group, key=lambda x: x.error - x.bound)
        what = x.what
        if len(group) > 1 and (state := STATE.fullmatch(what)):
            what = f"{len(group)} states{state['note']}, the worst: {state['name']}"
        verdict = "ok" if x.ok else "DIFFERS"
        rows.append([x.query, what, f"{x.error:.2e}", f"{x.bound:.2e}", verdict])
    return rows


def query(
    bundle: Bundle,
    name: Annotated[str, typer.Argument(help="Query, e.g. prefix.")],
    data: Annotated[Path, typer.Option("--input", help=".npz with one array per input.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help=".npz to write.")] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Run a query on the arrays of a file; JSON on stdout (-inf becomes null) without -o."""
    import numpy as np

    from pcc.circuit.text import write
    from pcc.runtime.arrays import read_npz

    if out is not None and out.exists() and not force:
        raise PccError("C112", "the output exists", at=str(out), hint="another name, or --force")
    result = pcc.load(bundle, provider=provider, threads=threads).run(name, **read_npz(data))
    if out is None:
        emit({k: v.tolist() for k, v in result.items()})
        return
    buffer = io.BytesIO()
    np.savez(buffer, **result)  # type: ignore[arg-type]
    write(out, buffer.getvalue())
    say(f"wrote {', '.join(f'{k} {list(v.shape)}' for k, v in result.items())} to {out}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(inspect)
    app.command()(verify)
    app.command()(query)
