"""`pcc bench --gpu`: a round beside the time that its bytes take at the bandwidth of a copy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pcc
from pcc.cli import plots
from pcc.cli.output import emit, progress, table
from pcc.cli.row_names import forms, mixture, name_of
from pcc.errors import PccError

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

# Tokens that a sampled round of the published heads has accepted of its drafts, by shape: what
# bytes per second are stated at, since random weights accept nothing (arXiv 2511.11346, no LoRA).
ACCEPTED = {"evabyte-6.5b": 6.8, "byte-llama-3.2-3b": 2.27}


@dataclass(frozen=True)
class Asked:
    """What is to be timed."""

    bundles: tuple[Path, ...]
    provider: str
    contexts: tuple[int, ...]
    repeats: int
    shape: str = ""
    accepted: float | None = None


UNUSED = ("prompts", "max_new_tokens", "limit", "prompt_bytes", "sampled", "threads")
ONLY_GPU = ("also", "context", "accepted", "shape", "json_out")


def refuse_unused(given: Sequence[str], *, gpu: bool) -> None:
    """Refuse options, by their names here, that this kind of `pcc bench` does not read: C138."""
    for name in UNUSED if gpu else ONLY_GPU:
        if name in given:
            what = f"--{name.replace('_', '-')} is not read {'with' if gpu else 'without'} --gpu"
            raise PccError("C138", what, hint="leave it out" if gpu else "--gpu")


def bench_gpu(a: Asked, plot: Path | None, json_out: Path | None, *, as_json: bool) -> None:
    """Measure every bundle at every context; print a table or JSON.

    The rows are written after each one, so that a run that is cut off leaves those it had.
    """
    from pcc.circuit.text import write
    from pcc.runtime.device.driver import device
    from pcc.runtime.measure_gpu import copy_bandwidth

    if plot is not None:
        plots.ready(plot)
    if json_out is not None and not json_out.parent.is_dir():
        raise PccError("C134", "there is no such folder", at=str(json_out.parent))
    gpu = device()
    bandwidth = copy_bandwidth(gpu)
    progress(f"copies run at {bandwidth:.2f} TB/s on {gpu.name}")
    rows: list[dict[str, Any]] = []
    for path in a.bundles:
        engine = pcc.load(path, provider=a.provider)
        for made in rows_of(engine, a, bandwidth, gpu.name):
            rows.append(made)
            if json_out is not None:
                write(json_out, json.dumps(rows, indent=1).encode())
        del engine  # its weights make room for the next
    if plot is not None:
        plots.draw_gpu(rows, plot)
    if as_json:
        emit(rows)
    else:
        show(rows)


def accepted_of(a: Asked, shape: str, n: int) -> float:
    """Return the drafts of a round that rates suppose to be kept: of n - 1. Errors: C135."""
    if a.accepted is None:
        return min(ACCEPTED.get(shape, 1.0), n - 1)
    if not 0 <= a.accepted <= n - 1:
        what = f"--accepted {a.accepted:g}: a round of this bundle drafts {n - 1} tokens"
        raise PccError("C135", what, hint=f"from 0 to {n - 1}")
    return a.accepted


def rows_of(engine: Engine, a: Asked, bandwidth: float, gpu: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each context of one bundle."""
    from pcc.runtime.bound import rates, row
    from pcc.runtime.measure_gpu import graph_times
    from pcc.runtime.traffic import moved

    query = "step"
    batch = int(engine.spec_of(query).get("batch", 1))
    about = about_of(engine, a, gpu, batch)
    accepted = accepted_of(a, about["shape"], about["n"])
    for context in a.contexts:
        progress(f"{engine.path.name}: context {context}")
        times = graph_times(engine, query, context, batch, a.repeats, bandwidth)
        bytes_moved = moved(engine.path, engine.manifest, query, context, batch)
        whole = times[query]
        made = row({"name": name_of(about, context), **about, "context": context,
                    "torch_graph_ms": None, "torch_precision": None, "date": now()},
                   whole["events"], bytes_moved, bandwidth, a.repeats)  # fmt: skip
        decode = times.get("decode", {}).get("events", {}).get("p50")
        made["wall_ms"], made["session_ms"] = whole["wall"], whole["session"]
        made["host_gap_us"] = 1e3 * (whole["session"]["p50"] - whole["session_events"]["p50"])
        made["graphs"] = {q: t["events"] for q, t in times.items()}
        made["parts"] = times[query].get("parts", [])
        made["rates"] = rates(whole["events"]["p50"], decode, accepted, batch)
        yield made


