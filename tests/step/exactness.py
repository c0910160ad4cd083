"""Heads, cases and the total variation that the proofs of exactness measure."""

from __future__ import annotations

from enumeration import Case, Language, Probe, variation
from toy import Toy
from toy_law import Law, law

from pcc.circuit.circuit import Circuit
from pcc.frontends import templates
from pcc.models.base import Model
from pcc.models.step import StepOptions, Steps
from pcc.passes.manager import Manager

PLAIN = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "draft_temperature": 1.0,
    "draft_top_p": 1.0,
}
CASES = [
    Case([1, 0], PLAIN),
    Case([0, 1, 1], {**PLAIN, "temperature": 0.7, "top_k": 2, "draft_temperature": 1.5}),
    Case([1], {**PLAIN, "temperature": 2.0, "top_p": 0.9, "draft_top_p": 0.6}),
    Case([0], {**PLAIN, "draft_temperature": 0.0}),
]


def head(kind: str, n: int, r: int, vocab: int, seed: int = 3) -> Circuit:
    """Return a contextual circuit."""
    if kind == "ff":
        return templates.ff(n, vocab, context=5, seed=seed)
    return getattr(templates, kind)(n, r, vocab, context=5, seed=seed)


def worst(
    model: Model,
    circuit: Circuit,
    m: int,
    options: StepOptions,
    cases: list[Case],
    rows: int = 64,
    next_law: Law | None = None,
) -> float:
    """Return the largest total variation over the cases from `next_law` (a toy's own)."""
    if next_law is None:
        assert isinstance(model, Toy)
        next_law = model.law
    steps = Steps(model, circuit, rows, options, Manager(validate=False))
    language = Language(Probe(steps.prefill(3)), Probe(steps.step()), m)
    laws = language.law(cases)
    assert language.rounds == m - 1  # a round emits one token at least: the slowest path was met
    wants = [law(next_law, c.prompt, m, c.settings) for c in cases]
    return max(variation(a, b) for a, b in zip(laws, wants, strict=True))


def options(proposal: str) -> StepOptions:
    """Return options with the outputs that cells are found from."""
    return StepOptions(proposal=proposal, extras=("margin",))
