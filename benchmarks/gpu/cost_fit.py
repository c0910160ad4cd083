"""Fit the model of the CUDA engine's launches to measured rows, and say how well it holds.

    python benchmarks/gpu/cost_fit.py          # constants, and every row beside its prediction
    python benchmarks/gpu/cost_fit.py --write  # and puts them into the package and docs/cuda.md

Constants are fitted to passes over one token and over n (`decode`, `verify` of
`results/h200.json`), to the products and generated kernels of rounds and of drafts, each kind timed
alone (`parts`), and to products of 64 rows of `results/kernels-h100.json`. Whole rounds and whole
drafts are judged only. Plans are those that this checkout makes: a part counts where the plan has
one of as many launches and bytes. No GPU, no nvcc.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import markdown  # noqa: E402
from pcc import knobs  # noqa: E402
from pcc.backends.cuda import cost  # noqa: E402
from pcc.backends.cuda.builder import Builder  # noqa: E402
from pcc.backends.cuda.gpu import TUNED, Gpu  # noqa: E402
from pcc.backends.cuda.library import linear  # noqa: E402
from pcc.explore.forms import Engine, Form, Plans  # noqa: E402
from pcc.runtime.parts import keys, parts  # noqa: E402
from pcc.shapes import Synthetic  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/cuda.md"
MADE = ROOT / "backends/cuda/fitted.py"
# Rows of these commits are of other kernels: products of few rows by slabs, look-ups of n-grams and
# decisions by one thread.
EARLIER = ("b10ba12", "aa49918")
OPS = re.compile(r"\d+ ops ")  # how the name of a generated part begins
SLABS_FROM = 17  # rows of x: `kernels-h100.json` has products by slabs, which more rows still are
PRODUCTS = {
    "evabyte qkv": (4096, 12288), "evabyte out": (4096, 4096), "evabyte gate/up": (4096, 22016),
    "evabyte down": (11008, 4096), "llama qkv": (3072, 5120), "llama out": (3072, 3072),
    "llama gate/up": (3072, 16384), "llama down": (8192, 3072),
}  # fmt: skip
PASSES = ("verify", "decode")
LEAST = 3 << 20  # bytes of a product that is fitted to: a shorter one is all ends
WHOLE = 5.0  # weight of a whole pass beside that of a product
GENERATED = 40.0  # us: what an error of a generated kernel is taken relative to
GIVEN = ("generated",)  # no launch of so few phases is there to tell it from them
FIRST = cost.Constants(
    read=1.05, start=2.0, apart=3.0, staged=0.1, normed=0.1, sums=1.0, multiplied=0.05,
    widened=0.5, block=2.0, block_rate=30.0, sm_rate=40.0, summaries=2.0, phase=1.0,
    barrier=2.0, gathered=0.7, generated=3.0,
)  # fmt: skip
TRIES, SMALL = 200, 1e-6
DIGITS = 4  # of a constant
Row = Mapping[str, Any]
Errors = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Sample:
    """Launches with how often each is there, the GPU with its rate of a copy, and microseconds.

    An error counts relative to `scale`, in microseconds.
    """

    kind: str
    launches: tuple[tuple[cost.Work, int], ...]
    gpu: Gpu
    measured: float
    scale: float


def sample(kind: str, works: Iterable[cost.Work], gpu: Gpu, measured: float) -> Sample:
    """Return a sample of a part (`product`, `generated`) or of a whole pass (`pass`)."""
    counted = Counter(replace(w, layer="") for w in works)
    scale = {"generated": GENERATED, "pass": measured / WHOLE}.get(kind, measured)
    return Sample(kind, tuple(counted.items()), gpu, measured, scale)


# ------------------------------------------------------------ rows and their plans


def rows_of(path: Path = RESULTS / "h200.json") -> list[dict[str, Any]]:
    """Return the rows of the engine's rounds, whose `graphs` are timed too."""
    return [r for r in _own(path) if "graph" not in r]


def drafts_of(path: Path = RESULTS / "h200.json") -> list[dict[str, Any]]:
    """Return the rows of the engine's drafts alone."""
    return [r for r in _own(path) if r.get("graph") == "draft"]


def _own(path: Path) -> list[dict[str, Any]]:
    return [r for r in json.loads(path.read_text()) if r["backend"] == "pcc-cuda"]


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
    """Return the launches that this checkout makes for a graph of a row.

    A bundle with a latent-first round has the full draft as its graph `draft` all the same.
    """
    precision, _, integers = str(r["precision"]).partition("+")
    precision, _, part = precision.partition(", ")
    whose = "both" if integers else part.removesuffix(" int8")
    head = f"{r['architecture']},n={r['n']},r={r['r']}"
    plans = _plans(r["shape"], head, precision, whose in ("both", "verifier"), r["batch"],
                   r.get("max_seq", knobs.SEQUENCE))  # fmt: skip
    draft = r.get("proposal", knobs.PROPOSAL)
    if graph == "step" and r.get("forms"):
        (draft,) = r["forms"]
    return _built(plans, Form(draft, whose in ("both", "head")), graph, r["n"])


