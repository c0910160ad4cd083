"""What a generation did, under the field names of ONNX Runtime GenAI's speculative statistics."""

from __future__ import annotations

from typing import Any


class Statistics:
    """Counts and times of prefill and rounds. Times are seconds inside; milliseconds outside."""

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch = n, batch
        self.rounds = self.passes = self.prompt_tokens = self.prefill_passes = 0
        self.accepted_per_round = [0] * n  # index: accepted drafts, 0 .. n-1
        self.emitted = 0
        self.prefill_seconds = self.step_seconds = 0.0  # inside graphs
        self.round_seconds = self.total_seconds = 0.0  # of whole rounds; with prompts and set-up

    def prefill(self, tokens: int, seconds: float) -> None:
        """Count one prefill call."""
        self.prefill_passes += 1
        self.prompt_tokens += tokens
        self.prefill_seconds += seconds

    def round(self, count: Any, active: Any, seconds: float) -> None:
        """Count one call of the step graph: `count [B]` tokens emitted by each active row."""
        self.passes += 1
        self.step_seconds += seconds
        for c, on in zip(count.tolist(), active.tolist(), strict=True):
            if on:
                self.rounds += 1
                self.accepted_per_round[c - 1] += 1
                self.emitted += c

    def plus(self, other: Statistics) -> Statistics:
        """Add the counts and times of another generation to these."""
        for name, value in vars(other).items():
            if name == "accepted_per_round":
                pairs = zip(self.accepted_per_round, value, strict=True)
                self.accepted_per_round = [a + b for a, b in pairs]
            elif name not in ("n", "batch"):
                setattr(self, name, getattr(self, name) + value)
        return self

    def summary(self) -> dict[str, Any]:
        """Return the statistics by name.

        A round emits its accepted drafts and one more token: a correction if a draft was rejected,
        a bonus if none was. `effective_k` is the mean number of drafts accepted in a round.
        """
        hist, n = self.accepted_per_round, self.n
        accepted = sum(k * v for k, v in enumerate(hist))
        bonus = hist[n - 1]
        evaluated = accepted + self.rounds - bonus
        return {
            "rounds": self.rounds,
            "draft_tokens_proposed": self.rounds * (n - 1),
            "draft_tokens_evaluated": evaluated,
            "draft_tokens_accepted": accepted,
            "correction_tokens": self.rounds - bonus,
            "bonus_tokens": bonus,
            "target_forward_passes": self.passes + self.prefill_passes,
            "acceptance_rate": accepted / evaluated if evaluated else 0.0,
            "acceptance_length_histogram": list(hist),
            "effective_k": accepted / self.rounds if self.rounds else 0.0,
            "tokens_per_round": self.emitted / self.rounds if self.rounds else 0.0,
            "tokens_emitted": self.emitted,
            "prompt_tokens": self.prompt_tokens,
            "total_prefill_ms": self.prefill_seconds * 1e3,
            "total_target_verify_ms": self.step_seconds * 1e3,
            "total_ms": self.total_seconds * 1e3,
            "host_ms_per_round": max(
                0.0, self.round_seconds - self.step_seconds
            ) * 1e3 / self.passes if self.passes else 0.0,
        }  # fmt: skip
