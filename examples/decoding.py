"""Engines that draft, beside autoregressive decoding: greedy, one thread, prompt by prompt.

Every lane decodes a prompt before any lane sees the next one, in an order that changes, so that a
slow moment of the machine meets all of them. Used by the demo and by `benchmarks/speedup.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pcc
from pcc.knobs import LOGIT_TIES
from pcc.runtime.measure import Autoregressive
from pcc.runtime.vocabulary import Vocabulary

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
BACKBONE = "backbone"
TITLES = {"ff-n8": "fully factorised", "cp-n8": "CP", "hmm-n8": "HMM", "btree-n8": "balanced tree",
          "btree-n8-lora": "balanced tree + LoRA"}  # fmt: skip
PLAIN = "autoregressive"
MAX_SEQ = 512
WARM = 12  # tokens that are decoded before anything is timed

Say = Callable[[str], None]


@dataclass
class Lane:
    """One way to decode: for each prompt its seconds, tokens, rounds, and whether the text fits."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # processor time of the same
    tokens: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    identical: int = 0
    near_ties: int = 0
    different: int = 0

    def add(self, seconds: float, cpu: float, tokens: int, rounds: int) -> None:
        """Add a prompt."""
        self.seconds.append(seconds)
        self.cpu.append(cpu)
        self.tokens.append(tokens)
        self.rounds.append(rounds)

    def per_token(self) -> np.ndarray[Any, Any]:
        """Seconds per token of each prompt, prompt processing not included."""
        return np.array(self.seconds) / np.array(self.tokens)

    def rate(self) -> float:
        """Tokens per second over all prompts."""
        return sum(self.tokens) / sum(self.seconds)

    def remark(self) -> str:
        """Say which texts are not identical, and why."""
        ties = f", {self.near_ties} part at a near-tie" if self.near_ties else ""
        return ties + (f", {self.different} DIFFER" if self.different else "")

    def round_size(self) -> float:
        """Tokens per round over all prompts."""
        return sum(self.tokens) / sum(self.rounds)


def prompts(count: int, models: Path = MODELS) -> list[bytes]:
    """Return up to `count` prompts, spread over the held-out text that ships with the models."""
    with np.load(models / "heldout.npz", allow_pickle=False) as data:
        rows = data["prompts"]  # BOS and 255 bytes each, in the order of the modules
    count = min(count, len(rows))
    chosen = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
    return [row[row < 256].astype(np.uint8).tobytes() for row in chosen]


def heads(models: Path = MODELS) -> list[str]:
    """Return the heads of a folder of models, in the order of the tables."""
    return [name for name in TITLES if (models / name).is_dir()]


def bundle(
    name: str, out: Path, draft_mode: str, say: Say, models: Path = MODELS, max_seq: int = MAX_SEQ
) -> pcc.Artifact:
    """Compile a head and the backbone to one engine: what generates, and the query `draft`."""
    return pcc.compile(
        models / name, verifier=models / BACKBONE, queries=["draft"], max_seq=max_seq,
        draft_mode=draft_mode, out=out, progress=say,
    )  # fmt: skip


def race(
    engines: Mapping[str, Any], texts: Sequence[bytes], count: int, say: Say
) -> dict[str, Lane]:
    """Decode `count` tokens after each prompt, autoregressively and with each engine."""
    first = next(iter(engines.values()))
    vocabulary = Vocabulary.of(first.manifest, int(first.generation()["vocab"]))
    plain = Autoregressive(first)
    lanes = {name: Lane() for name in (PLAIN, *engines)}
    rng = np.random.default_rng(0)
    plain.generate(vocabulary.encode(texts[0]), WARM)
    for engine in engines.values():
        engine.session(greedy=True).generate_ids(vocabulary.encode(texts[0]), WARM)
    for k, text in enumerate(texts):
        say(f"prompt {k + 1} of {len(texts)}")
        ids, made = vocabulary.encode(text), {}
        for name in rng.permutation(list(lanes)).tolist():
            if name == PLAIN:
                before = plain.seconds, plain.cpu_seconds
                made[name], margins = plain.generate(ids, count)
                spent = plain.seconds - before[0], plain.cpu_seconds - before[1]
                lanes[name].add(*spent, len(made[name]) - 1, len(made[name]) - 1)
            else:
                made[name] = draft(engines[name], ids, count, lanes[name])
        for name, out in made.items():
            _compare(lanes[name], made[PLAIN], out, margins)
    return lanes


def draft(engine: Any, ids: list[int], count: int, lane: Lane) -> list[int]:
    """Return up to `count` greedy tokens, fewer if the text ends; the prompt is not timed."""
    session = engine.session(greedy=True)
    out: list[int] = session.generate_ids(ids, 1)
    cpu = time.process_time()
    out += session.generate(None, count - 1).ids
    cpu = time.process_time() - cpu
    s = session.rounds.statistics
    lane.add(s.round_seconds, cpu, s.emitted, s.rounds)
    return out


def _compare(lane: Lane, want: list[int], got: list[int], margins: list[float]) -> None:
    """Count a text as identical, as parting at a near-tie of two logits, or as different."""
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), None)
    if at is None:
        lane.identical += 1
    elif margins[at] <= LOGIT_TIES["f32"]:
        lane.near_ties += 1
    else:
        lane.different += 1
