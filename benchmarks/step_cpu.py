"""One round of generation by part, one thread, against the published loop in eager torch.

    python benchmarks/step_cpu.py [--json FILE] [--quick] [--only TEXT]

D=256, V=320, r=32 (ff: 1), 4 layers, fp32, sampling, batch 1, 200 tokens in the cache. Both sides
hold the same weights; before anything is timed, logits of the verifier and rows of the draft agree.
Everything is timed in one interleaved run; figures are 10th percentiles, medians are in the JSON:

torch      a round of `torch_loop.py`, by part
step       the graph of a round, everything inside; step_greedy likewise
verify     the graph of the verifier's pass over n tokens alone
head       the head's matrix products alone, on the same weight file; `head_gbs` what they read per
           second, `copy_gbs` what a plain copy of as many bytes reads (it writes as much again)
rest       step - verify - head: accept, draw, normalise, sample, update
latent     step with the proposal "latent-first"
Acceptance is that of one head under both proposals on weights that are not trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file: make `benchmarks` importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import KINDS, Masked
from benchmarks.round_case import VOCAB, WIDTH, Case, make
from benchmarks.timing import Call, Timing, environment, interleaved
from benchmarks.torch_loop import PARTS, Backbone, Loop

LENGTH, ROWS, PROMPT = 200, 512, 64
Row = dict[str, Any]


def compiled(case: Case, kind: str, n: int, r: int, out: Path, proposal: str) -> Any:
    """Compile a bundle and open it with one thread."""
    import pcc
    from pcc import templates

    sizes = {"n": n, "vocab": VOCAB, "context": WIDTH} | ({} if kind == "ff" else {"r": r})
    circuit = getattr(templates, kind)(
        **sizes, weights={"emissions": case.emission, "sums": case.sums}
    )
    start = time.perf_counter()
    pcc.compile(
        circuit, verifier=case.folder, max_seq=ROWS - 64, queries=["draft"], out=out,
        proposal=proposal,
    )  # fmt: skip
    return pcc.load(out, threads=1), time.perf_counter() - start


def graph(engine: Any, query: str) -> Any:
    """Return a graph bound to buffers with plausible contents."""
    from pcc.runtime.buffers import Call as Bound
    from pcc.runtime.buffers import States

    spec, one = engine.generation(), engine.queries[query]
    bound = Bound(engine.session_of(query, 1), one, 1)
    if any(i["name"].startswith("past.") for i in one["inputs"]):
        states = States(spec["states"], 1)
        states.resize(next(b for b in spec["buckets"] if b["rows"] >= LENGTH + 64)["states"])
        for b in states.past.values():
            b.array[:] = np.random.default_rng(1).standard_normal(b.array.shape)
        bound.attach(states)  # the binding keeps the buffers alive
    fill = {"length": LENGTH, "active": True, "temperature": 1.0, "top_p": 1.0,
            "draft_temperature": 1.0, "draft_top_p": 1.0, "u": 0.5}  # fmt: skip
    for name, b in bound.inputs.items():
        if name in fill:
            b.array[:] = fill[name]
        elif name == "draft_q":
            b.array[:] = 1.0 / VOCAB
    return bound


def head_session(engine: Any) -> Any:
    """Return the head's matrix products alone, over the weight file of the bundle."""
    import onnx
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession, SessionOptions

    spec = engine.queries["step"]
    file = engine.path / spec.get("one_row", spec["graph"])
    full = onnx.load(str(file), load_external_data=False)
    streams = {i.name for i in full.graph.input} & {i.name for i in full.graph.initializer}
    weights = [i for i in full.graph.initializer if i.name in streams]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    nodes = [helper.make_node("MatMul", ["x", w.name], [f"y{i}"]) for i, w in enumerate(weights)]
    outs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None)
            for i in range(len(weights))]  # fmt: skip
    taken = [x, *(i for i in full.graph.input if i.name in streams)]
    model = helper.make_model(
        helper.make_graph(nodes, "head", taken, outs, weights),
        opset_imports=list(full.opset_import), ir_version=full.ir_version,
    )  # fmt: skip
    place = file.parent / "head-alone.onnx"
    place.write_bytes(model.SerializeToString())
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return InferenceSession(str(place), options, providers=["CPUExecutionProvider"])


