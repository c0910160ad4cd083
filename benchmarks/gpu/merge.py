"""Merge parts of GPU runs into the committed results, and write the tables.

    python benchmarks/gpu/merge.py PARTS.json...
    python benchmarks/gpu/merge.py --tensorrt OUT/tensorrt.json --commit ID

Rows go into `results/h200.json`, a list; a row replaces an older one of the same name on the same
GPU, by date. Reports of conformance go into `results/h200_conformance.json`, with what was run:
parts, rows, names. One that was cut off is marked as such, and never replaces a whole one. The
tables between the markers of README.md and docs/gpu.md are made from these files, by this program
alone. The machine's description, `host_gap.py`, `device_kernels.py`, `tests/gpu` and the parts of
`tensorrt_check.py` go into files of their own. `compile_s` of a row: the seconds of its bundle,
perhaps beside others, where the parts say it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import markdown  # noqa: E402
from benchmarks.gpu.reports import (  # noqa: E402
    builds,
    card,
    checked,
    families,
    gaps,
    host,
    machines,
    tested,
    traces,
)
from benchmarks.gpu.stages import STAGES  # noqa: E402
from pcc.runtime.bound import complete, rates, with_yardstick  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
ROWS, REPORTS = RESULTS / "h200.json", RESULTS / "h200_conformance.json"
MACHINES, HOST = RESULTS / "h200_environment.json", RESULTS / "h200_host.json"
KERNELS = RESULTS / "h200_kernels.json"
CHECKS = RESULTS / "h200_tensorrt.json"
TESTS = RESULTS / "h200_tests.json"  # of tests/gpu
PAGES = (ROOT / "README.md", ROOT / "docs/gpu.md")


def merged(old: list[dict[str, Any]], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, newest of each name and GPU, with the yardsticks of the same work."""
    found, took = {(r["name"], r.get("gpu")): r for r in old}, builds(parts)
    for e in parts:
        if e["writes"] in ("rows", "row") and "data" in e:
            rows = e["data"] if e["writes"] == "rows" else [e["data"]]
            for r in rows:
                made = {**r, "commit": e["commit"] if e["commit"] != "unknown" else r.get("commit")}
                made["date"] = r.get("date") or e.get("date", "")
                if (e["stage"], e["commit"]) in took:
                    made["compile_s"] = took[e["stage"], e["commit"]]
                before = found.get((made["name"], made.get("gpu")))
                if before is None or str(before.get("date", "")) <= made["date"]:
                    found[made["name"], made.get("gpu")] = made
    out = with_yardstick(sorted(found.values(), key=lambda r: (str(r.get("gpu")), r["name"])))
    for r in out:
        if lacking := complete(r):
            raise SystemExit(f"row {r['name']!r} lacks {', '.join(lacking)}")
        if said := r.get("rates"):
            decode = r.get("graphs", {}).get("decode", {}).get("p50")
            r["rates"] = rates(r["round_ms"], decode, said["acceptance"], r["batch"])
    return out


