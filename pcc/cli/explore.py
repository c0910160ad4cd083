"""`pcc explore`: which circuit to draft with on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcc.cli.output import Json, emit, progress, say, table

if TYPE_CHECKING:
    from pcc.explore.config import Config
    from pcc.explore.records import Choice, Report


def explore(
    config: Annotated[Path, typer.Argument(help="YAML configuration; docs/explore.md has all.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Instead of `out`.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (.svg or .png).")] = None,
    again: Annotated[bool, typer.Option(help="Measure finished points too.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a grid of heads; report the Pareto front of time against accepted bytes.

    Finished points are skipped, so an interrupted command goes on where it was.
    """
    from dataclasses import replace

    from pcc.explore import read

    c = read(config)
    c = c if out is None else replace(c, out=str(out))
    if plot is not None:
        from pcc.cli.plots import check

        check(plot)
    report = _measured(c, again=again, quiet=quiet)
    if plot is not None:
        from pcc.cli.plots import draw_explore

        draw_explore(report, plot)
    if as_json:
        emit(report)
    else:
        show(report, c.out)
    raise typer.Exit(1 if any(x["status"] == "different" for x in report["points"]) else 0)


def _measured(c: Config, *, again: bool, quiet: bool) -> Report:
    from pcc.explore import explore as run

    line, detail = (None, None) if quiet else (_progress, progress)
    try:
        return run(c, again=again, progress=line, detail=detail)
    except KeyboardInterrupt:
        say(f"interrupted: what is measured is in {c.out}; run the same command again to go on")
        raise


def _progress(line: str) -> None:
    say(f"pcc: {_clean(line)}")


def _clean(value: object) -> str:
    """Names come from strangers' files: no control characters reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def show(r: Report, out: str) -> None:
    """Print the points of each mode, the choices, and what failed."""
    from pcc.explore.page import interval
    from pcc.explore.report import PLAIN, decoding

    columns = ["point", "front", "bytes/round", "ms/round", "bytes/s", "speed-up", "same text"]
    for mode, f in r["modes"].items():
        rows = []
        if (plain := r["autoregressive"]) is not None:
            on = "*" if PLAIN in f["front"] else ""
            rows.append([PLAIN, on, "1", f"{plain['ms_per_round']:.3g}",
                         f"{plain['bytes_per_second']:.0f}", "1", ""])  # fmt: skip
        for line in r["points"]:
            d, figures, name = decoding(line, mode), line["figures"], line["point"]["name"]
            if d is None or figures is None:
                continue
            same = f"{figures['sameness']['identical']}/{figures['prompts']}"
            rows.append([_clean(name), "*" if name in f["front"] else "",
                         interval(d["bytes_per_round"]), interval(d["ms_per_round"]),
                         f"{d['bytes_per_second']:.0f}", interval(d["speedup"]),
                         same if mode == "greedy" else ""])  # fmt: skip
        table(f"{mode}, 95 % intervals over prompts; * is on the front", columns, rows)
        _choice("best", f["best"])
        _choice("best within the limit", f["within_limit"])
        limit = r["target"]["max_ms_per_round"]
        if limit and f["within_limit"] is None:
            print(f"no point takes at most {limit:g} ms per round")
    _rest(r)
    print(f"report: {Path(out) / 'index.html'}, report.json, results.jsonl")


def _choice(title: str, c: Choice | None) -> None:
    if c is None:
        return
    print(f"{title}: {_clean(c['name'])}, {c['bytes_per_second']:.0f} bytes/s")
    if c["command"]:
        print(f"  {_clean(c['command'])}")


def _rest(r: Report) -> None:
    bad: list[Any] = [x for x in r["points"] if x["status"] != "ok"]
    for x in bad:
        e = x["error"]
        why = f"{e['code']}: {e['what']}" if e else "DIFFERENT TEXT: on no front"
        print(f"{_clean(x['point']['name'])}: {_clean(why)}")
    if r["missing"]:
        print(f"neither given nor trained: {', '.join(r['missing'])}")
    if r["drift"] > 0.1:
        percent = f"{100 * r['drift']:.0f} %"
        say(f"the machine was not steady: autoregressive times differ by {percent}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explore)