def parity(case: Case, engine: Any, loop: Loop, n: int) -> dict[str, float]:
    """Compare the verifier's logits and the draft's rows on both sides."""
    from pcc.runtime.buffers import Call as Bound
    from pcc.runtime.buffers import States

    rng = np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, PROMPT)
    spec = engine.generation()
    bound = Bound(engine.session_of("verify", 1), engine.queries["verify"], 1)
    states = States(spec["states"], 1)
    states.resize(spec["buckets"][-1]["states"])
    bound.attach(states)
    ours, features = [], []
    for start in range(0, PROMPT, n):
        bound["input_ids"][0] = ids[start : start + n]
        bound["length"][0] = start
        bound.run()
        states.settle()
        ours.append(bound["logits"][0].copy())
        features.append(bound["hidden_states"][0].copy())
    with torch.no_grad():
        _, theirs = loop.backbone(torch.from_numpy(ids), 0)
    off = np.abs(np.concatenate(ours) - theirs.numpy()).max()
    hidden = features[-1][-1:]
    width = next(i["shape"][-1] for i in engine.queries["draft"]["inputs"] if i["name"] == "u")
    u = rng.random((1, width), np.float32).clip(max=1 - 2**-24)
    got = engine.run("draft", carry=ids[:1], u=u, context=hidden)
    tokens = torch.from_numpy(np.concatenate((ids[:1], got["x"][0])))
    with torch.no_grad():
        emission, *sums = loop.head(torch.from_numpy(hidden[0]))
        want = loop.masked.conditionals(tokens, emission[None], [s[None] for s in sums])
    return {
        "logits": float(off / max(1.0, float(theirs.abs().max()))),
        "q": float(np.abs(got["q"][0] - want.numpy()).max()),
    }


def acceptance(engine: Any, quick: bool) -> dict[str, float]:
    """Generate sampled text; return tokens per round and the host's time between rounds."""
    engine.session(seed=1).generate_ids([1, 2, 3], 8)  # opens the graphs
    prompt = np.random.default_rng(9).integers(0, VOCAB, PROMPT).tolist()
    session, gaps = engine.session(seed=7), _Gaps()
    with gaps:
        made = session.generate_ids(prompt, 100 if quick else 360)
    s = session.rounds.statistics.summary()
    return {"tokens_per_round": round(s["tokens_per_round"], 3), "tokens": len(made),
            "host_us": round(float(np.median(gaps.us[1:])), 1)}  # fmt: skip


class _Gaps:
    """Microseconds from the end of one call of a graph to the start of the next."""

    def __enter__(self) -> None:
        from pcc.runtime.buffers import Call as Bound

        self.us: list[float] = []
        self.run, last = Bound.run, [0.0]

        def run(call: Any) -> None:
            if last[0]:
                self.us.append((time.perf_counter() - last[0]) * 1e6)
            self.run(call)
            last[0] = time.perf_counter()

        setattr(Bound, "run", run)  # noqa: B010

    def __exit__(self, *_: object) -> None:
        from pcc.runtime.buffers import Call as Bound

        setattr(Bound, "run", self.run)  # noqa: B010


