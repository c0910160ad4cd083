"""One point: compiled, decoded beside autoregressive decoding, and each graph timed alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcc import driver
from pcc.errors import PccError
from pcc.explore import intervals
from pcc.explore.config import Measure
from pcc.explore.points import Point
from pcc.explore.records import Decoding, Figures, Sameness
from pcc.knobs import PREFILL_CHUNK

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

Say = Callable[[str], None]
WARM = 8  # tokens decoded before anything is timed: sessions open, buffers are touched


@dataclass
class Tally:
    """Counts and seconds of each prompt under one way of decoding."""

    rounds: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)  # autoregressive seconds per token
    accepted: list[int] = field(default_factory=list)

    def add(self, stats: dict[str, Any], plain: float) -> None:
        """Add one prompt; one that ended with its first token made no round and counts nothing."""
        if not stats["rounds"]:
            return
        self.rounds.append(stats["rounds"])
        self.emitted.append(stats["tokens_emitted"])
        self.seconds.append((stats["total_ms"] - stats["total_prefill_ms"]) / 1e3)
        self.plain.append(plain)
        hist = stats["acceptance_length_histogram"]
        self.accepted = [a + b for a, b in zip(self.accepted or [0] * len(hist), hist, strict=True)]

    def figures(self) -> Decoding:
        """bytes/s = bytes per round / median time of a round. Errors: G107."""
        if not self.rounds:
            raise PccError("G107", "no prompt took a round", hint="raise measure.tokens")
        size = intervals.ratio(self.emitted, self.rounds)
        each = [1e3 * s / k for s, k in zip(self.seconds, self.rounds, strict=True)]
        times = intervals.median(each)
        gains = [p * e / s for p, e, s in
                 zip(self.plain, self.emitted, self.seconds, strict=True)]  # fmt: skip
        return {
            "bytes_per_round": size,
            "ms_per_round": times,
            "bytes_per_second": 1e3 * size["value"] / times["value"],
            "ms_per_byte": times["value"] / size["value"],
            "speedup": intervals.median(gains),
            "rounds": sum(self.rounds),
            "emitted": sum(self.emitted),
            "accepted_drafts": self.accepted,
        }


def compile_point(
    source: Path | None, point: Point, head_n: int, verifier: str, m: Measure, max_seq: int,
    out: Path, say: Say,
) -> float:  # fmt: skip
    """Write the bundle of a point; return the seconds that it took."""
    made = driver.compile(
        source, verifier=verifier, queries=["draft"], precision=point.precision, max_seq=max_seq,
        int8=None if point.int8 == "none" else point.int8,
        window=None if point.n == head_n else point.n, out=out, force=True, validate=m.validate,
        proposal=point.proposal, draft_mode=point.draft_mode, progress=say,
        chunk=min(PREFILL_CHUNK, max_seq),
    )  # fmt: skip
    return made.seconds


def measure(
    bundle: Path, prompts: Sequence[bytes], m: Measure, compile_seconds: float, say: Say
) -> Figures:
    """Decode each prompt autoregressively, greedily and sampled, one after the other.

    So a slow minute of the machine meets all of them. Errors: S1xx, R1xx, G107.
    """
    from pcc.runtime.engine import load
    from pcc.runtime.vocabulary import Vocabulary

    engine = load(bundle, provider=m.provider, threads=m.threads)
    spec = engine.generation()
    vocabulary = Vocabulary.of(engine.manifest, int(spec["vocab"]))
    ids = [vocabulary.encode(p) for p in prompts]
    greedy, sampled = Tally(), Tally()
    same: Sameness = {"identical": 0, "near_ties": 0, "different": 0}
    _decode(engine, ids[0], m, WARM, greedy=Tally(), sampled=Tally(), seed=m.seed, same=None)
    for k, prompt in enumerate(ids):
        say(f"prompt {k + 1} of {len(ids)}")
        _decode(engine, prompt, m, m.tokens, greedy, sampled, m.seed + k, same)
    say("graphs alone")
    return {
        "prompts": len(ids),
        "tokens": m.tokens,
        "compile_seconds": compile_seconds,
        "autoregressive_ms_per_byte": intervals.median([1e3 * s for s in greedy.plain or [0.0]]),
        "greedy": greedy.figures(),
        "sampled": sampled.figures() if m.sampled else None,
        "sameness": same,
        "graph_ms": _graphs(engine, max(map(len, ids)) + m.tokens, m.repeats),
    }


def _decode(
    engine: Engine, prompt: list[int], m: Measure, tokens: int, greedy: Tally, sampled: Tally,
    seed: int, same: Sameness | None,
) -> None:  # fmt: skip
    from pcc.runtime.measure import compare_greedy

    found, stats = compare_greedy(engine, [prompt], tokens, lambda _: None)
    if not found.ar_tokens:
        raise PccError("S121", "a prompt leaves no room to generate", hint="shorten prompts.bytes")
    plain = found.ar_seconds / found.ar_tokens
    greedy.add(stats, plain)
    if same is not None:
        same["identical"] += found.identical
        same["near_ties"] += found.near_ties
        same["different"] += 1 - found.identical - found.near_ties
    if m.sampled:
        session = engine.session(seed=seed, temperature=m.temperature, top_p=m.top_p)
        session.generate_ids(prompt, tokens)
        sampled.add(session.stats, plain)


def _graphs(engine: Engine, length: int, repeats: int) -> dict[str, float]:
    from pcc.runtime.measure import graph_times

    return {q: t["p50_ms"] for q, t in graph_times(engine, length, repeats).items()}


def length_needed(prompts: Sequence[bytes], tokens: int, given: int) -> int:
    """Return `max_seq`: what was given, or room for the longest prompt, BOS and the tokens."""
    return given or -(-(max(map(len, prompts)) + 1 + tokens) // 64) * 64


def now() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def drift(times: Sequence[float]) -> float:
    """Return max / min - 1 of the autoregressive times: how far the machine was from steady."""
    return max(times) / min(times) - 1 if times and min(times) > 0 else 0.0


def middle(times: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(times)
