"""Fit the model of the CUDA engine's launches to measured rows, and say how well it holds.

    python benchmarks/gpu/cost_fit.py          # constants, and every row beside its prediction
    python benchmarks/gpu/cost_fit.py --write  # and puts them into the package and docs/cuda.md

Constants are fitted to parts of rounds, each kind of launch timed alone (`parts` in
`results/h200.json`; attention: what a round takes beyond the others), and to products of
`results/kernels-h100.json`. They are judged by whole rounds, passes and drafts. Plans are those
that this checkout makes: a part counts where the plan has one of the same name, launches and
bytes. No GPU, no nvcc.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import markdown  # noqa: E402
from pcc.backends.cuda import cost  # noqa: E402
from pcc.backends.cuda.builder import Builder  # noqa: E402
from pcc.backends.cuda.gpu import TUNED, Gpu  # noqa: E402
from pcc.backends.cuda.library import linear  # noqa: E402
from pcc.explore.forms import Engine, Form, Plans  # noqa: E402
from pcc.runtime.parts import keys, parts  # noqa: E402
from pcc.shapes import Synthetic  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/cuda.md"
MADE = ROOT / "backends/cuda/fitted.py"
# Rows of these commits had other generated kernels: look-ups of n-grams and decisions by one
# thread (the first two), latent-first drafts without draws as maps (the last).
EARLIER = ("b10ba12", "aa49918", "c0dab13")
BETWEEN = "between products"  # in the name of a generated part
MOST_ROWS = 16  # of x: with more, sums and tensor cores cost what the model does not know
PRODUCTS = {
    "evabyte qkv": (4096, 12288), "evabyte out": (4096, 4096), "evabyte gate/up": (4096, 22016),
    "evabyte down": (11008, 4096), "llama qkv": (3072, 5120), "llama out": (3072, 3072),
    "llama gate/up": (3072, 16384), "llama down": (8192, 3072),
}  # fmt: skip
FITS = {
    "stream": ("read", "start", "apart", "sums", "widened"),
    "attention": ("block", "scanned", "summaries"),
    "generated": ("phase", "barrier"),
}
FIRST = cost.Constants(
    1.05, 3.0, 3.0, 1.0, 30.0, 4.0, 30.0, 4.0, 1.0, 1.0, 3.0
)  # any plausible ones
TRIES, SMALL = 200, 1e-6
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A launch, the GPU that it ran on with its rate of a copy, and its microseconds."""

    kind: str
    work: cost.Work
    gpu: Gpu
    measured: float


# ------------------------------------------------------------ rows and their plans


def rows_of(path: Path = RESULTS / "h200.json") -> list[dict[str, Any]]:
    """Return the rows of the engine's rounds; drafts alone are of `EARLIER` kernels."""
    found = json.loads(path.read_text())
    return [r for r in found if r["backend"] == "pcc-cuda" and "graph" not in r]


@cache
def _plans(shape: str, head: str, precision: str, int8: bool, batch: int, max_seq: int) -> Plans:
    s = Synthetic(shape)
    return Plans(s.head(head), Engine(s, TUNED, precision, int8, batch, max_seq))


@cache
def _built(plans: Plans, form: Form, graph: str, n: int) -> Builder:
    made: dict[str, Callable[[], Builder]] = {
        "step": lambda: plans.round(form, greedy=False), "draft": lambda: plans.draft(form),
        "decode": lambda: plans.tokens(1), "verify": lambda: plans.tokens(n),
    }  # fmt: skip
    return made[graph]()


def built(r: Row, graph: str) -> Builder:
    """Return the launches that this checkout makes for a graph of a row."""
    precision, _, integers = str(r["precision"]).partition("+")
    precision, _, part = precision.partition(", ")
    whose = "both" if integers else part.removesuffix(" int8")
    head = f"{r['architecture']},n={r['n']},r={r['r']}"
    plans = _plans(r["shape"], head, precision, whose in ("both", "verifier"), r["batch"],
                   r["max_seq"])  # fmt: skip
    draft = "latent-first" if "latent-first" in r.get("forms", ()) else "full"
    return _built(plans, Form(draft, whose in ("both", "head")), graph, r["n"])


def gpu_of_row(r: Row) -> Gpu:
    """Return the GPU of a row: an H100 or an H200, whose copies differ."""
    return replace(TUNED, copy_rate=r["bandwidth_tb_s"])


