"""Stepwise drafts against enumeration: ties, impossible carries, extremes, work, the judge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from exactness import head
from strategies import CONTEXT, random_circuit

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.frontends.regions import from_nested
from pcc.interp.brute import Joint
from pcc.interp.reference import reference
from pcc.interp.run import run
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.models import proposal as pr
from pcc.passes import stepwise
from pcc.passes.manager import Manager
from pcc.passes.restrict import restrict
from pcc.tensor import ops as t

TIE = 1e-9


def drafted(circuit: Circuit, manager: Manager | None = None) -> Module:
    return pr.greedy(circuit, manager or Manager(), "stepwise").module


def questions(circuit: Circuit, rows: int, seed: int, width: int = 5) -> dict[str, np.ndarray]:
    """Every carry, an impossible one on either side, and a context for each row."""
    rng = np.random.default_rng(seed)
    carry = np.resize(np.arange(-1, circuit.cards[0] + 1), rows)
    return {"carry": carry, "context": 3 * rng.normal(size=(rows, width))}


def by_enumeration(circuit: Circuit, env: dict[str, np.ndarray], x: np.ndarray) -> None:
    """Assert x_i = argmax_v p(carry, x_<i, v), the first one where several are as large."""
    joint = Joint(circuit, env)
    whole = np.concatenate([env["carry"][:, None], x], axis=1)
    order = np.arange(circuit.n)
    kept = (order == 0) & (joint.marginal(whole, order == 0) > 0)[:, None]
    for i in range(1, circuit.n):
        law = joint.open(whole, kept | ((order > 0) & (order < i)), i)
        law = law / law.sum(axis=1, keepdims=True)
        clear = np.sort(law, axis=1)[:, -2] < law.max(axis=1) - TIE
        assert np.array_equal(law.argmax(axis=1)[clear], x[clear, i - 1])
        assert (np.take_along_axis(law, x[:, i - 1 : i], 1)[:, 0] > law.max(axis=1) - TIE).all()


HEADS = {
    "ff": head("ff", 4, 1, 3),
    "cp": head("cp", 4, 3, 3),
    "hmm": head("hmm", 5, 3, 3),
    "btree": head("btree", 5, 2, 3),
    "repeated": templates.btree(4, 2, 3, repetitions=2, context=5, seed=1),
    "unordered": templates.tree(from_nested([[0, 2], [1, 3]]), 2, 3, context=5),
    "window": restrict(head("hmm", 5, 2, 3), 3),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("decades", [20, 1])
def test_choices_are_those_by_enumeration(
    name: str, decades: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one decade, messages of more than two variables are in logarithms."""
    monkeypatch.setattr(stepwise, "DECADES", decades)
    circuit = HEADS[name]
    env = questions(circuit, 25, 3)
    (x,) = run(drafted(circuit).roots, env, Real())
    by_enumeration(circuit, env, np.broadcast_to(x, (25, circuit.n - 1)))


@pytest.mark.parametrize("first", [0, pytest.param(30, marks=pytest.mark.slow)])
def test_random_circuits(first: int) -> None:
    """Any shape: trained weights with zeros, unnormalised ones, several leaves per variable."""
    done = 0
    for seed in range(first, first + 30):
        circuit = random_circuit(seed, max_vars=4)
        if circuit.n < 2 or not all(circuit.cards):
            continue
        env = questions(circuit, 12, seed, CONTEXT)
        (x,) = run(drafted(circuit).roots, env, Real())
        by_enumeration(circuit, env, np.broadcast_to(x, (12, circuit.n - 1)))
        done += 1
    assert done > 15


def test_the_reference_conditionals_agree() -> None:
    """`conditionals` of carry and drafts: each draft is the argmax of its row."""
    circuit = head("btree", 8, 4, 7)
    env = questions(circuit, 40, 5)
    env["carry"] = env["carry"].clip(0, 6)
    (x,) = run(drafted(circuit).roots, env, Real())
    whole = np.concatenate([env["carry"][:, None], x], axis=1)
    rows = reference(circuit, "conditionals", {"x": whole, "context": env["context"]})["log_cond"]
    assert np.array_equal(rows[:, 1:].argmax(axis=-1), x)
    assert len(np.unique(x)) > 3


