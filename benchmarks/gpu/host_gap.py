"""What the host costs between the rounds of a session.

python benchmarks/gpu/host_gap.py BUNDLE [--provider cuda] [--tokens 1000] [--out FILE.json]

Events stand around every launch of a round. The gap is the time on the device from the end of one
round to the beginning of the next: with rounds launched ahead the host is hidden, without it is
all there is between them. `beside_us` is what a round takes from its beginning to that of the next
beyond the model's graph alone at the middle context: gap, what is handed on, uniforms, results.
Prints JSON: p10, p50, p90 in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pcc
from pcc.errors import PccError
from pcc.runtime.measure_gpu import bench_of

GOAL_US = 20.0


class Marks:
    """Timed events before and after each launch of one call."""

    def __init__(self, call: Any) -> None:
        self.call, self.launch = call, call._launch
        self.pairs: list[tuple[int, int]] = []
        call._launch = self._marked

    def _marked(self, name: str, work: Callable[[], None], mirror: int) -> None:
        device, stream = self.call.device, self.call.turn.stream
        first, last = device.event(times=True), device.event(times=True)
        device.record(first, stream)
        self.launch(name, work, mirror)
        device.record(last, stream)
        self.pairs.append((first, last))

    def times(self) -> tuple[list[float], list[float], list[float]]:
        """Return in microseconds gaps between launches, launches, and both together."""
        device = self.call.device
        device.wait(self.call.turn.stream)
        rounds = [device.elapsed(a, b) * 1e3 for a, b in self.pairs]
        gaps = [device.elapsed(a[1], b[0]) * 1e3 for a, b in itertools.pairwise(self.pairs)]
        wholes = [device.elapsed(a[0], b[0]) * 1e3 for a, b in itertools.pairwise(self.pairs)]
        return gaps, rounds, wholes


def graph_us(engine: Any, query: str, context: int) -> float:
    """Return the median time of a round's graph alone, by events, on memory of its own."""
    bench = bench_of(engine, query, context, int(engine.queries[query]["batch"]))
    try:
        return bench.times(100)["p50"] * 1e3
    finally:
        bench.free()


def measure(engine: Any, prompt: list[int], tokens: int, *, ahead: bool, greedy: bool) -> Any:
    """Return the gaps of one generation, after one that warms up."""
    engine.run_ahead = ahead
    session = engine.session(greedy=greedy, seed=1)
    session.generate_ids(prompt, 16 * engine.generation()["n"])  # recorded by then
    rounds = session.rounds
    marks = Marks(rounds.call(rounds.step_name))
    passes, began = rounds.statistics.passes, time.perf_counter()
    while len(session.rows[0].ids) < tokens:
        session._round()
    wall = time.perf_counter() - began
    done = rounds.statistics.passes - passes
    gaps, device, wholes = marks.times()
    alone = graph_us(engine, rounds.step_name, (len(prompt) + tokens) // 2)
    beside = float(np.median(wholes)) - alone
    return {
        "ahead": ahead, "greedy": greedy, "rounds": done,
        "gap_us": quantiles(gaps), "round_us": quantiles(device),
        "wall_us_per_round": wall / done * 1e6,
        "graph_us": round(alone, 2), "beside_us": round(beside, 2),
        "within_goal": beside <= GOAL_US,
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p10, p50 and p90."""
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (10, 50, 90)}


def main() -> int:
    """Run the four measurements; exit 1 where rounds ahead miss the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        engine = pcc.load(args.bundle, provider=args.provider)
        spec = engine.generation()
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, int(spec["vocab"]), args.prompt).tolist()
        most = min(args.tokens, int(spec["max_seq"]) - args.prompt - 2 * int(spec["n"]))
        rows = [
            measure(engine, prompt, most, ahead=ahead, greedy=greedy)
            for ahead in (True, False) for greedy in (False, True)
        ]  # fmt: skip
    except PccError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    text = json.dumps({"gpu": engine.runner.device.name, "rows": rows}, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return int(not all(r["within_goal"] for r in rows if r["ahead"]))


if __name__ == "__main__":
    sys.exit(main())
