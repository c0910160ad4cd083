"""A round in two graphs: the verifier's pass, and what follows it.

The pass maps ids i64[T], `length` and states to logits f32[T,V], features f32[T,D] and new states;
it is the same for rounds and prompts but for T. What follows (acceptance, carry, draft, and states
that depend on how many tokens stay) takes logits and features as inputs. So a runtime may hold the
verifier's weights once, in one graph for every T (docs/tensorrt.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.models.base import Model, Pass, StateSpec, Vocabulary
from pcc.passes import pieces as mk
from pcc.tensor.ops import Input

PASS = "pass"  # the name of the verifier's graph
HANDED = ("logits", "hidden", "draft_hidden")  # what it hands on


@dataclass(frozen=True)
class Handed:
    """A verifier whose pass was made by another graph: logits and features are inputs."""

    model: Model

    @property
    def vocab(self) -> int:
        """Number of token ids V."""
        return self.model.vocab

    @property
    def width(self) -> int:
        """Length D of a feature vector."""
        return self.model.width

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        return self.model.vocabulary

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Return the state tensors for buffers of `rows` rows."""
        return self.model.states(rows)

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Return inputs in the place of what the pass over `ids i64[N]` makes."""
        made, (count,) = self.model.forward(ids, start, past), tensor(ids).shape
        hidden = Input("hidden", "f32", "b", (count, self.width))
        draft = hidden
        if made.draft_hidden is not made.hidden:
            draft = Input("draft_hidden", "f32", "b", (count, self.width))
        written = written_by(made)
        return Pass(
            hidden, draft, Input("logits", "f32", "b", (count, self.vocab)),
            lambda done: {k: x for k, x in made.present(done).items() if k not in written},
        )  # fmt: skip


def written_by(made: Pass) -> dict[str, Op]:
    """Return the new states that are the same however many tokens are committed: the caches."""
    none, one = (made.present(mk.const(np.int64(k))) for k in (0, 1))
    return {name: x for name, x in none.items() if one[name] is x}


def handed_on(made: Pass) -> dict[str, Op]:
    """Return the outputs of a pass by name: logits, features and the states that it writes."""
    outs = {"logits": made.logits, "hidden": made.hidden}
    if made.draft_hidden is not made.hidden:
        outs["draft_hidden"] = made.draft_hidden
    return outs | {f"present.{name}": x for name, x in written_by(made).items()}


@dataclass(frozen=True)
class Halves:
    """A graph as a pass and what follows it, None where the pass gives every output.

    `given`: by what the pass calls them, those of the graph's outputs that are logits or features.
    """

    passed: Module
    follows: Module | None
    given: Mapping[str, str]


def halves(passed: Module, whole: Module, follows: Module) -> Halves:
    """Divide the graph `whole`; `follows` is the same graph over a `Handed` verifier.

    Errors: M154 where what follows would read a state that the pass writes.
    """
    made = {name for name, _ in passed.outputs}
    given = {x.key: name for name, x in follows.outputs if isinstance(x, Input)}
    given = {key: name for key, name in given.items() if key in made}
    left = tuple((o, x) for o, x in follows.outputs if o not in given.values())
    rest = Module(follows.name, follows.cards, left) if left else None
    for n in rest.nodes() if rest else ():
        if isinstance(n, Input) and n.key.replace("past.", "present.", 1) in made - set(HANDED):
            what = f"'{whole.name}' cannot be divided: {n.key!r} is read after the pass"
            raise PccError("M154", what)
    there = made | set(given.values()) | {o for o, _ in left}
    if lost := [o for o, _ in whole.outputs if o not in there]:
        raise PccError("M154", f"'{whole.name}' cannot be divided: nothing gives {lost[0]!r}")
    return Halves(passed, rest, given)
