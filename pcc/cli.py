"""The command line. Data on stdout, progress and logs on stderr.

Exit codes: 0 done, 1 a check found a difference, 2 bad usage or bad input, 3 the environment lacks
something.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pcc
from pcc.errors import PccError

app = typer.Typer(
    name="pcc",
    help="Compile probabilistic circuits to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def say(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(value, indent=1))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout, as wide as it needs to be."""
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for r in [columns, *rows]:
        print("  " + "  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip())


@app.command("compile")
def compile_command(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder or .pcir file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write.")] = Path("m.pcc"),
    query: Annotated[list[str] | None, typer.Option(help="Only this query (repeatable).")] = None,
    target: Annotated[str, typer.Option(help="onnx")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32")] = "fp32",
    opset: Annotated[int, typer.Option(help="24, or 17 for older runtimes.")] = 24,
    parameters: Annotated[str, typer.Option(help="context or logits")] = "context",
    window: Annotated[int | None, typer.Option(help="Draft fewer variables.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint step (default: newest).")] = None,
    hmm_bias: Annotated[
        list[str] | None, typer.Option(help="Unknown tensor to add to sum logits.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    validate: Annotated[bool, typer.Option(help="Check every pass.")] = True,
    as_json: Json = False,
) -> None:
    """Compile a circuit to a bundle."""
    extra: dict[str, Any] = {}
    if source.is_dir():
        extra = {k: v for k, v in (("step", step), ("hmm_bias", hmm_bias)) if v is not None}
    artifact = pcc.compile(
        source, queries=query, out=out, target=target, precision=precision, opset=opset,
        parameters=parameters, window=window, force=force, validate=validate,
        progress=None if as_json else lambda s: say(f"pcc: {s}"), **extra,
    )  # fmt: skip
    if as_json:
        emit({"path": str(artifact.path), "seconds": artifact.seconds, **artifact.manifest})
        return
    describe(artifact.path, artifact.manifest)
    print(f"compiled in {artifact.seconds:.2f} s")


def describe(path: Path, manifest: dict[str, Any]) -> None:
    """Print what a bundle holds."""
    c = manifest["circuit"]
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    graphs = sum(p.stat().st_size for p in (path / "graphs").iterdir())
    print(f"{path}: {c['kind']} circuit '{c['name']}', n={c['n']} r={c['r']} V={c['V']}, "
          f"parameters: {c['parameters']}, opset {manifest['opset']}")  # fmt: skip
    print(f"  {graphs / 1e6:.2f} MB of graphs and weights, {size / 1e6:.2f} MB in all")
    rows = [[p["name"], "yes" if p["changed"] else "-", f"{p['nodes_before']} -> "
             f"{p['nodes_after']}", f"{p['ms']:.1f}", f"{p['check_ms']:.1f}"]
            for p in manifest["passes"] if p["changed"]]  # fmt: skip
    table("passes that changed something", ["pass", "changed", "nodes", "ms", "check ms"], rows)
    errors = manifest["numerics"]["max_abs_error"]
    rows = [
        [q, str(s["nodes"]), ", ".join(i["name"] for i in s["inputs"]),
         ", ".join(o["name"] for o in s["outputs"]),
         f"{errors[q]:.1e}" if q in errors else "not measured"]
        for q, s in manifest["queries"].items()
    ]  # fmt: skip
    table("queries", ["query", "onnx nodes", "inputs", "outputs", "error"], rows)
    for q, why in manifest["unsupported"].items():
        print(f"  without '{q}': {why}")


@app.command()
def inspect(
    bundle: Path,
    ir: Annotated[str, typer.Option(help="Print the IR of a stage, e.g. optimised.")] = "",
    as_json: Json = False,
) -> None:
    """Show what a bundle holds, or the IR of a stage."""
    from pcc.bundle import read_manifest

    manifest = read_manifest(bundle)
    if ir:
        stages = {p.stem.partition("-")[2]: p for p in sorted((bundle / "ir").glob("*.pcir"))}
        if ir not in stages:
            raise PccError("C101", f"no stage {ir!r}", hint=f"one of {', '.join(stages)}")
        print(stages[ir].read_text(), end="")
    elif as_json:
        emit(manifest)
    else:
        describe(bundle, manifest)


@app.command()
def verify(
    bundle: Path,
    seed: Annotated[int, typer.Option(help="Seed of the fresh inputs.")] = 1,
    as_json: Json = False,
) -> None:
    """Compare every query with the float64 reference; exit 1 if one differs."""
    report = pcc.verify(bundle, seed=seed)
    if as_json:
        emit({"ok": report.ok, "checks": [vars(c) for c in report.checks]})
    else:
        rows = [[c.query, c.what, f"{c.error:.2e}", "ok" if c.ok else "DIFFERS"]
                for c in report.checks]  # fmt: skip
        table(f"{bundle}: {'agrees' if report.ok else 'differs'}",
              ["query", "check", "error", ""], rows)  # fmt: skip
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def opt(
    file: Path,
    passes: Annotated[str, typer.Option("-p", "--passes", help="e.g. 'canonicalize,dce'")] = "",
    out: Annotated[Path | None, typer.Option("-o", help="Write here, not to stdout.")] = None,
    dump_after_change: Annotated[Path | None, typer.Option(help="Folder for IR dumps.")] = None,
    explain: Annotated[list[str] | None, typer.Option(help="Say what a pass did, and why.")] = None,
    time_passes: Annotated[bool, typer.Option(help="Print times on stderr.")] = False,
    stop_after: Annotated[str, typer.Option(help="Stop after this pass.")] = "",
    reproducers: Annotated[Path, typer.Option(help="Folder for failing cases.")] = Path("."),
    validate: Annotated[bool, typer.Option(help="Check every pass.")] = True,
) -> None:
    """Run passes over a .pcir file."""
    from pcc.circuit import text
    from pcc.passes.manager import Manager
    from pcc.passes.pipelines import circuit_pipeline
    from pcc.passes.registry import parse_pipeline

    module = text.load(file)
    pipeline = parse_pipeline(passes) if passes else circuit_pipeline()
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
    if out is None:
        print(text.show(module), end="")
    else:
        text.save(module, out)


@app.command()
def query(
    bundle: Path,
    name: Annotated[str, typer.Argument(help="Query, e.g. prefix.")],
    data: Annotated[Path, typer.Option("--input", help=".npz with one array per input.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help=".npz to write.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.")] = None,
) -> None:
    """Run a query on the arrays of a file; JSON on stdout without -o."""
    import numpy as np

    from pcc.frontends.arrays import read_npz

    result = pcc.load(bundle, threads=threads).run(name, **read_npz(data))
    if out is None:
        # JSON has no infinities: -inf becomes null.
        emit({k: _plain(v.tolist()) for k, v in result.items()})
        return
    import io

    from pcc.circuit.text import write

    buffer = io.BytesIO()
    np.savez(buffer, **result)  # type: ignore[arg-type]
    write(out, buffer.getvalue())


def _plain(v: Any) -> Any:
    if isinstance(v, list):
        return [_plain(x) for x in v]
    return None if isinstance(v, float) and v in (float("inf"), float("-inf")) else v


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and how to get it."""
    from pcc.environment import examine

    findings = examine()
    if as_json:
        emit([vars(f) for f in findings])
    else:
        rows = [[f.name, f.version or "-", f.state, f.remedy] for f in findings]
        table("environment", ["part", "version", "state", "remedy"], rows)
    raise typer.Exit(3 if any(f.required and not f.version for f in findings) else 0)


def _version(value: bool) -> None:
    if value:
        print(f"pcc {pcc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Compile probabilistic circuits to ONNX."""


def main() -> None:
    """Run the command line; errors are one line on stderr."""
    try:
        app()
    except PccError as e:
        hint = f" (help: {e.hint})" if e.hint else ""
        place = f"{e.at}: " if e.at else ""
        line = f"{place}error[{e.code}]: {e.what}{hint}"
        print(" ".join(line.split()), file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
