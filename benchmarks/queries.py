"""Time compiled queries against other ways to run the same circuits, in one interleaved run.

    python benchmarks/queries.py [--json FILE] [--quick] [--only TEXT]

draft-*   the `draft` query, logits in, V=320, r=32 (ff: 1), batch 1, against the masked strategy
          in plain torch (`baselines`) in its three forms: "masked-open" (the same answer,
          the cheapest form), "masked-expand" (the same answer, the published row routine),
          "masked-prefix" (only prefix marginals: less than `draft` answers).
loglik-*  the log-likelihood, 8 variables x 256 values, 32 units, against libcirkit 0.3.0 exported
          by torch.onnx.export, under ONNX Runtime (`cirkit_side`).

`pcc_us` is `engine.run` with its checks, `pcc_raw_us` the ONNX Runtime session alone; `ratio` and
`ratio_raw` are the baseline's time over these. The baseline of loglik is a raw session as well.
Nothing is timed before it is shown to agree: masked conditionals with pcc's q on pcc's own tokens,
log-likelihoods with each other and with float64, all within 1e-4.
Exit code: 0, or 1 where a parity check failed, or 3 where pcc could not run a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file: make `benchmarks` importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import pcc_side
from benchmarks.baselines import KINDS, Masked, Rows, random_logits
from benchmarks.cirkit_side import CIRKIT_KINDS, CirkitCase, MissingPackageError, cirkit_export
from benchmarks.timing import Call, Timing, environment, interleaved

TOLERANCE = 1e-4
THREADS = 1
VOCAB, RANK = 320, 32
FORMS: dict[str, Rows] = {"masked-open": "open", "masked-expand": "expand", "masked-prefix": False}
Row = dict[str, Any]


def _result(row: Row, times: Mapping[str, Timing], base: str) -> Row:
    run, raw, other = times["pcc"], times["pcc_raw"], times[base]
    return {
        **row, "status": "ok",
        **run.json("pcc"), **raw.json("pcc_raw"), **other.json("baseline"),
        "ratio": round(other.median / run.median, 2),
        "ratio_raw": round(other.median / raw.median, 2),
        "repeats": run.repeats,
    }  # fmt: skip


def draft_rows(kind: str, n: int, seconds: float) -> list[Row]:
    """Compile, check and time one draft head."""
    r = 1 if kind == "ff" else RANK
    row: Row = {
        "name": f"draft-{kind}-n{n}", "query": "draft", "kind": kind, "n": n, "r": r,
        "V": VOCAB, "batch": 1,
    }  # fmt: skip
    try:
        ours = pcc_side.draft(kind, n, r, VOCAB, THREADS)
    except pcc_side.UnavailableError as e:
        return [{**row, "status": "unavailable", "reason": str(e)}]
    try:
        return _draft_rows(row, ours, seconds)
    finally:
        ours.close()


def _draft_rows(row: Row, ours: pcc_side.Compiled, seconds: float) -> list[Row]:
    row |= _built(ours)
    masked = Masked(row["kind"], row["n"], row["r"], VOCAB)
    worst, inputs = _draft_errors(masked, ours)
    if bad := [name for name, error in worst.items() if not error <= TOLERANCE]:
        why = {k: f"{v:.3g}" for k, v in worst.items()}
        return [
            {**row, "baseline": name, "status": "parity failed", "parity_max_abs": worst[name],
             "reason": f"q differs: {why}"}
            for name in bad
        ]  # fmt: skip
    logits = _logits(inputs)
    carry, u = torch.from_numpy(inputs["carry"]), torch.rand(1, masked.uniforms)

    def base(form: Rows) -> Call:
        return lambda: masked.draft(carry, u, *logits, rows=form)

    calls: dict[str, Call] = {"pcc": lambda: ours.run(inputs), "pcc_raw": lambda: ours.raw(inputs)}
    times = interleaved(calls | {k: base(f) for k, f in FORMS.items()}, seconds)
    return [
        _result({**row, "baseline": name, "parity_max_abs": worst[name]}, times, name)
        for name in FORMS
    ]


def _draft_errors(
    masked: Masked, ours: pcc_side.Compiled
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return how far q is from each form's, on pcc's own tokens, and the last inputs."""
    kind, n, r = masked.kind, masked.n, masked.r
    rng = np.random.default_rng(5)
    worst = dict.fromkeys(FORMS, 0.0)
    inputs: dict[str, Any] = {}
    for seed in range(3):
        emission, sums = random_logits(kind, n, r, VOCAB, seed=seed)
        carry = rng.integers(0, VOCAB, 1)
        u = rng.random((1, ours.width("u")), np.float32)
        u = np.minimum(u, np.float32(1 - 2**-24))
        inputs = pcc_side.draft_inputs(carry, u, emission, sums)
        got = ours.run(inputs)
        tokens = torch.from_numpy(np.concatenate((carry, got["x"][0])))
        for name, form in FORMS.items():
            want = masked.conditionals(tokens, *_logits(inputs), rows=form).numpy()
            q = got["q"][0]
            if form is False:
                q = q[np.arange(n - 1), got["x"][0]]
            worst[name] = max(worst[name], _distance(q, want))
    return worst, inputs


