"""Checks and times TensorRT engines on a GPU machine; needs neither torch nor onnxruntime.

    python benchmarks/gpu/tensorrt_check.py --out FOLDER [--part NAME]... [--target tensorrt]
        [--beside 4] [--budget 560] [--done FOLDER/tensorrt.json]
    python benchmarks/gpu/tensorrt_check.py --expect     # on a CPU: the texts to compare with

Each part is a process of its own with a time limit, since a crash in a library must not lose what
the others found; FOLDER/tensorrt.json is written after each, and FOLDER/part-NAME.json after each
row. With --beside several parts run at a time, and those that time something alone, at the end.
A part that an earlier file (--done) holds without a fault is not repeated. Exit 1 if anything
differs, and if a part raises, is stopped, finds nothing, or finds no time left.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.tensorrt_profiles import widths  # noqa: E402
from benchmarks.gpu.tensorrt_weights import exchanged, shared  # noqa: E402

TEXTS = ROOT / "benchmarks/results/conformance_expected.json.gz"
ROUNDS = "step,step_greedy,prefill,prefill_greedy"  # what texts are made with
REPEATS, WARM = 200, 20
LEAST = 20.0  # seconds; the builder's first start takes ten
RAISED = 3  # exit status of a part that raised; its report says what
Row = dict[str, Any]


def setting(target: str, precision: str, level: int, only: str = "", **engine: Any) -> Any:
    """Return the suite's setting for quick builds: tactics decide about time, not about results."""
    from pcc.conformance.bundles import Setting

    options = {"level": level, **({"only": only} if only else {}), **engine}
    return Setting(target, "tensorrt", precision, engine=tuple(options.items()))


def rows_of(findings: Iterator[Any]) -> Iterator[Row]:
    """Return findings of the suite as rows."""
    from dataclasses import asdict

    for f in findings:
        if f.verdict != "ok":
            print(f"  {f.verdict}: {f.case} {f.what} {f.note}", flush=True)
        yield asdict(f)


def texts(
    target: str, folder: Path, names: tuple[str, ...], precision: str, **engine: Any
) -> Iterator[Row]:
    """Greedy and sampled texts of tiny verifiers against those of a CPU."""
    from pcc.conformance import texts
    from pcc.conformance.scenarios import SCENARIOS, check_protocol

    chosen = tuple(s for s in SCENARIOS if s.name in names)
    assert len(chosen) == len(names)
    stored = texts.read(TEXTS)
    how = setting(target, precision, 1, ROUNDS, **engine)
    yield from rows_of(check_protocol(how, folder, print, stored, chosen))


def queries(target: str, folder: Path) -> Iterator[Row]:
    """Every query of small circuits against the float64 evaluator."""
    from pcc.conformance.circuits import check_queries

    yield from rows_of(check_queries(setting(target, "fp32", 1), folder, print))


def ops(target: str, folder: Path) -> Iterator[Row]:
    """Every op on edge inputs against the float64 evaluator."""
    from pcc.conformance.ops import check_ops

    yield from rows_of(check_ops(setting(target, "fp32", 0), folder, print))


def halves(target: str, folder: Path) -> Iterator[Row]:
    """In half precision q sums to one: the circuit itself is computed in float32."""
    import pcc
    from pcc.frontends import templates

    rng = np.random.default_rng(0)
    for kind in ("cp", "hmm", "btree"):
        circuit = getattr(templates, kind)(8, 8, 320, context=512, seed=1)
        out = folder / f"{kind}.pcc"
        pcc.compile(circuit, queries=["draft"], target=target, precision="fp16", out=out,
                    validate=False, progress=print)  # fmt: skip
        engine, worst = pcc.load(out, provider="tensorrt"), 0.0
        for _ in range(20):
            spec = {i["name"]: i["shape"] for i in engine.queries["draft"]["inputs"]}
            feed: dict[str, Any] = {
                "context": rng.normal(size=(1, 512)).astype(np.float32),
                "carry": rng.integers(0, 320, 1),
                "u": rng.integers(0, 1 << 24, (1, spec["u"][1])).astype(np.float32) * 2.0**-24,
            }
            q = engine.run("draft", **feed)["q"]
            worst = max(worst, float(np.abs(q.astype(np.float64).sum(-1) - 1).max()))
        pinned = engine.queries["draft"].get("pinned", {})
        good = worst <= 1e-5 and (not pinned or pinned.get("HALF", 0) > 0)
        half = [] if good else halved(engine, "draft")
        print(*(f"  in half: {x}" for x in half), sep="\n")
        yield {"suite": "halves", "case": f"{kind}-fp16", "what": "sums of q",
               "verdict": "ok" if good else "differs", "error": worst, "bound": 1e-5,
               "note": f"pinned {pinned}", "half": half[:40]}  # fmt: skip


