"""Times drafts alone: a head of true width, without a verifier, against the bytes of its weights.

    python benchmarks/gpu/drafts.py [--target cuda] [--precision bf16] [--head cp,n=16,r=32]...
        [--proposal full|latent-first]... [--shape evabyte-6.5b] [--json ROWS.json]

A draft is conditioned on a carry. `full` computes every expert, `latent-first` draws the latents
and reads the weights of the chosen experts. One CUDA graph, timed by events between launches that
are enqueued back to back; weights of the full head exceed the L2 many times. The sums of q must be
1 within 1e-5, else nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

HEADS = ("ff,n=16", "cp,n=16,r=32", "hmm,n=16,r=32", "btree,n=16,r=32")
Row = dict[str, Any]


def written(shape: str, head: str, proposal: str, how: Any, out: Path) -> None:
    """Write a bundle whose one graph, "draft", is the sampled draft of a random head."""
    from pcc.conformance.bundles import write_modules
    from pcc.models.proposal import sampled
    from pcc.passes.manager import Manager
    from pcc.passes.pipelines import storage_pipeline
    from pcc.shapes import Synthetic
    from pcc.targets import HALF_OF, target_of

    circuit, manager = Synthetic(shape).head(head), Manager(validate=False)
    if storage := storage_pipeline(HALF_OF[how.precision]):
        half = manager.run(circuit.module(), storage)
        circuit = type(circuit)(half.roots[0], circuit.cards, circuit.name)
    maps = target_of(how.target, how.precision).static  # as `pcc compile` does
    module = sampled(circuit, manager, proposal, truncation=False, maps=maps).module
    write_modules(how, {"draft": module}, out)


def checked(engine: Any, feed: dict[str, Any], what: str) -> float:
    """Draft once; return by how much the sums of q are off 1, at most 1e-5."""
    kinds = {i["name"]: i["dtype"] for i in engine.queries["draft"]["inputs"]}
    numpy = {"f32": np.float32, "i64": np.int64}
    q = engine.run("draft", **{k: np.asarray(v, numpy[kinds[k]]) for k, v in feed.items()})["q"]
    worst = float(np.abs(q.astype(np.float64).sum(-1) - 1).max())
    if not worst <= 1e-5:
        raise SystemExit(f"{what}: the sums of q are off by {worst}")
    return worst


def named(shape: str, head: str, proposal: str, how: Any) -> Row:
    """Return what a row says of the draft that it is of."""
    from pcc.shapes import parse_head

    kind, n, r = parse_head(head)
    sizes = f"n{n}-r{r}-b{how.batch}-{how.precision}"
    return {
        "name": f"draft-{proposal}-{how.target}-{shape}-{kind}-{sizes}",
        "graph": "draft", "proposal": proposal, "shape": shape,
        "backend": "pcc-cuda" if how.target == "cuda" else how.target,
        "architecture": kind, "n": n, "r": r, "batch": how.batch, "context": 0,
        "precision": how.precision, "torch_graph_ms": None, "torch_precision": None,
    }  # fmt: skip


def measured(shape: str, head: str, proposal: str, how: Any, repeats: int, tb_s: float) -> Row:
    """Compile, check and time one draft; return a row of the results."""
    import pcc
    from pcc.runtime.bound import row
    from pcc.runtime.measure_gpu import Bench, parts_of, plausible
    from pcc.runtime.traffic import traffic

    about = named(shape, head, proposal, how)
    with tempfile.TemporaryDirectory(prefix="pcc-draft-") as folder:
        out = Path(folder) / "m.pcc"
        began = time.perf_counter()
        written(shape, head, proposal, how, out)
        built = time.perf_counter() - began
        engine = pcc.load(out, provider=how.provider)
        spec = engine.queries["draft"]
        feed = plausible(spec, 1, int(engine.manifest["circuit"]["cards"][0]), how.batch)
        worst = checked(engine, feed, f"{head} {proposal}")
        device, executor = engine.executor("draft")
        bench = Bench(device, executor, spec, (), how.batch, feed)
        times, wall = bench.times(repeats), bench.wall(repeats)
        parts = parts_of(bench, max(5, repeats // 4), tb_s)
        # A plan says what each launch reads, the rows of chosen experts included.
        weights = sum(p["bytes"] for p in parts) or sum(
            traffic(out, engine.manifest["files"], "draft").weights.values()
        )
        bench.free()
    made = row(about, times, {"weights": 0, "head": weights, "kv": 0}, tb_s, repeats)
    return {**made, "wall_ms": wall, "parts": parts, "compile_s": built, "error_of_sums": worst}


def main() -> None:
    """Measure what is asked for; rows are written as they come."""
    from pcc.cli.bench_gpu import commit
    from pcc.cli.conformance import versions
    from pcc.conformance.bundles import Setting
    from pcc.runtime.device.driver import device
    from pcc.runtime.measure_gpu import copy_bandwidth

    p = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    p.add_argument("--target", default="cuda")
    p.add_argument("--provider", default="cuda")
    p.add_argument("--precision", default="bf16")
    p.add_argument("--shape", default="evabyte-6.5b")
    p.add_argument("--head", action="append")
    p.add_argument("--proposal", action="append", choices=("full", "latent-first"))
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeats", type=int, default=100)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    how = Setting(a.target, a.provider, a.precision, a.batch)
    gpu, rows = device(), []
    tb_s = copy_bandwidth(gpu)
    for head in a.head or HEADS:
        for proposal in a.proposal or ("full", "latent-first"):
            made = measured(a.shape, head, proposal, how, a.repeats, tb_s)
            date = datetime.now(UTC).isoformat(timespec="seconds")
            made |= {"versions": versions(), "gpu": gpu.name, "commit": commit(), "date": date}
            rows.append(made)
            print(f"{made['name']}: {made['round_ms']:.4f} ms, bytes {made['bound_ms']:.4f} ms,"
                  f" compiled in {made['compile_s']:.0f} s", flush=True)  # fmt: skip
            if a.json:
                a.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