def measure(kind: str, n: int, seconds: float, quick: bool, folder: Path) -> Row:
    """Compile, check and time one kind of head."""
    r = 1 if kind == "ff" else 32
    case = make(folder / "model", kind, n, r)
    engine, full_s = compiled(case, kind, n, r, folder / "full.pcc", "full")
    lazy, lazy_s = compiled(case, kind, n, r, folder / "latent.pcc", "latent-first")
    emission, sums = torch.from_numpy(case.emission), [torch.from_numpy(s) for s in case.sums]
    loop = Loop(Masked(kind, n, r, VOCAB), Backbone(case.config, case.state, ROWS), emission, sums)
    errors = parity(case, engine, loop, n)
    row: Row = {"name": f"{kind}-n{n}", "kind": kind, "n": n, "r": r, "parity": errors,
                "compile_s": round(full_s, 2), "compile_latent_s": round(lazy_s, 2)}  # fmt: skip
    if not (errors["logits"] <= 2e-5 and errors["q"] <= 1e-4):
        return {**row, "status": "parity failed"}
    row["full"], row["latent"] = acceptance(engine, quick), acceptance(lazy, quick)
    with torch.no_grad():
        loop.start(torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, LENGTH)))
    parts: dict[str, list[float]] = {p: [] for p in PARTS}
    accepted: list[int] = []

    def torch_round() -> None:
        loop.round(torch.rand(n))
        accepted.append(loop.accepted)
        for p in PARTS:
            parts[p].append(loop.seconds[p] * 1e3)

    head, x = head_session(engine), np.ones((1, WIDTH), np.float32)
    source = np.ones(case.head_bytes // 4, np.float32)
    target = np.empty_like(source)
    calls: dict[str, Call] = {
        "step": graph(engine, "step").run,
        "verify": graph(engine, "verify").run,
        "head": lambda: head.run(None, {"x": x}),
        "step_greedy": graph(engine, "step_greedy").run,
        "latent": graph(lazy, "step").run,
        "decode": graph(engine, "decode").run,
        "copy": lambda: np.copyto(target, source),
        "torch": torch_round,
    }
    times = interleaved(calls, seconds)
    return {**row, "status": "ok", **_figures(case, times, parts, accepted)}


def _figures(
    case: Case, times: dict[str, Timing], parts: dict[str, list[float]], accepted: list[int]
) -> Row:
    # Other load only ever adds: the fastest tenth is what the machine does when it is left alone.
    ms = {k: t.p10 / 1e3 for k, t in times.items()}
    theirs = {p: float(np.percentile(v, 10)) for p, v in parts.items()}
    rest = ms["step"] - ms["verify"] - ms["head"]
    other = sum(v for p, v in theirs.items() if p not in ("head", "verify"))
    size = case.head_bytes / 1e6
    return {
        "ms": {k: round(v, 3) for k, v in ms.items()},
        "median_ms": {k: round(t.median / 1e3, 3) for k, t in times.items()},
        "torch_parts_ms": {k: round(v, 3) for k, v in theirs.items()},
        "torch_accepted": round(float(np.mean(accepted)), 2),
        "rest_ms": round(rest, 3), "torch_rest_ms": round(other, 3),
        "head_mb": round(size, 1),
        "head_gbs": round(size / ms["head"], 1), "copy_gbs": round(size / ms["copy"], 1),
        "ratio_round": round(ms["torch"] / ms["step"], 2),
        "ratio_round_median": round(times["torch"].median / times["step"].median, 2),
        "ratio_rest": round(other / rest, 1) if rest > 0 else None,
        "ratio_latent": round(ms["torch"] / ms["latent"], 2),
        "repeats": times["step"].repeats,
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    out = [
        "| head | torch round | step | verify | head | rest (torch) | GB/s (copy) | latent-first "
        "| round | rest | latent | tokens/round full, latent | host us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["status"] != "ok":
            out.append(f"| {r['name']} | {r['status']} {r['parity']} |" + " |" * 11)
            continue
        m = r["ms"]
        cells = [
            r["name"], f"{m['torch']:.2f}", f"{m['step']:.2f}", f"{m['verify']:.2f}",
            f"{m['head']:.2f}", f"{r['rest_ms']:.2f} ({r['torch_rest_ms']:.2f})",
            f"{r['head_gbs']} ({r['copy_gbs']})", f"{m['latent']:.2f}",
            f"{r['ratio_round']}x", f"{r['ratio_rest']}x", f"{r['ratio_latent']}x",
            f"{r['full']['tokens_per_round']}, {r['latent']['tokens_per_round']}",
            f"{r['full']['host_us']}",
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).resolve().parent / "results" / "step_cpu.json"
    parser.add_argument("--json", type=Path, default=default, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="n=8 only, few repeats")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for n in (8,) if options.quick else (8, 16):
        for kind in KINDS:
            if options.only not in f"{kind}-n{n}":
                continue
            folder = Path(tempfile.mkdtemp(prefix="pcc-bench-"))
            try:
                rows.append(measure(kind, n, 2.0 if options.quick else 5.0, options.quick, folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(1), "rows": rows}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(r["status"] == "ok" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