def halved(engine: Any, query: str) -> list[str]:
    """Return the layers that read or write half precision, each with the tensors in half."""
    from pcc.backends.tensorrt.stored import in_half, layers_of

    plan, module = engine.runner.executor(query)[1].engine, engine.runner.opener.module
    out = []
    for x in layers_of(plan, module):
        sides = (("reads", in_half(x, "Inputs")), ("writes", in_half(x, "Outputs")))
        tensors = "; ".join(f"{verb} {', '.join(names)}" for verb, names in sides if names)
        if tensors:
            out.append(f"{x['Name']} ({x.get('LayerType')}, {x.get('TacticName', '')}): {tensors}")
    return out


def refusals(target: str, folder: Path) -> Iterator[Row]:
    """Engines that are damaged, of another release or for another GPU: one line, exit 3."""
    import pcc
    from pcc.bundle import MANIFEST, seal, sha256
    from pcc.frontends import templates

    def spoil(name: str, change: Callable[[dict[str, Any], Path], None], code: str) -> Row:
        out = folder / f"{name}.pcc"
        pcc.compile(templates.ff(3, 8, context=16), queries=["draft"], target=target, out=out,
                    validate=False)  # fmt: skip
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest, out)
        manifest["files"] = {k: sha256(out / k) for k in manifest["files"]}
        manifest["sha256"] = seal(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))
        found = "nothing was refused"
        try:
            pcc.load(out, provider="tensorrt").run(
                "draft", context=np.zeros((1, 16), np.float32), carry=np.zeros(1, np.int64),
                u=np.zeros((1, 2), np.float32),
            )  # fmt: skip
        except pcc.PccError as e:
            found = e.code
        verdict = "ok" if found == code else "differs"
        return {"suite": "refusals", "case": name, "what": found, "verdict": verdict}

    def cut(manifest: dict[str, Any], out: Path) -> None:
        plan = out / manifest["queries"]["draft"]["graph"]
        plan.write_bytes(plan.read_bytes()[:5000])

    def turned(manifest: dict[str, Any], out: Path) -> None:
        plan = out / manifest["queries"]["draft"]["graph"]
        data = bytearray(plan.read_bytes())
        data[8:64] = bytes(x ^ 0x5A for x in data[8:64])
        plan.write_bytes(bytes(data))

    def variant(**values: str) -> Callable[[dict[str, Any], Path], None]:
        return lambda manifest, out: manifest["variants"][0].update(values)

    yield spoil("as-it-is", lambda m, o: None, "nothing was refused")
    yield spoil("cut", cut, "X334")
    yield spoil("header", turned, "X334")
    yield spoil("release", variant(version="7.0.0"), "X331")
    yield spoil("gpu", variant(gpu="sm_75"), "X333")


def times(target: str, folder: Path) -> Iterator[Row]:
    """Drafts of EvaByte's width in fp16: plain launches and a CUDA graph, against their bytes."""
    for kind, n in (("cp", 8), ("cp", 16), ("btree", 16), ("hmm", 16)):
        yield timed(target, folder / f"{kind}{n}.pcc", kind, n)


