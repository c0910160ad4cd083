"""Circuits that draft: compiled, checked, and decoding beside the model that they draft for.

No torch, no network. First the three tiny heads of `examples/tiny`, whose queries can be looked at
one by one; then the trained models of `examples/models`, draft and verifier in one engine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import decoding  # noqa: E402
import drafts  # noqa: E402

import pcc  # noqa: E402
from pcc.cli.output import progress, table  # noqa: E402

PLACES = 3  # drafts that are printed
MODE = "stepwise"  # how greedy drafts are made


def step(title: str) -> None:
    """Print the title of a part."""
    print(f"\n== {title}", flush=True)


def compiled(artifact: pcc.Artifact) -> tuple[Any, bool]:
    """Print what a compilation made, check it; return the engine and the verdict."""
    m, path = artifact.manifest, artifact.path
    c = m["circuit"]
    size = sum((path / p).stat().st_size for p in m["files"])
    runs: dict[str, int] = {}
    for p in m["passes"]:
        if p["changed"]:
            runs[p["name"]] = runs.get(p["name"], 0) + 1
    start = time.perf_counter()
    report = pcc.verify(path)
    seconds = time.perf_counter() - start
    worst = max(report.checks, key=lambda k: k.error)
    print(
        f"{path.name}: {c['kind']} circuit, n={c['n']} r={c['r']} V={c['V']}; "
        f"{len(m['queries'])} graphs, {size / 1e6:.2f} MB, compiled in {artifact.seconds:.1f} s"
    )
    print(f"  passes: {', '.join(f'{k} x{v}' for k, v in runs.items())}")
    verdict = "agrees with" if report.ok else "DIFFERS from"
    print(f"  {verdict} the float64 reference: {len(report.checks)} checks, largest error "
          f"{worst.error:.1e} ({worst.query}), {seconds:.1f} s", flush=True)  # fmt: skip
    return pcc.load(path, threads=1), report.ok


def tiny(folder: Path, every: int) -> bool:
    """Compile, check and measure the tiny heads; return whether every check passed."""
    step("Three tiny heads in the published checkpoint layout (examples/tiny)")
    made = {
        name: compiled(
            pcc.compile(drafts.TINY / name, out=folder / f"{name}.pcc", queries=drafts.QUERIES,
                        progress=progress)
        )
        for name in drafts.HEADS
    }  # fmt: skip
    engines = {name: engine for name, (engine, _) in made.items()}
    held = drafts.Held(8, every)
    print("Drafts, argmax byte by byte, beside what follows in held-out files:")
    for line in drafts.shown(engines, held, PLACES):
        print(line)
    rows = {"unigram": drafts.unigram(held)}
    rows |= {k: drafts.measure(e, held) for k, e in engines.items()}
    table(
        f"Bytes right in a row of 8, mean over {len(held.x)} held-out windows (draft: of 7, "
        "sampled behind the true first byte)",
        ["head", "nats per byte", "stepwise", "mode", "draft"],
        [[k, *(f"{r[c]:.3f}" for c in ("nats", "stepwise", "mode", "draft"))]
         for k, r in rows.items()],
    )  # fmt: skip
    return all(ok for _, ok in made.values())


def stream(engine: Any, prompt: bytes, count: int) -> None:
    """Write a prompt and its continuation to stdout, bytes as they are made."""
    out = sys.stdout
    session = engine.session(greedy=True)
    out.write(prompt.decode("utf-8", "replace") + "\N{BROKEN BAR}")
    for chunk in session.stream(prompt, count):
        out.write(chunk.decode("utf-8", "replace"))
        out.flush()
    s = session.stats
    rate = 1e3 * s["tokens_emitted"] / max(1e-9, s["total_ms"] - s["total_prefill_ms"])
    print(f"\n({s['rounds']} rounds, {s['tokens_per_round']:.2f} bytes each, {rate:.0f} bytes/s)")


def compared(engines: Mapping[str, Any], prompts: Sequence[bytes], count: int) -> bool:
    """Print the table of all ways to decode; return whether greedy texts are the same."""
    lanes = decoding.race(engines, prompts, count, progress)
    base = lanes[decoding.PLAIN].per_token()
    rows = []
    for name, lane in lanes.items():
        low, middle, high = np.percentile(base / lane.per_token(), [10, 50, 90])
        same = f"{lane.identical}/{len(prompts)}" + lane.remark()
        gain = ["1.00", "", same] if name == decoding.PLAIN else [
            f"{middle:.2f}", f"{low:.2f} to {high:.2f}", same]  # fmt: skip
        rows.append([decoding.TITLES.get(name, name), f"{lane.rate():.0f}",
                     f"{lane.round_size():.2f}", *gain])  # fmt: skip
    table(
        f"Greedy, one thread, {len(prompts)} held-out prompts, {count} bytes each; "
        "speed-up: median over prompts",
        ["decoding", "bytes/s", "bytes/round", "speed-up", "p10 to p90", "same text"], rows,
    )  # fmt: skip
    return not any(lane.different for lane in lanes.values())


def engines(folder: Path, names: Sequence[str], prompts: int, count: int, models: Path) -> bool:
    """Compile the trained heads with their verifier, let one write, and compare them all."""
    step(f"Draft and verifier in one engine: {len(names)} heads over one byte-level model "
         "(examples/models)")  # fmt: skip
    made = {
        name: compiled(decoding.bundle(name, folder / f"{name}.pcc", MODE, progress, models))
        for name in names
    }
    ready = {name: engine for name, (engine, _) in made.items()}
    texts = decoding.prompts(prompts, models)
    best = next(k for k in ("btree-n8", *names) if k in ready)
    step(f"{decoding.TITLES[best]} draws, the model decides: a held-out prompt, then its text "
         "after the bar")  # fmt: skip
    stream(ready[best], texts[-1], 2 * count)
    step("Every head, interleaved in this process")
    same = compared(ready, texts, count)
    return same and all(ok for _, ok in made.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 1 if a check found a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the bundles in this new folder")
    parser.add_argument("--every", type=int, default=2, help="draft at every k-th byte only")
    parser.add_argument("--models", type=Path, default=decoding.MODELS, help="folder of the models")
    parser.add_argument("--heads", nargs="*", help="of the models; all if left out")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=128, help="new bytes for each prompt")
    args = parser.parse_args(argv)
    names = decoding.heads(args.models) if args.heads is None else args.heads
    if args.heads is None and not names:
        raise pcc.PccError("E140", "there are no trained heads", at=str(args.models))
    with tempfile.TemporaryDirectory(prefix="pcc-demo-") as scratch:
        folder = args.out or Path(scratch)
        if args.out:
            args.out.mkdir(parents=True)
        ok = tiny(folder, args.every)
        if names:
            ok = engines(folder, names, args.prompts, args.bytes, args.models) and ok
    print("\nevery check passed" if ok else "\nA CHECK FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pcc.PccError as e:
        sys.exit(str(e))