def gpu_of_row(r: Row) -> Gpu:
    """Return the GPU of a row: an H100 or an H200, whose copies differ."""
    return replace(TUNED, copy_rate=r["bandwidth_tb_s"])


def works_of(r: Row, graph: str) -> tuple[cost.Work, ...]:
    """Return the launches of a graph at the context of a row."""
    return cost.works(built(r, graph), partial(keys, context=r["context"]))


def current(r: Row) -> bool:
    """Whether the launches of a row were those that this checkout makes."""
    return r["commit"] not in EARLIER


# ------------------------------------------------------------ samples


def samples(r: Row) -> Iterator[Sample]:
    """Yield passes and parts of a current row."""
    if not current(r):
        return
    for graph in PASSES:
        if graph in r.get("graphs", ()):
            took = 1e3 * r["graphs"][graph]["p50"]
            yield sample("pass", works_of(r, graph), gpu_of_row(r), took)
    for w, count, measured in paired(r, r.get("graph", "step")):
        kind = "generated" if w.part == "generated" else "product"
        launch = replace(w, apart=count == 1)  # others follow their like, and overlap
        yield sample(kind, [launch], gpu_of_row(r), 1e3 * measured["ms"] / count)


def paired(r: Row, graph: str) -> Iterator[tuple[cost.Work, int, Row]]:
    """Yield (launch, how many alike, measured part) of streams of weights and generated kernels.

    Attention timed alone overlaps the next one, as it cannot between two products. What comes
    before all products are look-ups, of n-grams by searches, of which no phase is like another.
    """
    works = works_of(r, graph)
    measured = {(p["launches"], p["bytes"]): p for p in r["parts"]}  # names change more often
    drawn = [
        {"op": x.op.name, "layer": x.layer, "bytes": dict(x.bytes)}
        for x in built(r, graph).launches
    ]
    generated = [p for p in r["parts"] if OPS.match(p["layer"])]
    known, before = len(generated) == sum(w.part == "generated" for w in works), True
    for p in parts(drawn):
        w = works[p.launches[0]]
        before = before and not isinstance(w.of, cost.Product)
        if w.part == "generated":  # the number of ops in its name changes with any pass
            if known and not before:
                yield w, 1, generated[0]
            generated = generated[1:]
        elif w.part != "attention" and w.weights >= LEAST:
            if found := measured.get((len(p.launches), p.bytes)):
                yield w, len(p.launches), found


def product_samples(path: Path = RESULTS / "kernels-h100.json") -> Iterator[Sample]:
    """Yield the products by slabs that were timed alone, each after its like."""
    report = json.loads(path.read_text())
    gpu = replace(TUNED, copy_rate=report["copy"] / 1e12)
    for p in report["products"]:
        if p["asked"] is None and p["shape"] in PRODUCTS and p["rows"] >= SLABS_FROM:
            k, n = PRODUCTS[p["shape"]]
            kernel = linear("product", rows=p["rows"], k=k, n=n, dtype="bf16")
            if list(kernel.grid) == p["grid"]:
                w = cost.work(kernel, {"weights": p["bytes"]}, 0, "layers")
                yield sample("product", [w], gpu, 1e6 * p["overlap"])


# ------------------------------------------------------------ the fit


def error(s: Sample, c: cost.Constants) -> float:
    """Return by how many microseconds a sample is predicted too high."""
    return sum(n * cost.duration(w, s.gpu, c).whole for w, n in s.launches) - s.measured