def timed(target: str, out: Path, kind: str, n: int, r: int = 32) -> Row:
    """Compile one draft at D = 4096 and V = 320, and time it over buffers of zeros."""
    import pcc
    from pcc.frontends import templates
    from pcc.runtime.device.handles import Memory

    circuit = getattr(templates, kind)(n, r, 320, context=4096, seed=1)
    start = time.perf_counter()
    pcc.compile(circuit, queries=["draft"], target=target, precision="fp16", out=out,
                validate=False, progress=print)  # fmt: skip
    built = time.perf_counter() - start
    engine = pcc.load(out, provider="tensorrt")
    device, run = engine.runner.executor("draft")
    stream, memories = device.stream(), []
    for name in run.names:
        memories.append(Memory(device, run.sizes[name]))
        device.zero(memories[-1].address, run.sizes[name], stream)
        run.bind(name, memories[-1].address)
    for _ in range(WARM):
        run.enqueue(stream)
    device.wait(stream)
    graph = device.capture(stream, lambda: run.enqueue(stream))
    plain = clocked(device, stream, lambda: run.enqueue(stream))
    replay = clocked(device, stream, lambda: device.launch(graph, stream))
    weights, copied = 2 * n * r * 320 * 4096, bandwidth(device, stream)
    plan = out / engine.queries["draft"]["graph"]
    return {
        "suite": "times", "case": f"{kind}-n{n}-r{r}-fp16", "what": "draft", "verdict": "ok",
        "enqueue_ms": plain, "graph_ms": replay, "build_s": built, "weight_bytes": weights,
        "bandwidth_tb_s": copied, "bound_ms": weights / copied / 1e9,
        "plan_bytes": plan.stat().st_size, "gpu": device.name,
        "tensorrt": engine.manifest["variants"][0]["version"],
    }  # fmt: skip


def clocked(device: Any, stream: int, work: Callable[[], None]) -> dict[str, float]:
    """Return p10, p50 and p90 of the milliseconds between two events around some work."""
    first, last, spent = device.event(times=True), device.event(times=True), []
    for _ in range(REPEATS):
        device.record(first, stream)
        work()
        device.record(last, stream)
        device.wait_event(last)
        spent.append(device.elapsed(first, last))
    p10, p50, p90 = np.percentile(spent, (10, 50, 90))
    return {"p10": float(p10), "p50": float(p50), "p90": float(p90), "repeats": REPEATS}


def bandwidth(device: Any, stream: int) -> float:
    """Return the TB/s of a copy on the device, bytes read and written."""
    from pcc.runtime.device.handles import Memory

    size = 2 << 30
    a, b = Memory(device, size), Memory(device, size)
    ms = clocked(device, stream, lambda: device.copy(b.address, a.address, size, stream))["p50"]
    a.free()
    b.free()
    return 2 * size / ms / 1e9


Part = Callable[[str, Path], Iterator[Row]]
PARTS: dict[str, tuple[int, Part]] = {
    "halves": (240, halves),
    "llama": (200, lambda t, p: texts(t, p, ("llama-hmm-n4",), "fp32")),
    "evabyte": (200, lambda t, p: texts(t, p, ("evabyte-own-heads-n4",), "fp32")),
    "refusals": (150, refusals),
    "times": (300, times),
    "queries": (300, queries),
    "half-texts": (240, lambda t, p: texts(t, p, ("llama-hmm-n4",), "fp16")),
    "btree": (240, lambda t, p: texts(t, p, ("llama-btree-n16",), "fp32")),
    "latent": (200, lambda t, p: texts(t, p, ("llama-cp-n3-latent-first",), "fp32")),
    "profiles": (
        400,
        lambda t, p: texts(t, p, ("llama-hmm-n4", "evabyte-own-heads-n4"), "fp32", profiles=True),
    ),
    "chains": (
        400,
        lambda t, p: texts(
            t, p, ("llama-hmm-n4", "evabyte-own-heads-n4"), "fp32", profiles=True, layers=1, jobs=4
        ),
    ),
    "widths": (180, widths),
    "exchanged": (300, exchanged),
    "shared": (500, lambda t, p: shared(t, p, clocked)),
    "ops": (400, ops),
}