def about_of(engine: Engine, a: Asked, gpu: str, batch: int) -> dict[str, Any]:
    """Return the entries of a row that do not depend on what is measured."""
    from pcc.cli.conformance import versions

    m = engine.manifest
    circuit, variants = m["circuit"], m.get("variants") or [{}]
    kind = variants[0].get("format", "onnx")
    backend = {"cuda": "pcc-cuda", "onnx": "onnxruntime-cuda"}.get(kind, m["target"])
    verifier = m["verifier"] or {}
    synthetic = verifier.get("synthetic") or {}
    shape = a.shape or str(synthetic.get("shape") or verifier.get("kind") or "unknown")
    return {
        "backend": backend, "shape": shape, "architecture": circuit["kind"],
        "n": circuit["n"], "r": circuit["r"], "batch": batch,
        "precision": mixture(m["precision"]), "forms": forms(m),
        "versions": versions(), "gpu": gpu, "commit": commit(),
        "max_seq": engine.generation()["max_seq"],
    }  # fmt: skip


def now() -> str:
    """Return the time in UTC, by which later rows replace earlier ones."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """Return the commit of the checkout that this program is run from, if it is one."""
    root = Path(pcc.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows, the graphs alone, and where a round's time goes."""
    lines = []
    for r in rows:
        moved = r["bytes_moved"]
        lines.append([
            r["name"], f"{r['round_ms']:.3f}", f"{r['p10']:.3f}", f"{r['p90']:.3f}",
            f"{sum(moved.values()) / 1e9:.2f}", f"{r['bound_ms']:.3f}",
            f"{r['ratio_to_bound']:.2f}", f"{100 * r['copy_share']:.0f} %",
            "{:.0f} to {:.0f}".format(*r["rates"]["tokens_per_second"])
            + f" at {r['rates']['acceptance']:g}",
            _number(r["rates"]["break_even_tokens"]),
        ])  # fmt: skip
    head = rows[0]
    title = f"{head['gpu']}, copies at {head['bandwidth_tb_s']:.2f} TB/s"
    table(title, ["round", "p50 ms", "p10", "p90", "GB", "bound ms", "ratio", "of copy",
                  "tokens/s", "break-even"], lines)  # fmt: skip
    for r in rows:
        graphs = [[q, f"{t['p50']:.3f}", f"{t['p10']:.3f}", f"{t['p90']:.3f}"]
                  for q, t in r["graphs"].items()]  # fmt: skip
        table(f"graphs alone, context {r['context']}, batch {r['batch']}",
              ["graph", "p50 ms", "p10", "p90"], graphs)  # fmt: skip
        parts = [
            [p["part"], p["layer"], str(p["launches"]), f"{p['ms']:.3f}",
             f"{p['bytes'] / 1e9:.3f}", _number(p["of_copy"])]
            for p in r["parts"]
        ]  # fmt: skip
        if parts:
            table("parts of a round, each alone",
                  ["part", "layers", "launches", "ms", "GB", "of copy"], parts)  # fmt: skip


def _number(v: float | None) -> str:
    return "-" if v is None else f"{v:.2f}"


def checked(contexts: Sequence[int], repeats: int) -> tuple[int, ...]:
    """Return contexts without repetition; C135 where a number is out of range."""
    if repeats < 5 or any(c < 1 for c in contexts):
        raise PccError("C135", "contexts are from 1 and repeats from 5")
    return tuple(dict.fromkeys(contexts)) or (1024,)
