"""Generation timed in parts: autoregressive, speculative, and each graph alone.

All figures of one call come from the same engine, prompts and process, so that ratios mean
something. Nothing here decides anything; greedy outputs are compared so that no speed is reported
for another text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc import knobs
from pcc.errors import PccError
from pcc.runtime.bound import quantiles
from pcc.runtime.runner import Calls
from pcc.runtime.session import Session

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

Progress = Callable[[str], None]


class Autoregressive:
    """Plain greedy decoding through the one-token graph `decode` of the same engine."""

    def __init__(self, engine: Engine) -> None:
        spec = engine.generation()
        if "decode" not in engine.queries:
            raise PccError("R111", "the bundle has no one-token graph 'decode'")
        self.spec, self.max_seq = spec, int(spec["max_seq"])
        self.place = engine.runner.place(spec["states"], 1)
        self.states = self.place.states
        self.prefill = self.place.call("prefill_greedy")
        self.decode = self.place.call("decode")
        self.chunk = int(spec["chunk"])
        self.seconds = self.cpu_seconds = 0.0  # of decoding; processor time of the same
        self.steps = 0

    def generate(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Return `count` greedy ids after a prompt, and the gap between their two best logits."""
        if not 0 < len(prompt) < self.max_seq:
            raise PccError(
                "S121", f"a prompt of {len(prompt)} tokens leaves no room, the engine holds "
                f"{self.max_seq}", hint="shorten it (`pcc bench --prompt-bytes`)",
            )  # fmt: skip
        count = min(count, self.max_seq - len(prompt))
        self._reserve(len(prompt) + count)
        token, length = self._prompt(prompt), len(prompt)
        out, rows = [token], []
        cpu, began = time.process_time(), time.perf_counter()
        c = self.decode
        while len(out) < count:
            c["input_ids"][0, 0] = token
            c["length"][0] = length
            c.run()
            self.states.settle()
            logits = c["logits"][0, 0]
            token = int(logits.argmax())
            rows.append(logits.copy())  # the buffer is used again; gaps are found when time is out
            out.append(token)
            length += 1
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu
        self.steps += len(out) - 1
        margins = [float("nan")]
        for logits in rows:
            two = np.partition(logits, -2)[-2:]
            margins.append(float(two[1] - two[0]))
        return out, margins

    def logits(self, before: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return the logits `[V]` of the token after a text of two or more tokens."""
        (found,) = self.following(before, len(before))
        return np.asarray(found)

    def following(self, text: Sequence[int], start: int) -> np.ndarray[Any, Any]:
        """Return the logits `[len(text) + 1 - start, V]` after each `text[:k]`, k = start, ….

        The text is given, not chosen; `start` is two or more.
        """
        self._reserve(len(text))
        self._prompt(text[: start - 1])
        c, out = self.decode, []
        for at in range(start - 1, len(text)):
            c["input_ids"][0, 0], c["length"][0] = text[at], at
            c.run()
            self.states.settle()
            out.append(c["logits"][0, 0].copy())
        return np.array(out)

    def _reserve(self, positions: int) -> None:
        need = positions + max(int(self.spec["n"]), self.chunk)
        fits = [b for b in self.spec["buckets"] if b["rows"] >= need]
        self.states.resize((fits or self.spec["buckets"][-1:])[0]["states"])
        for c in (self.prefill, self.decode):
            c.attach(self.states)

    def _prompt(self, prompt: Sequence[int]) -> int:
        c, token = self.prefill, -1
        for start in range(0, len(prompt), self.chunk):
            piece = prompt[start : start + self.chunk]
            c["input_ids"][:] = 0
            c["input_ids"][0, : len(piece)] = piece
            c["valid"][0], c["length"][0] = len(piece), start
            c.run()
            self.states.settle()
            token = int(c["emitted"][0, 0])
        return token


@dataclass
class Comparison:
    """Greedy speculative decoding beside autoregressive decoding on the same prompts."""

    speedups: list[float] = field(default_factory=list)
    identical: int = 0
    near_ties: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    ar_seconds: float = 0.0
    ar_tokens: int = 0
    spec_seconds: float = 0.0
    spec_tokens: int = 0


def compare_greedy(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    count: int,
    say: Progress,
    tie: float = knobs.LOGIT_TIES["f32"],
) -> tuple[Comparison, dict[str, Any]]:
    """Decode every prompt both ways; return the comparison and the speculative statistics.

    Where the two texts differ, the gap between the best two logits at the first difference tells a
    near-tie (below `tie`: an n-wide and a one-wide pass round differently) from a fault.
    """
    out, total = Comparison(), None
    plain = Autoregressive(engine)
    for k, prompt in enumerate(prompts):
        say(f"prompt {k + 1} of {len(prompts)}")
        before = plain.seconds
        want, margins = plain.generate(prompt, count)
        ar = plain.seconds - before
        session = Session(engine, greedy=True)
        got = session.generate_ids(prompt, len(want))
        assert session.rounds is not None
        s = session.rounds.statistics
        spent = s.round_seconds
        out.ar_seconds, out.ar_tokens = out.ar_seconds + ar, out.ar_tokens + len(want) - 1
        out.spec_seconds, out.spec_tokens = out.spec_seconds + spent, out.spec_tokens + s.emitted
        if s.emitted and len(want) > 1:
            out.speedups.append((ar / (len(want) - 1)) / (spent / s.emitted))
        _note(out, k, want, got, margins, tie)
        total = s if total is None else total.plus(s)
    return out, total.summary() if total else {}


def _note(
    out: Comparison, k: int, want: list[int], got: list[int], margins: list[float], tie: float
) -> None:
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), None)
    if at is None and len(want) == len(got):
        out.identical += 1
        return
    at = min(len(want), len(got)) if at is None else at
    gap = margins[at] if at < len(margins) else float("nan")
    near = bool(gap <= tie)
    out.near_ties += near
    out.differences.append({"prompt": k, "token": at, "logit_gap": gap, "near_tie": near})


def memory(engine: Engine) -> dict[str, Any]:
    """Return bytes of the weight files, and what opening each graph in use added beside them.

    The latter are copies of weights that ONNX Runtime lays out anew, and its own structures.
    """
    files = [p for p in engine.manifest["files"] if p.startswith("graphs/") and ".onnx" not in p]
    opened = {Path(q).stem: int(s.opening_bytes) for q, s in engine.opened.items()}
    return {"weights": sum((engine.path / p).stat().st_size for p in files), "opened": opened}


def graph_times(engine: Engine, length: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return p10, p50 and p90 in ms of each graph alone, batch 1, at a sequence length."""
    spec = engine.generation()
    length = min(length, int(spec["max_seq"]))
    out: dict[str, dict[str, float]] = {}
    for query in ("decode", "verify", "step_greedy", "step", "draft"):
        if query not in engine.queries:
            continue
        place = engine.runner.place(spec["states"], 1)
        c = place.call(query)
        if any(i["name"].startswith("past.") for i in engine.queries[query]["inputs"]):
            states = place.states
            need = length + max(int(spec["n"]), int(spec["chunk"]))
            fits = [b for b in spec["buckets"] if b["rows"] >= need] or spec["buckets"][-1:]
            states.resize(fits[0]["states"])
            c.attach(states)
        _plausible(c, length)
        times = []
        for _ in range(repeats + 3):
            began = time.perf_counter()
            c.run()
            times.append((time.perf_counter() - began) * 1e3)
        out[query] = {f"{k}_ms": v for k, v in quantiles(times[3:]).items()}
    return out


def _plausible(c: Calls, length: int) -> None:
    fill = {"length": length, "active": True, "temperature": 1.0, "top_p": 1.0, "u": 0.5,
            "draft_temperature": 1.0, "draft_top_p": 1.0}  # fmt: skip
    for name, b in c.inputs.items():
        if name in fill:
            b.array[:] = fill[name]
        elif name == "draft_q":
            b.array[:] = 1.0 / b.array.shape[-1]


def break_even(times: dict[str, dict[str, float]], query: str = "step_greedy") -> float | None:
    """Return the tokens a round must emit to be as fast as autoregressive decoding."""
    if query not in times or "decode" not in times:
        return None
    return times[query]["p50_ms"] / times["decode"]["p50_ms"]
