"""Faults seeded inside the graph: the proof of test_exact must catch each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from exactness import CASES, head, options, worst
from toy import Toy

from pcc.ir.core import Op, tensor
from pcc.models import acceptance as ac
from pcc.models.base import Pass
from pcc.passes import pieces as mk
from pcc.passes.to_tensor import Ancestral
from pcc.tensor import ops as t

Patch = pytest.MonkeyPatch


def residual_dropped(patch: Patch) -> None:
    """The carry follows p_s even where a draft was rejected: the published loop's law."""
    patch.setattr(ac, "residual", lambda p, q, s: ac.row_at(p, ac.before(s)))


def posterior_without_carry(patch: Patch) -> None:
    """Latents are drawn from their prior; the q that is tested knows the carry."""

    def below(self: Ancestral, x: Op) -> Op | None:
        prior = self.up.free(x)
        return None if prior is None else t.Log(prior)

    patch.setattr(Ancestral, "below", below)


def q_row_off_by_one(patch: Patch) -> None:
    """The residual subtracts the law of the draft before."""
    true = ac.residual

    def wrong(p: Op, q: Op, s: Op) -> Op:
        n = tensor(q).shape[0]
        return true(p, mk.take(q, [max(i - 1, 0) for i in range(n)]), s)

    patch.setattr(ac, "residual", wrong)


def other_q_tested(patch: Patch) -> None:
    """The test divides by the law of the neighbouring draft."""
    true = ac.sampled

    def wrong(p: Op, q: Op, window: Op, u: Op) -> ac.Verdict:
        n = tensor(q).shape[0]
        return true(p, mk.take(q, [(i + 1) % n for i in range(n)]), window, u)

    patch.setattr(ac, "sampled", wrong)


def carry_from_the_row_before(patch: Patch) -> None:
    """The carry follows p_{s-1}."""
    true = ac.residual

    def wrong(p: Op, q: Op, s: Op) -> Op:
        n = tensor(p).shape[0]
        return true(mk.take(p, [max(i - 1, 0) for i in range(n)]), q, s)

    patch.setattr(ac, "residual", wrong)


def length_off_by_one(patch: Patch) -> None:
    """One committed token too few in the state."""
    true = Toy.forward

    def wrong(self: Toy, ids: Op, start: Op, past: dict[str, Op]) -> Pass:
        made = true(self, ids, start, past)
        return Pass(
            made.hidden, made.draft_hidden, made.logits, lambda s: made.present(ac.before(s))
        )

    patch.setattr(Toy, "forward", wrong)


def ties_accepted(patch: Patch) -> None:
    """A draft whose probability is exactly u q stays: with u = 0, even an impossible one."""
    patch.setattr(ac, "accepted", lambda p, q, u: t.Not(t.Less(p, t.Mul(u, q))))


FAULTS = (
    residual_dropped,
    posterior_without_carry,
    q_row_off_by_one,
    other_q_tested,
    carry_from_the_row_before,
    length_off_by_one,
    ties_accepted,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("kind", "n"),
    [
        ("cp", 3),
        pytest.param("hmm", 3, marks=pytest.mark.slow),
        pytest.param("btree", 3, marks=pytest.mark.slow),
    ],
)
def test_fault_is_caught(
    fault: Callable[[Patch], None], kind: str, n: int, monkeypatch: Patch
) -> None:
    toy, circuit = Toy(3, split=True), head(kind, n, 2, 3)
    fault(monkeypatch)
    try:
        found = worst(toy, circuit, 3, options("full"), CASES[:2])
    except AssertionError as e:
        assert "cell" in str(e) or "threshold" in str(e)  # noqa: PT017
    else:
        assert found > 1e-4
