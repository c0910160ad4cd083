"""Rewinding keeps the law: no uniform that decided a token which stays decides another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import verifiers

from pcc.runtime.philox import Uniforms
from pcc.runtime.rounds import Rounds
from pcc.runtime.rows import Goal

KINDS = ("llama", "byte-llama", "evabyte", "lora")
NEVER = frozenset({-1})  # no id ends a text


@pytest.fixture(scope="module")
def engines_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine of each kind: caches alone, with recent ids, rings with summaries, two branches."""
    return {k: verifiers.engine(k, tmp_path_factory.mktemp(k)) for k in KINDS}


class Ledger:
    """Which `length` counters decided each token that a session holds.

    A call at counter L draws the tokens after it; of the n - 1 drafts that it leaves, the next call
    keeps some. So a token has the counters of the call that emitted it and of the one before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []  # counters, in the order in which calls read them
        self.decided: dict[int, set[int]] = {}  # position -> counters
        self.used: set[int] = set()  # counters that decided something since the last rewinding
        real, step = Uniforms.fill, Rounds.step

        def fill(uniforms: Uniforms, lengths: Any, out: Any) -> None:
            self.read.append(int(np.asarray(lengths)[0]))
            real(uniforms, lengths, out)

        def counted(rounds: Rounds) -> Any:
            before, drafts = int(rounds.length[0]), self.last
            result = step(rounds)
            self.note(before + 1, int(result[0][0]), {self.read[-1], drafts})
            return result

        monkeypatch.setattr(Uniforms, "fill", fill)
        monkeypatch.setattr(Rounds, "step", counted)

    def note(self, position: int, count: int, counters: set[int]) -> None:
        self.last = self.read[-1]
        self.used |= counters
        self.decided.update((position + i, counters) for i in range(count))

    def first(self, position: int) -> None:
        """The last call was one of prefill that drew the token of this position."""
        kept = {p: c for p, c in self.decided.items() if p < position}
        self.decided, self.used = kept, set()
        self.note(position, 1, {self.read[-1]})

    def kept_before(self, position: int) -> set[int]:
        return set().union(*(c for p, c in self.decided.items() if p < position))


@pytest.mark.parametrize("kind", KINDS)
def test_no_uniform_of_a_kept_token_is_used_again(
    kind: str, engines_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rewindings: chunks of 8, positions on both sides of their edges, a prompt of one."""
    rng, ledger = np.random.default_rng(1), Ledger(monkeypatch)
    for prompt in ([5], [*range(70, 81)], [*range(70, 86)]):
        session = engines_of[kind].session(seed=3)
        session.generate_ids(prompt, 0)
        ledger.decided.clear()
        ledger.first(len(prompt))
        for n in (*rng.integers(1, 40, 6).tolist(), 10, 9, 2, 1):
            # Some more than is kept, so that what is drawn again is not what was there.
            session._drive(Goal(max_ids=max(4, n + 4 - len(session.tokens[0])), stop_ids=NEVER))
            ids = session.tokens[0]
            session.rewind_to(n)
            ledger.first(n)
            kept = ledger.kept_before(n)
            assert len(kept) > 0 or n <= len(prompt)
            session._drive(Goal(max_ids=4, stop_ids=NEVER))
            assert session.tokens[0][:n] == ids[:n]
            assert not kept & ledger.used, (prompt, n)


def correlation(engine: Any, kept: int, seeds: int) -> float:
    """Of the last kept token and the next one, over seeds: each text is drawn, then rewound."""
    pairs = []
    for seed in range(seeds):
        session = engine.session(seed=seed, temperature=4.0, draft_top_p=0.0)
        session.generate_ids([70, 71, 72], kept)
        session.rewind_to(kept)
        pairs.append((session.tokens[0][-1], session.rows[0].ids[-1]))
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


@pytest.mark.parametrize("kind", ["byte-llama", "evabyte"])
def test_the_token_after_a_rewinding_is_drawn_anew(kind: str, engines_of: dict[str, Any]) -> None:
    """Codes of tokens are random, so at a high temperature neighbours are all but uncorrelated.

    Kept: one token beyond a chunk's edge, drawn (drafts are refused) at the counter of the edge.
    """
    seeds = 160
    found = correlation(engines_of[kind], kept=8 + 2, seeds=seeds)
    assert abs(found) < 4 / np.sqrt(seeds)