def works_of(r: Row, graph: str) -> tuple[cost.Work, ...]:
    """Return the launches of a graph at the context of a row."""
    return cost.works(built(r, graph), partial(keys, context=r["context"]))


# ------------------------------------------------------------ samples


def samples(r: Row) -> Iterator[Sample]:
    """Yield a launch of each part of a row that the plan of this checkout has too."""
    for w, count, measured in paired(r):
        alone = count == 1  # others follow their like, and overlap
        each = 1e3 * _taken(r, measured, w) / count
        yield Sample(_kind(w), replace(w, apart=alone), gpu_of_row(r), each)


def paired(r: Row) -> Iterator[tuple[cost.Work, int, Row]]:
    """Yield (launch, how many alike, measured part) where a row has what the plan has."""
    launches = [
        {"op": x.op.name, "layer": x.layer, "bytes": dict(x.bytes)}
        for x in built(r, "step").launches
    ]
    works, by_layer = works_of(r, "step"), {p["layer"]: p for p in r["parts"]}
    own = [(works[p.launches[0]], p) for p in parts(launches)]
    generated = [p for p in r["parts"] if BETWEEN in p["layer"]]
    known = r["commit"] not in EARLIER and len(generated) == sum(w.phases > 0 for w, _ in own)
    for w, p in own:
        if w.part == "generated":  # the number of ops in its name changes with any pass
            if known:
                yield w, 1, generated.pop(0)
        elif (found := by_layer.get(p.layer)) and found["launches"] == len(p.launches):
            same = found["bytes"] == p.bytes and w.weights >= cost.STREAM
            if same or w.part == "attention":  # whose bytes depend on the context
                yield w, len(p.launches), found


def current(r: Row) -> bool:
    """Whether the layers of a row were launched as this checkout does."""
    layers = {w.layer for w in works_of(r, "step") if "layers.0." in w.layer}
    there = {w.layer for w, _, _ in paired(r) if "layers.0." in w.layer}
    return layers == there


def _taken(r: Row, measured: Row, w: cost.Work) -> float:
    """Return the ms of a part in its round.

    An attention leaves room beside it: alone, each one overlaps the next almost wholly, as it
    cannot between two products. It takes what the round does beyond its other parts.
    """
    if w.part != "attention":
        return float(measured["ms"])
    others = sum(p["ms"] for p in r["parts"] if p is not measured)
    return float(r["round_ms"] - others)


def _kind(w: cost.Work) -> str:
    return w.part if w.part in FITS else "stream"


def product_samples(path: Path = RESULTS / "kernels-h100.json") -> Iterator[Sample]:
    """Yield the products that were timed alone, each after its like."""
    report = json.loads(path.read_text())
    gpu = replace(TUNED, copy_rate=report["copy"] / 1e12)
    for p in report["products"]:
        if p["asked"] is None and p["shape"] in PRODUCTS and p["rows"] <= MOST_ROWS:
            k, n = PRODUCTS[p["shape"]]
            kernel = linear("product", rows=p["rows"], k=k, n=n, dtype="bf16")
            if list(kernel.grid) == p["grid"]:
                w = cost.work(kernel, {"weights": p["bytes"]}, 0, "layers", p["shape"])
                yield Sample("stream", w, gpu, 1e6 * p["overlap"])


# ------------------------------------------------------------ the fit


def fitted(found: Sequence[Sample]) -> cost.Constants:
    """Return the constants: of each kind of launch in turn, since each has its own.

    Streams and attention by relative errors; generated kernels by microseconds, of which a round
    has few: what a phase takes differs, and a relative fit would favour the shortest.
    """
    c = FIRST
    for kind, names in FITS.items():
        own = [s for s in found if s.kind == kind]
        if not own:
            raise SystemExit(f"no measured part is a launch of kind '{kind}' of these plans")
        c = replace(c, **_least(own, names, c, relative=kind != "generated"))
    return c


