"""Queries do not evaluate a circuit once per prefix: counts of nodes and multiply-adds."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.driver import query_module
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.frontends.regions import from_nested
from pcc.ir.core import postorder, tensor
from pcc.ir.module import Module
from pcc.passes import to_tensor
from pcc.passes.manager import Manager, Notes
from pcc.passes.pipelines import circuit_pipeline, tensor_pipeline
from pcc.passes.to_tensor import ToTensor
from pcc.passes.unfold import unfold
from pcc.tensor import ops as t

R, V = 4, 6
ALL_PREFIXES = ("prefix", "conditionals", "draft")


def lowered(circuit: Circuit, query: str) -> Module:
    manager = Manager(validate=False)
    root = manager.run(circuit.module(), circuit_pipeline()).roots[0]
    return manager.run(query_module(circuit, root, query)[0], tensor_pipeline())


def madds(m: Module) -> int:
    """Multiply-adds of contractions and element-wise work per row, softmax of parameters apart."""
    total = 0
    for n in m.nodes():
        if isinstance(n, t.Contract | t.LogContract | t.MaxContract):
            a, b = n.args
            inside = set(n.eq.split("->")[0].replace(",", ""))
            sizes = dict(zip(n.eq.split("->")[0].split(",")[0], tensor(a).shape, strict=True))
            sizes |= dict(zip(n.eq.split("->")[0].split(",")[1], tensor(b).shape, strict=True))
            if n.eq != "d,abcd->abc":
                total += math.prod(sizes[k] for k in inside)
        elif isinstance(n, t.Mul | t.Add | t.ReduceLse | t.ReduceSum | t.CumProd | t.Cumsum):
            total += math.prod(tensor(n.args[0]).shape)
    return total


def cp(n: int) -> Circuit:
    return templates.cp(n, R, V, context=2)


def hmm(n: int) -> Circuit:
    return templates.hmm(n, R, V, context=2)


def btree(n: int) -> Circuit:
    return templates.btree(n, R, V, context=2)


@pytest.mark.parametrize("query", ALL_PREFIXES)
@pytest.mark.parametrize("make", [cp, hmm, btree])
def test_work_grows_with_n_not_with_its_square(make: object, query: str) -> None:
    work = [madds(lowered(make(n), query)) for n in (8, 16, 32)]  # type: ignore[operator]
    first, second = (b - a for a, b in pairwise(work))
    assert first > 0
    assert second <= 2.2 * first  # linear: exactly 2; n evaluations: 4


@pytest.mark.parametrize("query", ALL_PREFIXES)
@pytest.mark.parametrize("make", [cp, hmm, btree])
def test_all_prefixes_cost_a_few_evaluations(make: object, query: str) -> None:
    circuit = make(32)  # type: ignore[operator]
    one = madds(lowered(circuit, "loglik"))
    rows = 32 * R * V  # q(x_i | x_<i) for all values: one contraction with the tables
    assert madds(lowered(circuit, query)) < 6 * one + 6 * rows


def test_a_mixture_needs_no_more_nodes_for_more_variables() -> None:
    sizes = [sum(1 for _ in lowered(cp(n), "conditionals").nodes()) for n in (4, 16, 64)]
    assert len(set(sizes)) == 1


def crossed(n: int) -> Circuit:
    """A chain of pairs (i, n-1-i): no product splits an interval."""
    nested: object = (0, n - 1)
    for i in range(1, n // 2):
        nested = ((i, n - 1 - i), nested)
    return templates.tree(from_nested(nested), R, V)  # type: ignore[arg-type]


def test_other_circuits_visit_only_nodes_above_a_leaf() -> None:
    """Sums that are evaluated for all prefixes together: one per node and variable below it."""
    circuit = crossed(8)
    notes = Notes()
    root = circuit.root
    module = ToTensor().run(query_module(circuit, root, "prefix")[0], notes)
    flat = [n for n in postorder(unfold(to_tensor.expand_fused(root))) if isinstance(n, c.Sum)]
    found = sum(isinstance(n, t.Contract) for n in module.nodes())
    below = sum(n.type.scopes[0].bit_count() for n in flat)  # type: ignore[union-attr]
    assert found <= below + len(flat)
    assert found < len(flat) * circuit.n / 1.5  # fewer than an evaluation for each prefix
    assert any("nodes cut by 8 prefixes" in line for line in notes.lines)


@pytest.mark.parametrize("query", ALL_PREFIXES)
def test_beyond_the_limit_the_query_is_refused_by_name(
    query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_tensor, "CUT_LIMIT", 100)
    with pytest.raises(PccError, match=f"E133.*'{query}' would visit .* nodes"):
        lowered(crossed(8), query)
    for other in set(QUERIES) - set(ALL_PREFIXES):
        lowered(crossed(8), other)  # one sweep each: no limit applies
