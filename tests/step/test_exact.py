"""What the compiled graphs emit follows the verifier's law: by enumeration, several rounds."""

from __future__ import annotations

import pytest
from exactness import CASES, head, options, worst
from toy import Toy

from pcc.frontends import templates
from pcc.models.step import StepOptions
from pcc.passes.restrict import restrict


@pytest.mark.parametrize("proposal", ["full", "latent-first"])
@pytest.mark.parametrize(
    ("kind", "n", "vocab", "m", "split"),
    [
        ("ff", 2, 3, 3, True),
        ("ff", 3, 3, 3, False),
        ("cp", 2, 3, 4, False),
        ("cp", 3, 3, 3, True),
        ("hmm", 3, 2, 3, True),
        ("btree", 3, 2, 4, True),
        ("btree", 4, 2, 3, False),
    ],
)
def test_exact(kind: str, n: int, vocab: int, m: int, split: bool, proposal: str) -> None:
    circuit = head(kind, n, 2, vocab)
    assert worst(Toy(vocab, split=split), circuit, m, options(proposal), CASES) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["full", "latent-first"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_exact_more(kind: str, n: int, split: bool, proposal: str) -> None:
    vocab, m = (3, 4) if n < 4 else (2, 5)
    for seed in (2, 5):
        circuit = head(kind, n, 2, vocab, seed)
        assert (
            worst(Toy(vocab, seed=seed, split=split), circuit, m, options(proposal), CASES) < 1e-6
        )


@pytest.mark.parametrize("proposal", ["full", "latent-first"])
@pytest.mark.parametrize("truncation", [True, False])
def test_exact_with_trained_parameters(proposal: str, truncation: bool) -> None:
    """The head need not read the features at all; impossible carries fall back to the prior."""
    weights = {
        "emissions": [[[1.0, 0, 0], [0, 1.0, 0]], [[0.5, 0.5, 0], [0.1, 0.2, 0.7]]],
        "sums": [[[[0.4, 0.6]]]],
    }
    circuit = templates.cp(2, 2, 3, weights=weights)  # carry 2 has probability zero
    how = StepOptions(proposal=proposal, truncation=truncation, extras=("margin",))
    assert worst(Toy(3), circuit, 4, how, CASES if truncation else CASES[:1]) < 1e-6


def test_exact_with_fewer_variables() -> None:
    circuit = restrict(head("hmm", 4, 2, 3), 2)
    assert worst(Toy(3, split=True), circuit, 3, options("full"), CASES) < 1e-6


def test_exact_with_repetitions() -> None:
    """Several leaves for each variable, mixed at the root."""
    circuit = templates.btree(2, 2, 2, repetitions=2, context=5, seed=1)
    for proposal in ("full", "latent-first"):
        assert worst(Toy(2), circuit, 3, options(proposal), CASES[:1]) < 1e-6
