"""Drafts of the tiny heads in `examples/tiny`, beside what really follows.

Three heads of one small context encoder draft the next 8 bytes of Python source that none of them
was trained on. A draft is as good as the number of its first bytes that are right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
sys.path.insert(0, str(TINY))

from encoder import WINDOW, load  # noqa: E402

HEADS = ("ff-n-8-r-1", "cp-n-8-r-4", "btree-n-8-r-4")
QUERIES = ("loglik", "mode", "conditionals", "draft")  # what `measure` asks
BLOCK = 2048  # windows of one call
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


def shown(engines: Mapping[str, Any], held: Held, places: int) -> Iterator[str]:
    """Yield lines that show stepwise drafts at evenly spaced places."""
    for k in range(places):
        i = (k + 1) * len(held.x) // (places + 1)
        yield f"  {held.file[i]}: after {show(held.before[i])}"
        yield f"    {'true':14} {show(held.x[i].astype(np.uint8))}"
        for name, engine in engines.items():
            draft = stepwise(engine, held.context[i : i + 1])
            right = accepted(draft, held.x[i : i + 1])[0]
            yield f"    {name:14} {show(draft[0].astype(np.uint8)):16} {right} right"
