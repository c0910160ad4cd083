"""Compile, run and check the heads that ship in `examples/tiny`; no torch, no network.

Three heads of one small context encoder draft the next 8 bytes of Python source that none of them
was trained on. A draft is as good as the number of its first bytes that are right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pcc
from pcc.cli.bundles import describe
from pcc.cli.output import progress, table

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
sys.path.insert(0, str(TINY))

from encoder import WINDOW, load  # noqa: E402

HEADS = ("ff-n-8-r-1", "cp-n-8-r-4", "btree-n-8-r-4")
BLOCK = 2048  # windows of one call
SHOWN = 6  # drafts that are printed, evenly spaced

Ids = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


class Held:
    """Held-out files: every window of n bytes `x [N, n]`, and `context [N, D]` before it."""

    def __init__(self, n: int, every: int = 1) -> None:
        with np.load(TINY / "heldout.npz", allow_pickle=False) as data:
            names, lengths = data["names"].tolist(), data["lengths"].tolist()
            self.counts, stream = data["unigram_counts"], data["data"].tobytes()
        self.before: list[bytes] = []
        self.file: list[str] = []
        rows: list[bytes] = []
        for name, length in zip(names, lengths, strict=True):
            text, stream = stream[:length], stream[length:]
            for i in range(0, length - n + 1, every):
                self.file.append(name)
                self.before.append(text[max(0, i - WINDOW) : i])
                rows.append(text[i : i + n])
        self.x = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, n).astype(np.int64)
        self.context = load(TINY).context(self.before)

    def blocks(self) -> Iterator[slice]:
        """Yield the rows in blocks."""
        for i in range(0, len(self.x), BLOCK):
            yield slice(i, i + BLOCK)


def stepwise(engine: Any, context: Floats) -> Ids:
    """x_i = argmax_v q(x_i = v | x_<i) for i = 1..n: one `conditionals` call for each byte."""
    n = engine.manifest["circuit"]["n"]
    x = np.zeros((len(context), n), np.int64)
    for i in range(n):
        x[:, i] = engine.run("conditionals", x=x, context=context)["log_cond"][:, i].argmax(-1)
    return x


def mode(engine: Any, context: Floats) -> Ids:
    """Return the bytes of the best term of the circuit: latents and bytes at once."""
    x: Ids = engine.run("mode", context=context)["x"]
    return x


def sampled(engine: Any, context: Floats, first: Ids, rng: np.random.Generator) -> Ids:
    """x_2..x_n ~ q(. | x_1 = first): how a speculative decoder drafts behind its carry."""
    slots = engine.queries["draft"]["inputs"][1]["shape"][1]
    u = rng.integers(1 << 24, size=(len(context), slots)).astype(np.float32) / (1 << 24)
    x: Ids = engine.run("draft", carry=first, u=u, context=context)["x"]
    return x


def accepted(draft: Ids, x: Ids) -> Ids:
    """Return how many first bytes of each draft are right."""
    right: Ids = np.cumprod(draft == x, axis=1).sum(1)
    return right


def measure(engine: Any, held: Held) -> dict[str, float]:
    """Mean accepted length of three drafts, and nats per byte, over every held-out window."""
    rng = np.random.default_rng(0)
    sums = dict.fromkeys(("mode", "stepwise", "draft", "nats"), 0.0)
    for block in held.blocks():
        x, context = held.x[block], held.context[block]
        sums["mode"] += accepted(mode(engine, context), x).sum()
        # One call instead of n: up to its first wrong byte, a stepwise draft equals x itself.
        rows = engine.run("conditionals", x=x, context=context)["log_cond"].argmax(-1)
        sums["stepwise"] += accepted(rows, x).sum()
        sums["draft"] += accepted(sampled(engine, context, x[:, 0], rng), x[:, 1:]).sum()
        sums["nats"] -= engine.run("loglik", x=x, context=context)["log_prob"].sum() / x.shape[1]
    return {k: v / len(held.x) for k, v in sums.items()}


def unigram(held: Held) -> dict[str, float]:
    """The same numbers for the most frequent byte and the training frequencies."""
    log_p = np.log((held.counts + 1) / (held.counts + 1).sum())
    best = np.full_like(held.x, held.counts.argmax())
    length = float(accepted(best, held.x).mean())
    q = (held.counts + 1) / (held.counts + 1).sum()
    runs = np.cumprod(q[held.x[:, 1:]], axis=1).sum(1)  # P(the first k sampled bytes are right)
    return {"mode": length, "stepwise": length, "draft": float(runs.mean()),
            "nats": float(-log_p[held.x].mean())}  # fmt: skip


def show(row: Ids | bytes) -> str:
    """Return bytes as a Python string literal."""
    return repr(bytes(row).decode("ascii", "replace"))


def drafts(engines: dict[str, Any], held: Held) -> None:
    """Print drafts beside what really follows."""
    print(
        f"\nStepwise drafts beside what follows, at {SHOWN} evenly spaced places of held-out files:"
    )
    for k in range(SHOWN):
        i = (k + 1) * len(held.x) // (SHOWN + 1)
        print(f"  {held.file[i]}: after {show(held.before[i])}")
        print(f"    {'true':14} {show(held.x[i].astype(np.uint8))}")
        for name, engine in engines.items():
            draft = stepwise(engine, held.context[i : i + 1])
            right = accepted(draft, held.x[i : i + 1])[0]
            print(f"    {name:14} {show(draft[0].astype(np.uint8)):16} {right} right")


def compiled(name: str, folder: Path) -> tuple[Any, bool]:
    """Compile a head, print what came out, check it; return the engine and the verdict."""
    print()
    artifact = pcc.compile(TINY / name, out=folder / f"{name}.pcc", progress=progress)
    describe(artifact.path, artifact.manifest)
    start = time.perf_counter()
    report = pcc.verify(artifact.path)
    worst = max(report.checks, key=lambda c: c.error)
    verdict = "agrees with" if report.ok else "DIFFERS from"
    print(f"compiled in {artifact.seconds:.2f} s; {verdict} the float64 reference in "
          f"{len(report.checks)} checks, largest error {worst.error:.1e} ({worst.query}), "
          f"{time.perf_counter() - start:.2f} s")  # fmt: skip
    return pcc.load(artifact.path), report.ok


def main() -> int:
    """Run the demonstration; 1 if a check found a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the bundles in this new folder")
    parser.add_argument("--every", type=int, default=1, help="draft at every k-th byte only")
    args = parser.parse_args()
    out = args.out
    with tempfile.TemporaryDirectory(prefix="pcc-demo-") as scratch:
        folder = out or Path(scratch)
        if out:
            out.mkdir(parents=True)
        made = {name: compiled(name, folder) for name in HEADS}
        engines = {name: engine for name, (engine, _) in made.items()}
        held = Held(8, args.every)
        drafts(engines, held)
        progress("every held-out window")
        rows = {"unigram": unigram(held)} | {k: measure(e, held) for k, e in engines.items()}
        print()
        table(
            f"Bytes right in a row, mean over {len(held.x)} held-out windows (x_1..x_8; draft: "
            "x_2..x_8, sampled behind the true x_1)",
            ["head", "nats per byte", "stepwise", "mode", "draft"],
            [[k, *(f"{r[c]:.3f}" for c in ("nats", "stepwise", "mode", "draft"))]
             for k, r in rows.items()],
        )  # fmt: skip
    print("every check passed" if all(ok for _, ok in made.values()) else "A CHECK FAILED")
    return 0 if all(ok for _, ok in made.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pcc.PccError as e:
        sys.exit(str(e))
