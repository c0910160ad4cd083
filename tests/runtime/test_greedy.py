"""Greedy text through the session is plain one-token decoding, for every kind of verifier.

Prompts are decoded in a batch both ways. Where the texts part, the one-token graph is given the
speculative text: each of its tokens must be the largest logit, or lie within `TIE` of it, which is
what an n-wide and a one-wide pass can differ by. Anything else is a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifiers

from pcc.runtime.buffers import Call, States
from pcc.runtime.session import Session

Values = np.ndarray[Any, Any]
Record = Callable[[str, object], None]
TIE = 1e-4  # of logits whose largest is about 10: what two passes in float32 differ by
# Prompts, how many of them must have a text of `GRAMS` distinct 8-grams, tokens, least count.
SMALL, FULL = (24, 0, 40, 1), (540, 500, 200, 100)
GRAMS = 50


class Plain:
    """One-token decoding of B rows with the `decode` graph; nothing of the session is used."""

    def __init__(self, engine: Any, batch: int) -> None:
        spec = engine.generation()
        self.states = States(spec["states"], batch)
        self.states.resize(spec["buckets"][-1]["states"])
        self.call = Call(engine.session_of("decode"), engine.queries["decode"], batch)
        self.call.attach(self.states)

    def logits(self, tokens: Values, position: int) -> Values:
        """Process one token of each row; return what follows it, `[B, V]`."""
        self.call["input_ids"][:, 0] = tokens
        self.call["length"][:] = position
        self.call.run()
        self.states.settle()
        return self.call["logits"][:, 0]


def plain_text(engine: Any, prompts: Values, count: int) -> Values:
    """Greedy ids `[B, count]` after prompts of one length, read token by token."""
    plain, size = Plain(engine, len(prompts)), prompts.shape[1]
    out = np.zeros((len(prompts), count), np.int64)
    for t in range(size + count - 1):
        tokens = prompts[:, t] if t < size else out[:, t - size]
        logits = plain.logits(tokens, t)
        if t >= size - 1:
            out[:, t - size + 1] = logits.argmax(-1)
    return out


def gaps(engine: Any, prompts: Values, text: Values) -> Values:
    """How far each token of `text` lies below the largest logit of the one-token graph."""
    plain, ids = Plain(engine, len(prompts)), np.concatenate([prompts, text], 1)
    size, rows, out = prompts.shape[1], np.arange(len(prompts)), np.zeros(text.shape)
    for t in range(ids.shape[1] - 1):
        logits = plain.logits(ids[:, t], t)
        if t >= size - 1:
            out[:, t - size + 1] = logits.max(-1) - logits[rows, ids[:, t + 1]]
    return out


def distinct(text: Values) -> int:
    return len({tuple(text[i : i + 8].tolist()) for i in range(len(text) - 7)})


@pytest.mark.parametrize(
    "size", [SMALL, pytest.param(FULL, marks=pytest.mark.slow)], ids=["small", "full"]
)
@pytest.mark.parametrize("kind", verifiers.KINDS)
def test_greedy_text_of_every_kind(
    kind: str, size: tuple[int, int, int, int], tmp_path: Path, record_property: Record
) -> None:
    prompts, varied, tokens, least = size
    engine = verifiers.engine(kind, tmp_path, max_seq=400, threads=2 if prompts > 100 else 1)
    rng = np.random.default_rng(11)
    # EvaByte: past several windows of 64, and past the end of its ring of 320 rows in the full size
    given = rng.choice(verifiers.ids_of_bytes(engine), (prompts, 160 if kind == "evabyte" else 24))
    want = plain_text(engine, given, tokens)
    session = Session(engine, greedy=True)
    got = np.array(session.generate_ids(given.tolist(), tokens))
    differing = np.flatnonzero((want != got).any(1))
    worst = 0.0
    if len(differing):
        worst = float(gaps(engine, given[differing], got[differing]).max())
    other = got[:1].copy()
    other[0, tokens // 2] = given[0, 0]
    assert gaps(engine, given[:1], other).max() > 100 * TIE  # another text is no near-tie
    histogram = session.stats["acceptance_length_histogram"]
    variety = sum(distinct(row) >= GRAMS for row in want)
    for name, value in (
        ("prompts", prompts), ("identical", prompts - len(differing)), ("largest_gap", worst),
        ("accepted", str(histogram)), ("not_periodic", variety),
    ):  # fmt: skip
        record_property(name, value)
    assert worst <= TIE
    assert len(differing) <= prompts // 50  # near-ties are rare
    assert min(histogram) >= least
    assert variety >= varied