def _least(
    own: Sequence[Sample], names: Sequence[str], c: cost.Constants, *, relative: bool
) -> dict[str, float]:
    """Return the constants of least squares, by Levenberg and Marquardt's method.

    Over their logarithms: so they stay positive, and steps do not depend on units.
    """

    def errors(logs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tried = replace(c, **dict(zip(names, np.exp(logs).tolist(), strict=True)))
        off = [cost.duration(s.work, s.gpu, tried).whole - s.measured for s in own]
        return np.array(off) / (np.array([s.measured for s in own]) if relative else 1.0)

    logs, damping = np.log([getattr(c, n) for n in names]), 1e-3
    for _ in range(TRIES):
        r = errors(logs)
        slopes = np.stack([(errors(logs + d) - r) / SMALL for d in SMALL * np.eye(len(names))], 1)
        square = slopes.T @ slopes
        damped = square + damping * np.diag(np.diag(square) + SMALL)
        step = np.linalg.solve(damped, slopes.T @ r)
        better = np.sum(errors(logs - step) ** 2) < np.sum(r**2)
        logs, damping = (logs - step, damping / 3) if better else (logs, 4 * damping)
    return dict(zip(names, np.exp(logs).tolist(), strict=True))


# ------------------------------------------------------------ how well it holds


def judged(
    rows: Sequence[Row], c: cost.Constants = cost.MEASURED
) -> Iterator[tuple[Row, str, float, float]]:
    """Yield (row, graph, measured, predicted) in ms for each graph of each row."""
    for r in rows:
        for graph, measured in r["graphs"].items():
            predicted = cost.predict(works_of(r, graph), gpu_of_row(r), c).ms
            yield r, graph, measured["p50"], predicted


def table(found: Sequence[tuple[Row, str, float, float]]) -> str:
    """Return rounds and one-token passes beside their predictions, as Markdown."""
    columns = ("GPU", "shape, head", "precision", "context", "round ms", "predicted", "error",
               "one token ms", "predicted", "error")  # fmt: skip
    lines: dict[int, list[str]] = {}
    for graph in ("step", "decode"):
        for r, of, measured, predicted in found:
            if of == graph:
                about = [_card(r), _title(r), r["precision"], str(r["context"])]
                cells = lines.setdefault(id(r), about)
                error = 100 * (predicted / measured - 1)
                cells += [f"{measured:.2f}", f"{predicted:.2f}", f"{error:+.1f} %"]
    return markdown.table(columns, lines.values())


def _card(r: Row) -> str:
    card = str(r["gpu"]).removeprefix("NVIDIA ").split()[0]
    return card if current(r) else f"{card}, earlier launches"


def _title(r: Row) -> str:
    return f"{r['shape']}, {r['architecture']} n={r['n']}"


def worst(found: Sequence[tuple[Row, str, float, float]]) -> dict[str, float]:
    """Return the largest errors of rounds, and of drafts, of rows with this checkout's launches."""
    out = {}
    for graph in ("step", "draft"):
        own = [abs(b / a - 1) for r, of, a, b in found if of == graph and current(r)]
        if not own:
            raise SystemExit(f"no row is of the launches that this checkout makes ('{graph}')")
        out[graph] = max(own)
    return out


def source(c: cost.Constants, errors: Mapping[str, float]) -> str:
    """Return the text of `backends/cuda/fitted.py`."""
    values = "".join(f'    "{k}": {v:.4g},\n' for k, v in asdict(c).items())
    return (
        '"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""\n\n'
        "from __future__ import annotations\n\n"
        f"FITTED = {{\n{values}}}\n"
        "# The largest errors of predicted rounds, and of drafts alone, of all rows.\n"
        f"ROUND_ERROR = {errors['step']:.3f}\n"
        f"DRAFT_ERROR = {errors['draft']:.3f}\n"
    )


def main() -> None:
    """Fit, judge, and write where that is asked."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    p.add_argument("--write", action="store_true")
    write = p.parse_args().write
    rows = rows_of()
    found = [*(s for r in rows for s in samples(r)), *product_samples()]
    c = fitted(found)
    for kind in FITS:
        own = [s for s in found if s.kind == kind]
        off = [cost.duration(s.work, s.gpu, c).whole / s.measured - 1 for s in own]
        print(f"{kind}: {len(own)} launches, rms {100 * np.sqrt(np.mean(np.square(off))):.1f} %, "
              f"worst {100 * np.abs(off).max():.0f} %")  # fmt: skip
    print(json.dumps({k: float(f"{v:.4g}") for k, v in asdict(c).items()}))
    ends = list(judged(rows, c))
    if write:
        MADE.write_text(source(c, worst(ends)))
        start, stop = "<!-- cost: written by benchmarks/gpu/cost_fit.py -->\n", "<!-- end cost -->"
        PAGE.write_text(markdown.placed(PAGE.read_text("utf-8"), start, stop, table(ends)), "utf-8")
    for r, graph, measured, predicted in ends:
        print(f"{r['name']:66} {_card(r)[:4]} {graph:7} {measured:.3f} {predicted:.3f} "
              f"{100 * (predicted / measured - 1):+.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
