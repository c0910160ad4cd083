"""A tiny recurrent language model: exact in numpy, sensitive to every committed token.

h_t = softmax(A h_{t-1} + E[x_t]), logits W h_t. With `split`, the features for the head come from a
second recurrence with other weights (as adapted layers do). Its state is h after the committed
tokens, so that a state that is one token off changes every later law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pcc.ir.core import Op, tensor
from pcc.models.base import Pass, StateSpec, Vocabulary
from pcc.passes import pieces as mk
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Recurrence:
    """The weights of one recurrence, and its state's name."""

    name: str
    a: np.ndarray
    e: np.ndarray

    def run(self, ids: Op, past: Op) -> tuple[Op, Op]:
        """Return states after 1..N tokens `[N,D]`, and after 0..N tokens `[N+1,D]`."""
        d, vocab = self.a.shape[0], self.e.shape[1]
        table = mk.const(self.e.reshape(1, d, vocab).astype(np.float32))
        rows = [mk.reshape(past, (1, d))]
        for i in range(tensor(ids).shape[0]):
            seen = t.Lookup(table, mk.take(ids, [i]))
            rows.append(t.Softmax(t.Add(self._mix(rows[-1]), seen)))
        return mk.concat(rows[1:]), mk.concat(rows)

    def _mix(self, h: Op) -> Op:
        return t.Contract(h, mk.const(self.a.T.astype(np.float32)), "nd,dk->nk")

    def after(self, tokens: list[int]) -> np.ndarray:
        """Return the state after some tokens in float64."""
        h = np.zeros(self.a.shape[0])
        for x in tokens:
            z = self.a.astype(np.float32).astype(np.float64) @ h
            z = np.exp(z + self.e.astype(np.float32).astype(np.float64)[:, x])
            h = z / z.sum()
        return h


@dataclass(frozen=True)
class Toy:
    """The model; `laws` says its next-token law in float64, by itself."""

    vocab: int
    width: int = 5
    seed: int = 5  # laws that differ much from context to context, for 2 and 3 tokens
    split: bool = False
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(None))
    parts: tuple[Recurrence, ...] = field(init=False)
    w: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        d, v = self.width, self.vocab
        names = ("memory", "draft_memory") if self.split else ("memory",)
        made = tuple(
            Recurrence(name, 2 * rng.normal(size=(d, d)), 3 * rng.normal(size=(d, v)))
            for name in names
        )
        object.__setattr__(self, "parts", made)
        object.__setattr__(self, "w", (2 * rng.normal(size=(v, d))).astype(np.float32))

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """One vector for each recurrence."""
        return tuple(StateSpec(p.name, "f32", (self.width,)) for p in self.parts)

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Run the recurrences over the ids."""
        runs = {p.name: p.run(ids, past[p.name]) for p in self.parts}
        features = [runs[p.name][0] for p in self.parts]
        weight = mk.const(self.w.T.copy())
        logits = t.Contract(features[0], weight, "nd,dk->nk")

        def present(count: Op) -> dict[str, Op]:
            sel = mk.reshape(count, (1,))
            out = {}
            for name, (_, rows) in runs.items():
                stack = mk.reshape(rows, (1, *tensor(rows).shape))
                out[name] = mk.reshape(t.SelectRow(stack, sel), (self.width,))
            return out

        return Pass(features[0], features[-1], logits, present)

    def law(self, tokens: list[int]) -> np.ndarray:
        """p(. | tokens) in float64."""
        z = self.w.astype(np.float64) @ self.parts[0].after(tokens)
        p = np.exp(z - z.max())
        return p / p.sum()

    def feature(self, tokens: list[int]) -> np.ndarray:
        """Features for the head after some tokens."""
        return self.parts[-1].after(tokens)
