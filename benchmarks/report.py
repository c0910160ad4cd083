"""Write the tables of README.md in this folder from the results: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make `benchmarks` importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_cpu import table as rounds

HERE = Path(__file__).resolve().parent
FORMS = {"masked-open": "n rows, cheapest", "masked-expand": "as published",
         "cirkit-onnx": "libcirkit export"}  # fmt: skip


def queries(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `queries.py` as a Markdown table; ratios of medians and of p10."""
    out = [
        "| query | against | `engine.run` us | session us | baseline us | ratio | of sessions "
        "| of sessions, p10 | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["status"] != "ok" or r["baseline"] not in FORMS:
            continue
        low = r["baseline_p10_us"] / r["pcc_raw_p10_us"]
        cells = [
            r["name"], FORMS[r["baseline"]], f"{r['pcc_us']:.0f}", f"{r['pcc_raw_us']:.0f}",
            f"{r['baseline_us']:.0f}", f"{r['ratio']}", f"{r['ratio_raw']}", f"{low:.2f}",
            f"{r['compile_s']:.2f}",
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _where(document: dict[str, Any]) -> str:
    e = document["environment"]
    v = e["versions"]
    return (f"{e['processor']}, {e['cpus']} cpus, one thread, {e['date'][:10]}; "
            f"onnxruntime {v['onnxruntime']}, torch {v['torch']}.")  # fmt: skip


def main() -> int:
    """Replace what lies between the markers."""
    page = HERE / "README.md"
    text = page.read_text("utf-8")
    for name, table in (("queries", queries), ("step_cpu", rounds)):
        document = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
        start, stop = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(start)
        after = rest.split(stop)[1]
        text = f"{before}{start}{_where(document)}\n\n{table(document['rows'])}\n{stop}{after}"
    page.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
