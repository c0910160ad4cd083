"""Drafting against autoregressive decoding on the models that ship, through one runtime.

    python benchmarks/speedup.py                # measures, writes the JSON and README's table
    python benchmarks/speedup.py --table        # only puts the table of the JSON into README

Greedy, one thread, batch 1. Autoregressive decoding runs the one-token graph of the same bundle,
drafting runs the fused step; the time of the prompt is left out on both sides. All lanes decode a
prompt before any sees the next, in an order that changes. A speed-up is a quotient of times per
byte on one prompt; what is reported is its median over prompts, with p10 and p90. Needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "examples"):
    sys.path.insert(0, str(place))

import decoding  # noqa: E402

import pcc  # noqa: E402
from benchmarks import markdown  # noqa: E402
from benchmarks.shipped_heads import document, options  # noqa: E402
from benchmarks.timing import environment  # noqa: E402
from pcc.cli.output import say  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "speedup.json"
README = ROOT / "README.md"
START, STOP = "<!-- speedup: written by benchmarks/speedup.py -->\n", "<!-- end speedup -->"
MODES = ("stepwise", "max-product")
Row = dict[str, Any]


def measure(heads: Sequence[str], models: Path, folder: Path, prompts: int, count: int) -> Row:
    """Compile every head in every mode, decode, and return the document."""
    engines, seconds = {}, {}
    for name in heads:
        # Without latents there is one way to draft.
        for mode in MODES[:1] if name.startswith("ff") else MODES:
            key = f"{name}/{mode}"
            say(f"compiling {key}")
            made = decoding.bundle(
                name, folder / f"{name}-{mode}.pcc", mode, lambda _: None, models
            )
            engines[key], seconds[key] = pcc.load(made.path, threads=1), made.seconds
    texts = decoding.prompts(prompts, models)
    before = os.getloadavg()[0]
    lanes = decoding.race(engines, texts, count, say)
    load = [round(v, 2) for v in (before, os.getloadavg()[0])]
    plain = lanes.pop(decoding.PLAIN)
    rows = [_row(decoding.PLAIN, "", plain, plain)]
    for key, lane in lanes.items():
        name, mode = key.split("/")
        rows.append({**_row(name, mode, lane, plain), "compile_s": round(seconds[key], 2)})
    return {"environment": environment(1) | {"load_before_and_after": load},
            "prompts": len(texts), "bytes": count, "rows": rows}  # fmt: skip


def _row(name: str, mode: str, lane: decoding.Lane, plain: decoding.Lane) -> Row:
    gain = plain.per_token() / lane.per_token()
    # Processor time does not count waiting for a processor; it still counts caches and memory.
    cpu = np.array(plain.cpu) / plain.tokens / (np.array(lane.cpu) / lane.tokens)
    return {
        "head": name, "draft_mode": mode,
        "bytes_per_second": round(1 / float(np.median(lane.per_token())), 1),
        "bytes_per_round": round(lane.round_size(), 3),
        "speedup": _quantiles(gain), "speedup_of_processor_time": _quantiles(cpu),
        "identical": lane.identical, "near_ties": lane.near_ties, "different": lane.different,
    }  # fmt: skip


def _quantiles(values: Any) -> dict[str, float]:
    low, middle, high = np.percentile(values, [10, 50, 90]).round(3).tolist()
    return {"median": middle, "p10": low, "p90": high}


def best(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each head: that of the mode with the larger median."""
    out: dict[str, Row] = {}
    for r in rows:
        kept = out.get(r["head"])
        if kept is None or r["speedup"]["median"] > kept["speedup"]["median"]:
            out[r["head"]] = r
    return list(out.values())


def table(document: Row) -> str:
    """Return the document as Markdown: where it was measured, and a table."""
    e, n = document["environment"], document["prompts"]
    low, high = e["load_before_and_after"]
    where = (
        f"{e['processor']}, {e['cpus']} cpus, one thread, load {low} to {high}, {e['date'][:10]}; "
        f"{n} held-out prompts, {document['bytes']} new bytes each."
    )
    rows = []
    for r in best(document["rows"]):
        s = r["speedup"]
        ties = f", {r['near_ties']} part at a near-tie" if r["near_ties"] else ""
        ties += f", {r['different']} differ" if r["different"] else ""
        plain = r["head"] == decoding.PLAIN
        spread = "" if plain else f"{s['p10']:.2f} to {s['p90']:.2f}"
        rows.append([
            decoding.TITLES.get(r["head"], r["head"]), r["draft_mode"],
            f"{r['bytes_per_second']:.0f}", f"{r['bytes_per_round']:.2f}", f"{s['median']:.2f}",
            spread, "" if plain else f"{r['identical']} of {n}{ties}",
        ])  # fmt: skip
    columns = ("decoding", "drafts", "bytes/s", "bytes a round", "speed-up", "p10 to p90",
               "same text")  # fmt: skip
    return f"{where}\n\n{markdown.table(columns, rows)}"


def into(text: str, document: Row) -> str:
    """Replace what lies between the markers."""
    return markdown.placed(text, START, STOP, table(document))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a greedy text differs other than by a near-tie."""
    args = options(__doc__, RESULTS, 48, argv)
    found = document(args, measure)
    print(table(found))
    if args.json == RESULTS:
        README.write_text(into(README.read_text("utf-8"), found), "utf-8")
    return int(any(r["different"] for r in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