def fitted(found: Sequence[Sample]) -> cost.Constants:
    """Return the constants of least squares, all at once, by Levenberg and Marquardt's method.

    Products and passes count by relative errors; generated kernels by microseconds, of which a
    round has few: what a phase takes differs, and a relative fit would favour the shortest.
    Over logarithms of the constants: so they stay positive, and steps do not depend on units.
    """
    for kind in ("product", "generated", "pass"):
        if not any(s.kind == kind for s in found):
            raise SystemExit(f"no measured part is a launch of kind '{kind}' of these plans")
    names = [n for n in vars(FIRST) if n not in GIVEN]

    def made(logs: Errors) -> cost.Constants:
        return replace(FIRST, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def errors(logs: Errors) -> Errors:
        c = made(logs)
        return np.array([error(s, c) / s.scale for s in found])

    return made(_least(errors, np.log([getattr(FIRST, n) for n in names])))


def _least(errors: Callable[[Errors], Errors], at: Errors) -> Errors:
    """Return where the sum of the squares of errors is least, from `at` on."""
    r, damping = errors(at), 1e-3
    for _ in range(TRIES):
        slopes = np.stack([(errors(at + d) - r) / SMALL for d in SMALL * np.eye(len(at))], 1)
        square = slopes.T @ slopes
        damped = square + damping * np.diag(np.diag(square) + SMALL)
        tried = at - np.linalg.solve(damped, slopes.T @ r)
        after = errors(tried)
        before, now = np.sum(r**2), np.sum(after**2)
        if now >= before:
            damping *= 4
        elif now > before * (1 - SMALL**2):
            break
        else:
            at, r, damping = tried, after, damping / 3
    return at


# ------------------------------------------------------------ how well it holds


def judged(
    rows: Sequence[Row], c: cost.Constants = cost.MEASURED
) -> Iterator[tuple[Row, str, float, float]]:
    """Yield (row, graph, measured, predicted) in ms for each graph of each row."""
    for r in rows:
        whole = {r["graph"]: r["round_ms"]} if "graph" in r else {}
        for graph, measured in whole.items() or ((g, x["p50"]) for g, x in r["graphs"].items()):
            predicted = cost.predict(works_of(r, graph), gpu_of_row(r), c).ms
            yield r, graph, measured, predicted


def table(found: Sequence[tuple[Row, str, float, float]]) -> str:
    """Return rounds, one-token passes and drafts beside their predictions, as Markdown."""
    shown = {"step": "round", "decode": "one token", "draft": "draft"}
    columns = ["GPU", "shape, head", "precision", "batch", "context"]
    for name in shown.values():
        columns += [f"{name} ms", "predicted", "error"]
    lines: dict[int, dict[str, list[str]]] = {}
    for r, graph, measured, predicted in found:
        error = f"{100 * (predicted / measured - 1):+.1f} %"
        lines.setdefault(id(r), {"": _about(r)})[graph] = [
            *(f"{ms:.{2 if ms >= 1 else 3}f}" for ms in (measured, predicted)), error
        ]  # fmt: skip
    return markdown.table(
        columns,
        [sum((cells.get(g, ["-"] * 3) for g in shown), cells[""]) for cells in lines.values()],
    )


def _about(r: Row) -> list[str]:
    card = str(r["gpu"]).removeprefix("NVIDIA ").split()[0]
    named = "".join(f", {x}" for x in r.get("forms", ())) + (
        f", {r['proposal']} alone" if "proposal" in r else ""
    )
    head = f"{r['shape']}, {r['architecture']} n={r['n']}{named}"
    card = card if current(r) else f"{card}, earlier launches"
    return [card, head, r["precision"], str(r["batch"]), str(r["context"])]


def worst(found: Sequence[tuple[Row, str, float, float]]) -> dict[str, float]:
    """Return the largest errors of rounds and one-token passes, and of drafts, of current rows."""
    out = {}
    for name, graphs in (("round", ("step", "decode")), ("draft", ("draft",))):
        own = [abs(b / a - 1) for r, of, a, b in found if of in graphs and current(r)]
        if not own:
            raise SystemExit(f"no row is of the launches that this checkout makes ('{name}')")
        out[name] = max(own)
    return out


def source(c: cost.Constants, errors: Mapping[str, float]) -> str:
    """Return the text of `backends/cuda/fitted.py`."""
    values = "".join(f'    "{k}": {v:.{DIGITS}g},\n' for k, v in asdict(c).items())
    return (
        '"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""\n\n'
        "from __future__ import annotations\n\n"
        f"FITTED = {{\n{values}}}\n"
        "# The largest errors of rounds and one-token passes, and of drafts, of current rows.\n"
        f"ROUND_ERROR = {errors['round']:.3f}\n"
        f"DRAFT_ERROR = {errors['draft']:.3f}\n"
    )


def main() -> None:
    """Fit, judge, and write where that is asked."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    p.add_argument("--write", action="store_true")
    write = p.parse_args().write
    rows = [*rows_of(), *drafts_of()]
    found = [*(s for r in rows for s in samples(r)), *product_samples()]
    c = fitted(found)
    c = replace(c, **{k: float(f"{v:.{DIGITS}g}") for k, v in asdict(c).items()})  # as it is kept
    for kind in sorted({s.kind for s in found}):
        off = [error(s, c) / s.measured for s in found if s.kind == kind]
        print(f"{kind}: {len(off)} samples, rms {100 * np.sqrt(np.mean(np.square(off))):.1f} %, "
              f"worst {100 * np.abs(off).max():.0f} %")  # fmt: skip
    print(json.dumps(asdict(c)))
    ends = list(judged(rows, c))
    if write:
        MADE.write_text(source(c, worst(ends)))
        start, stop = "<!-- cost: written by benchmarks/gpu/cost_fit.py -->\n", "<!-- end cost -->"
        PAGE.write_text(markdown.placed(PAGE.read_text("utf-8"), start, stop, table(ends)), "utf-8")
    for r, graph, measured, predicted in ends:
        print(f"{r['name']:66} {_about(r)[0][:4]} {graph:7} {measured:.3f} {predicted:.3f} "
              f"{100 * (predicted / measured - 1):+.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