def reports(old: list[dict[str, Any]], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports of conformance, newest of each name; whole ones before partial ones."""
    found = {r["name"]: r for r in old}
    for e in parts:
        if e["stage"].startswith("conformance") and "data" in e:
            data = {k: v for k, v in e["data"].items() if k != "findings"}
            bad = [f for f in e["data"]["findings"] if f["verdict"] != "skipped"]
            data = {**asked(e["name"]), **data}
            data["complete"] = bool(data.get("complete")) and e["status"] in (0, 1)
            data["ok"] = bool(data.get("ok")) and data["complete"]
            if not data["complete"] and found.get(e["name"], {}).get("complete"):
                continue
            found[e["name"]] = {"name": e["name"], "commit": e["commit"], **data, "findings": bad}
    return [found[k] for k in sorted(found)]


def asked(name: str) -> dict[str, Any]:
    """Return what the command of this name asks of the suite, for reports that do not say it."""
    out: dict[str, list[str]] = {"parts": [], "only": [], "halves": []}
    options = {"--part": "parts", "--only": "only", "--half": "halves"}
    for args in (c.args for s in STAGES for c in s.commands if c.name == name):
        for option, value in itertools.pairwise(args):
            if option in options:
                out[options[option]].append(value)
    return out


def rounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of whole rounds: others name their graph."""
    return [r for r in rows if "graph" not in r]


def drafts(rows: list[dict[str, Any]]) -> str:
    """Return the rows of drafts alone as Markdown."""
    columns = ("shape, head", "backend, precision", "latents", "batch", "draft ms (p10, p90)",
               "MB moved", "their ms", "of the bound", "GPU")  # fmt: skip
    return markdown.table(columns, (
        (head(r), f"{r['backend']}, {r['precision']}",
         "first" if r["proposal"] == "latent-first" else "summed out", str(r["batch"]),
         f"{r['round_ms']:.4f} ({r['p10']:.4f}, {r['p90']:.4f})",
         f"{sum(r['bytes_moved'].values()) / 1e6:.1f}", f"{r['bound_ms']:.4f}",
         f"{r['ratio_to_bound']:.2f}", card(r))
        for r in rows if r.get("graph") == "draft"
    ))  # fmt: skip


def head(r: dict[str, Any]) -> str:
    """Return the shape of the verifier and its head."""
    return f"{r['shape']}, {r['architecture']} n={r['n']} r={r['r']}"


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the GPU that was measured last."""
    last = max(rows, key=lambda r: str(r.get("date", "")), default={})
    return [r for r in rows if r.get("gpu") == last.get("gpu")]


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown: what was run, its time, and beside what."""
    columns = ("shape, head", "backend", "batch", "context", "precision", "round ms (p10, p90)",
               "GB moved", "copy TB/s", "of the bound", "torch graph ms", "faster by",
               "GPU")  # fmt: skip
    cells = []
    for r in rows:
        torch_ms = r["torch_graph_ms"]
        cells.append((
            head(r), engine(r), str(r["batch"]), str(r["context"]), r["precision"],
            f"{r['round_ms']:.3f} ({r['p10']:.3f}, {r['p90']:.3f})",
            f"{sum(r['bytes_moved'].values()) / 1e9:.2f}", f"{r['bandwidth_tb_s']:.2f}",
            f"{r['ratio_to_bound']:.2f}", beside(r),
            f"{torch_ms / r['round_ms']:.2f}" if torch_ms else "", card(r),
        ))  # fmt: skip
    return markdown.table(columns, cells)


def short(rows: list[dict[str, Any]]) -> str:
    """Return the rows of one sequence as Markdown: what a reader wants to know first.

    The yardstick has a column where some row has one.
    """
    torch = any(r["torch_graph_ms"] for r in rows)
    columns = ("shape, head", "backend", "context", "round ms", "of its bytes' time",
               *(("torch graph ms",) if torch else ()))  # fmt: skip
    return markdown.table(columns, (
        (head(r), f"{engine(r)}, {r['precision']}", str(r["context"]), f"{r['round_ms']:.2f}",
         f"{r['ratio_to_bound']:.2f}", *((beside(r),) if torch else ()))
        for r in rows if r["batch"] == 1 and r["backend"] != "torch-cuda-graph"
    ))  # fmt: skip


def engine(r: dict[str, Any]) -> str:
    """Return the backend, and what of its engines or drafts is not the default."""
    return ", ".join([r["backend"], *r.get("forms", ())])


def beside(r: dict[str, Any]) -> str:
    """Return the yardstick's ms, and its precision where that is another one."""
    if not r["torch_graph_ms"]:
        return ""
    other = r.get("torch_precision")
    ms = f"{r['torch_graph_ms']:.2f}"
    return ms if other in (None, r["precision"]) else f"{ms} ({other})"


def ran(r: dict[str, Any], suite: str) -> str:
    """Return what of a suite a report is about: names, halves, rows; and that it was cut off."""
    out = []
    if suite in ("queries", "protocol") and r.get("only"):
        out.append("only " + ", ".join(r["only"]))
    if suite == "protocol" and r.get("checkpoints"):
        out.append("published checkpoints")
    if suite == "ops" and r.get("halves"):
        out.append("stored " + ", ".join(r["halves"]) + " too")
    if r.get("batches"):
        out.append("batch " + ", ".join(map(str, r["batches"])))
    if level := r.get("engine", {}).get("level"):
        out.append(f"level={level}")
    if not r.get("complete", True):
        out.append(f"**cut off after {r['seconds']:.0f} s**" if r.get("seconds") else "**cut off**")
    return "; ".join(out)


def verdicts(found: list[dict[str, Any]]) -> str:
    """Return the reports of conformance as Markdown, one line for each suite."""
    columns = ("target", "provider", "precision", "suite", "what of it", "equal", "ties", "differ",
               "refused", "skipped")  # fmt: skip
    counted = ("ok", "tie", "differs", "refused", "skipped")
    return markdown.table(columns, (
        (r["target"], r["provider"], r["precision"], s["suite"], ran(r, s["suite"]),
         *(str(s[k]) for k in counted))
        for r in found for s in r["suites"]
    ))  # fmt: skip


def placed(text: str, marker: str, made: str) -> str:
    """Replace what lies between the markers of a page, where it has them."""
    start, stop = f"<!-- {marker} -->\n", f"<!-- end {marker} -->"
    return markdown.placed(text, start, stop, made) if start in text else text


def pages() -> dict[Path, str]:
    """Return the pages with the tables that the committed results make."""
    rows = _read(ROWS)
    tables = {
        "h200": table(rounds(rows)),
        "h200-short": short(newest(rounds(rows))),
        "h200-drafts": drafts(rows),
        "h200-host": gaps(_read(HOST)),
        "h200-kernels": families(_read(KERNELS)),
        "h200-conformance": verdicts(_read(REPORTS)),
    }
    out = {}
    for page in PAGES:
        out[page] = page.read_text("utf-8")
        for marker, made in tables.items():
            out[page] = placed(out[page], marker, made)
    return out


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def _write(path: Path, made: Any) -> None:
    path.write_text(json.dumps(made, indent=1) + "\n")


def _write_lines(path: Path, made: list[dict[str, Any]]) -> None:
    """Write a row a line: a third smaller, and a changed row is a changed line."""
    path.write_text("[\n" + ",\n".join(json.dumps(x) for x in made) + "\n]\n")


def rounded(x: Any) -> Any:
    """Return plain data with six digits of each float: clocks have no more."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def arguments() -> argparse.Namespace:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("parts", nargs="*", type=Path)
    p.add_argument("--tensorrt", action="append", type=Path, default=[])
    p.add_argument("--commit", default="unknown", help="of what --tensorrt names")
    return p.parse_args()


def main() -> None:
    """Merge the files that are named; without any, write the tables again."""
    a = arguments()
    parts = [e for path in a.parts for e in json.loads(path.read_text())]
    rows, found = merged(_read(ROWS), parts), reports(_read(REPORTS), parts)
    between, kernels = host(_read(HOST), parts), traces(_read(KERNELS), parts)
    rows, found, kernels = rounded(rows), rounded(found), rounded(kernels)
    _write_lines(ROWS, rows)
    _write_lines(REPORTS, found)
    _write(HOST, between)
    if kernels:
        _write_lines(KERNELS, kernels)
    if ran_tests := tested(json.loads(TESTS.read_text()) if TESTS.is_file() else {}, parts):
        _write(TESTS, ran_tests)
    _write(MACHINES, machines(_read(MACHINES), parts))
    if a.tensorrt:
        old = json.loads(CHECKS.read_text())
        _write(CHECKS, checked(old, [json.loads(p.read_text()) for p in a.tensorrt], a.commit))
    for page, text in pages().items():
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