def _logits(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits of emissions and of sums among the inputs of a draft."""
    sums = [torch.from_numpy(a) for k, a in inputs.items() if k.startswith("sum_logits.")]
    return torch.from_numpy(inputs["emission_logits"]), sums


def _built(ours: pcc_side.Compiled) -> Row:
    """Return what a row says of how a query was made."""
    return {
        "compile_s": round(ours.compile_seconds, 3),
        "load_s": round(ours.load_seconds, 3),
        "nodes": ours.nodes,
    }


def loglik_rows(kind: str, batches: tuple[int, ...], seconds: float) -> list[Row]:
    """Build, export, compile, check and time one trained circuit."""
    n, vocab, units = 8, 256, 32
    row: Row = {
        "name": f"loglik-{kind}", "query": "loglik", "kind": kind, "n": n, "r": units,
        "V": vocab, "baseline": "cirkit-onnx",
    }  # fmt: skip
    try:
        case = cirkit_export(kind, n=n, vocab=vocab, units=units, threads=THREADS)
    except MissingPackageError as e:
        return [{**row, "status": "not installed", "reason": str(e)}]
    try:
        ours = pcc_side.loglik(case, THREADS)
    except pcc_side.UnavailableError as e:
        return [{**row, "status": "unavailable", "reason": str(e)}]
    row |= _built(ours)
    try:
        return [_loglik_row(row, ours, case, batch, seconds) for batch in batches]
    finally:
        ours.close()


def _loglik_row(
    row: Row, ours: pcc_side.Compiled, case: CirkitCase, batch: int, seconds: float
) -> Row:
    """Check and time one size of batch."""
    x = np.random.default_rng(batch).integers(0, row["V"], (batch, row["n"]))
    got, theirs, exact = ours.run({"x": x})["log_prob"], case.run(x), case.reference(x)
    error, against = _distance(got, theirs), _distance(got, exact)
    line = {
        **row, "name": f"{row['name']}-b{batch}", "batch": batch,
        "parity_max_abs": error, "error_f64_max_abs": against,
        "baseline_error_f64_max_abs": _distance(theirs, exact),
    }  # fmt: skip
    if not max(error, against) <= TOLERANCE:
        reason = f"log_prob differs by {error:.3g}, from float64 by {against:.3g}"
        return {**line, "status": "parity failed", "reason": reason}
    calls: dict[str, Call] = {
        "pcc": lambda: ours.run({"x": x}),
        "pcc_raw": lambda: ours.raw({"x": x}),
        "cirkit": lambda: case.run(x),
    }
    return _result(line, interleaved(calls, seconds), "cirkit")


def _distance(a: Any, b: Any) -> float:
    """Return max |a - b|; infinite for different shapes, NaN counts as infinite."""
    if np.shape(a) != np.shape(b):
        return float("inf")
    worst = float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
    return worst if worst == worst else float("inf")


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    out = [
        f"{'name':25}{'baseline':15}{'pcc us':>10}{'raw us':>10}{'baseline us':>13}"
        f"{'ratio':>8}{'raw':>8}{'parity':>10}{'compile s':>11}"
    ]
    for r in rows:
        head = f"{r['name']:25}{r.get('baseline', ''):15}"
        if r["status"] != "ok":
            out.append(f"{head}{r['status']}: {r.get('reason', '')}")
            continue
        out.append(
            f"{head}{r['pcc_us']:10.1f}{r['pcc_raw_us']:10.1f}{r['baseline_us']:13.1f}"
            f"{r['ratio']:8.2f}{r['ratio_raw']:8.2f}{r['parity_max_abs']:10.1e}{r['compile_s']:11.2f}"
        )
    return "\n".join(out)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).resolve().parent / "results" / "queries.json"
    parser.add_argument("--json", type=Path, default=default, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="n=8 and batch 1 only, few repeats")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this text")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    seconds = 0.5 if options.quick else 4.0
    env = environment(THREADS)
    rows: list[Row] = []
    for n in (8,) if options.quick else (8, 16):
        for kind in KINDS:
            if options.only in f"draft-{kind}-n{n}":
                rows += draft_rows(kind, n, seconds)
    for name in CIRKIT_KINDS:
        batches = (1,) if options.quick else (1, 64, 1024)
        if chosen := tuple(b for b in batches if options.only in f"loglik-{name}-b{b}"):
            rows += loglik_rows(name, chosen, seconds)
    print(f"{env['processor']}, {env['cpus']} cpus, {THREADS} thread, {env['date']}")
    print(" ".join(f"{k} {v}" for k, v in env["versions"].items()))
    print(table(rows))
    settings = {"quick": options.quick, "only": options.only, "tolerance": TOLERANCE}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": env, "settings": settings, "rows": rows}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    states = {r["status"] for r in rows}
    if "parity failed" in states:
        return 1
    return 3 if "unavailable" in states else 0


if __name__ == "__main__":
    sys.exit(main())
