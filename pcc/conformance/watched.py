"""A session that notes what each round decided, and can shift one of its uniforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.runtime.engine import Engine
from pcc.runtime.measure import Autoregressive
from pcc.runtime.philox import Uniforms
from pcc.runtime.rounds import Rounds
from pcc.runtime.session import Session
from pcc.ties import Shift

NEAR = 0.1  # a lead below which the ids that come near are noted; twice the widest tie


@dataclass(frozen=True)
class Event:
    """What one call decided for a row: the ids, and in greedy rounds how far each logit led."""

    row: int
    part: int  # how often the session was rewound before
    length: int  # the length at which its uniforms are drawn
    at: int  # the position of its first id
    ids: tuple[int, ...]
    leads: tuple[float, ...] = ()
    rivals: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each id: others, and how far behind


class Watched(Session):
    """A session with a log. Leads are read where the provider keeps outputs on the host."""

    def __init__(self, engine: Engine, shift: Shift | None = None, **options: Any) -> None:
        super().__init__(engine, **options)
        self.events: list[Event] = []
        self.shift = shift
        self.part = 0
        self.plain: Autoregressive | None = None

    def rewind_to(self, n: int) -> None:
        """Rewind, and note the token that follows what is kept."""
        super().rewind_to(n)
        self.part += 1
        self.events.append(Event(0, self.part, n - 1, n, tuple(self.rows[0].ids[-1:])))

    def _rounds(self, streams: Sequence[int]) -> Rounds:
        made = super()._rounds(streams)
        if self.shift is not None:
            for query, slots in made.spec["random"].items():
                if query in made.uniforms:
                    moved = _Shifted(self.sampling.seed, slots, streams)
                    moved.shift = self.shift
                    made.uniforms[query] = moved
        return made

    def _start(self, prompts: list[list[int]]) -> None:
        super()._start(prompts)
        assert self.rounds is not None
        for i, row in enumerate(self.rows):
            size = len(row.prompt)
            last = (size - 1) // self.rounds.chunk * self.rounds.chunk  # the last chunk's length
            self.events.append(Event(i, self.part, last, size, tuple(row.ids)))

    def _round(self) -> None:
        assert self.rounds is not None
        on, length = self.rounds.active.copy(), self.rounds.length.copy()
        had = [len(r.ids) for r in self.rows]
        super()._round()
        margins = None
        if self.engine.provider == "cpu" and self.sampling.greedy:
            margins = self.rounds.call(self.rounds.step_name)["margin"].copy()
        for i, row in enumerate(self.rows):
            if on[i]:
                ids = tuple(row.ids[had[i] :])
                leads = () if margins is None else tuple(map(float, margins[i, : len(ids)]))
                at = len(row.prompt) + had[i]
                text = [*row.prompt, *row.ids]
                near = tuple(self._rivals(text[: at + k], x) for k, x in enumerate(leads))
                self.events.append(Event(i, self.part, int(length[i]), at, ids, leads, near))

    def _rivals(self, before: Sequence[int], lead: float) -> tuple[tuple[int, float], ...]:
        """Return the ids whose logits come near the best one after a text, and how far behind.

        Only where the lead is small: one-token passes read the text again.
        """
        if abs(lead) > NEAR or "decode" not in self.engine.queries:
            return ()
        if self.plain is None:
            self.plain = Autoregressive(self.engine)
        logits = self.plain.logits(before)
        behind = logits.max() - logits
        best = int(logits.argmax())
        found = [(int(i), round(float(behind[i]), 6)) for i in np.flatnonzero(behind <= NEAR)]
        return tuple((i, gap) for i, gap in sorted(found, key=lambda x: x[1]) if i != best)


class _Shifted(Uniforms):
    shift: Shift

    def fill(self, lengths: Any, out: np.ndarray[Any, Any]) -> None:
        super().fill(lengths, out)
        s = self.shift
        if s.row < out.shape[0] and int(np.asarray(lengths)[s.row]) == s.length:
            s.move(out)