def one(part: str, target: str, folder: Path, out: Path) -> bool:
    """Run a part in this process; its rows are kept even if it breaks off. Returns whether not."""
    rows: list[Row] = []
    began = time.perf_counter()
    try:
        for row in PARTS[part][1](target, folder):
            rows.append(row)
            save(out, {"rows": rows})
        error = ""
    except Exception:
        error = traceback.format_exc()[-3000:]
        print(error, flush=True)
    seconds = round(time.perf_counter() - began, 1)
    save(out, {"rows": rows, "seconds": seconds, "error": error})
    return not error


def save(path: Path, report: Row) -> None:
    """Write a report whole or not at all: this process may be stopped at any time."""
    from pcc.circuit.text import write

    write(path, json.dumps(report, indent=1).encode())


def failure(report: dict[str, Any], ended: str) -> str:
    """Return why a part has failed, or nothing: it must end, raise nothing, and find something."""
    if ended != "ok":
        return ended
    if report.get("error"):
        lines = [x for x in report["error"].splitlines() if x[:1].strip()]  # not of the stack
        return f"raised {lines[-1][:200]}"
    verdicts = [r["verdict"] for r in report["rows"]]
    for bad in ("differs", "refused"):
        if bad in verdicts:
            return f"{verdicts.count(bad)} of {len(verdicts)} {bad}"
    return "" if "ok" in verdicts else "nothing was found to be right"


TIMED = ("times", "shared")  # parts that must have the machine for themselves


@dataclass(frozen=True)
class Plan:
    """How parts are run: how many at a time, until when (`time.monotonic`), and where to."""

    target: str
    out: Path
    beside: int = 1
    end: float = math.inf


def every(names: list[str], plan: Plan, done: Mapping[str, Row] | None = None) -> bool:
    """Run parts, those of `done` that passed excepted; return whether all of them passed."""
    passed = {k: v for k, v in (done or {}).items() if k in names and not v["failed"]}
    found: dict[str, Row] = dict(passed)
    left = [name for name in names if name not in passed]
    quiet = [name for name in left if name in TIMED]
    loud = [name for name in left if name not in TIMED]
    for group, beside in ((loud, plan.beside), (quiet, 1)):
        with ThreadPoolExecutor(beside) as pool:
            running = {pool.submit(ran, name, plan): name for name in group}
            for each in as_completed(running):
                name = running[each]
                found[name] = each.result()
                save(plan.out / "tensorrt.json", found)
                verdicts = [r["verdict"] for r in found[name]["rows"]]
                counts = {v: verdicts.count(v) for v in dict.fromkeys(verdicts)}
                said = found[name]["failed"] or "ok"
                print(f"== {name}: {said}, {counts or 'no rows'}", flush=True)
    return not any(p["failed"] for p in found.values())


def ran(name: str, plan: Plan) -> Row:
    """Run a part in a process of its own; return its report."""
    file = plan.out / f"part-{name}.json"
    file.unlink(missing_ok=True)
    limit = min(PARTS[name][0], plan.end - time.monotonic())
    if limit < LEAST:
        return {"rows": [], "ended": "no time left", "failed": "no time left"}
    folder = Path(tempfile.mkdtemp(prefix=f"tensorrt-{name}-"))  # gigabytes: not among results
    print(f"== {name}, at most {limit:.0f} s", flush=True)
    command = [sys.executable, __file__, "--inside", name, "--target", plan.target,
               "--out", str(folder), "--json", str(file)]  # fmt: skip
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
        ended = "ok" if code in (0, RAISED) else f"exit {code}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit:.0f} s"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    return {**report, "ended": ended, "failed": failure(report, ended)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("tensorrt-check"))
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--beside", type=int, default=1, help="parts at a time")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--done", type=Path, help="tensorrt.json of an earlier run")
    parser.add_argument("--expect", action="store_true", help="write the CPU's texts")
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.expect:
        from pcc.conformance import texts
        from pcc.conformance.suite import expectations

        texts.write(TEXTS, expectations(print))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.inside:
        sys.exit(0 if one(asked.inside, asked.target, asked.out, asked.json) else RAISED)
    plan = Plan(asked.target, asked.out, asked.beside, time.monotonic() + asked.budget)
    done = json.loads(asked.done.read_text()) if asked.done else {}
    sys.exit(0 if every(asked.part or list(PARTS), plan, done) else 1)


if __name__ == "__main__":
    main()