def test_ties_give_the_first_index_and_an_impossible_carry_the_prior() -> None:
    weights = {
        "emissions": [
            [[1.0, 0, 0], [0, 1.0, 0]],
            [[0.25, 0.5, 0.25], [0.0, 0.25, 0.75]],
            [[0.5, 0.0, 0.5], [0.25, 0.5, 0.25]],
        ],
        "sums": [[[[0.5, 0.5]]]],
    }
    circuit = templates.cp(3, 2, 3, weights=weights)
    (x,) = run(drafted(circuit).roots, {"carry": np.array([0, 1, 2, 3, -1])}, Real())
    # Prior at 2: .125 .375 .5; given x_2 = 2 the units have mass .125 and .375.
    assert x.tolist() == [[1, 0], [2, 1], [2, 1], [2, 1], [2, 1]]
    assert [0.25 * 0.5 + 0.75 * 0.25, 0.75 * 0.5, 0.25 * 0.5 + 0.75 * 0.25] == [
        0.3125,
        0.375,
        0.3125,
    ]


def test_likelihoods_far_below_float32_still_decide() -> None:
    """The carry is e^-200 times likelier under unit 0, whose weight is e^-150 of the other's."""
    z = np.zeros((2, 2, 2))
    z[0] = [[-50.0, 0.0], [-250.0, 0.0]]
    z[1] = [[0.0, 4.0], [4.0, 0.0]]
    w = np.array([[[-150.0, 0.0]]])
    leaf = c.Categorical((0, 1), t.Softmax(t.Input("z", "f32", "c", z.shape)))
    pair = c.Hadamard((c.Gather(leaf, (0,)), c.Gather(leaf, (1,))))
    root = c.Sum(pair, t.Softmax(t.Input("w", "f32", "c", w.shape)))
    module = drafted(Circuit(root, (2, 2)))
    single = run(module.roots, {"carry": np.array([0]), "z": z[None], "w": w[None]}, Single())
    assert single[0].tolist() == [[1]]


class Single(Real):
    """float32, in which e^-150 is zero."""

    def const(self, value: np.ndarray, ref: str) -> np.ndarray:
        return value.astype(np.float32) if value.dtype.kind == "f" else value


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_a_position_costs_one_small_update(kind: str) -> None:
    """Nodes and multiply-adds beside the parameters' are linear in n."""
    r, v = 3, 11
    work = {}
    for n in (4, 8, 16):
        made = drafted(head(kind, n, r, v), Manager(validate=False))
        nodes = list(made.nodes())
        small = [m for m in nodes if isinstance(m, t.Contract | t.LogContract) and "d" not in m.eq]
        madds = sum(int(np.prod(tensor(m.args[1]).shape)) for m in small)
        work[n] = (len(nodes), madds, sum(isinstance(m, t.ArgMax) for m in nodes))
        assert sum(isinstance(m, t.Contract) and m.eq == "fk,fkv->fv" for m in nodes) == n - 1
        assert madds <= (n - 1) * r * v + 2 * (2 * n) * r * r
    assert [work[n][2] for n in work] == [3, 7, 15]
    for (a, b), limit in zip(itertools.pairwise(work), (14, 14), strict=True):
        assert (work[b][0] - work[a][0]) / (b - a) <= limit
    assert work[8][0] < 100 if kind != "btree" else work[8][0] < 130


def test_a_wrong_choice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last position is drafted by the law of the one before it."""
    true = stepwise.choices

    def late(laws: list[Op], prefix: stepwise.Prefix) -> Op:
        return true([*laws[:-1], laws[-2]], prefix)

    monkeypatch.setattr("pcc.passes.to_tensor.choices", late)
    with pytest.raises(PccError, match="conditional of the choice below the largest"):
        drafted(head("hmm", 4, 3, 5))


def test_a_circuit_with_too_many_prefixes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcc.passes.to_tensor.CUT_LIMIT", 10)
    with pytest.raises(PccError, match="E133"):
        drafted(HEADS["unordered"])
