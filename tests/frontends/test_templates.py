"""Templates: distributions by enumeration, their equations by loops, the published fold order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates as tm
from pcc.frontends.regions import balanced, from_networkx, random_tree
from pcc.interp.brute import Joint, states
from pcc.interp.reference import gap
from pcc.interp.run import log_value, run
from pcc.ir.semiring import Semiring
from pcc.ir.verify import verify

Values = np.ndarray[Any, Any]
V, R = 3, 2
MAKE: dict[str, Callable[..., Circuit]] = {
    "ff": lambda **k: tm.ff(4, V, **k),
    "cp": lambda **k: tm.cp(4, R, V, **k),
    "hmm": lambda **k: tm.hmm(5, R, V, **k),
    "hmm of one": lambda **k: tm.hmm(1, R, V, **k),
    "btree": lambda **k: tm.btree(5, R, V, **k),
    "btree of one": lambda **k: tm.btree(1, R, V, **k),
    "two repetitions": lambda **k: tm.btree(5, R, V, repetitions=2, **k),
    "shuffled repetitions": lambda **k: tm.btree(5, R, V, repetitions=3, shuffle=4, **k),
    "random tree": lambda **k: tm.tree(random_tree(5, 3), R, V, **k),
    "wide tree": lambda **k: tm.tree(((0, 1, 4), 2, (3, 5)), R, V, **k),
    "caterpillar": lambda **k: tm.tree((0, (1, (2, (3, 4)))), R, V, **k),
    "region graph": lambda **k: tm.region_graph(shared_regions(), R, V, **k),
    "region tree": lambda **k: tm.region_graph(((0, 1), (2, 3)), R, V, **k),
}
EVERY = pytest.mark.parametrize("name", MAKE)


def shared_regions() -> Any:
    """Two ways to split the root, which share a region."""
    import networkx as nx

    g = nx.DiGraph()
    for way, parts in {"p": ("01", "23"), "q": ("0", "123")}.items():
        g.add_node(way, partition=True)
        g.add_edge("root", way)
        g.add_edges_from((way, part) for part in parts)
    g.add_edges_from(
        [("01", "0"), ("01", "1"), ("23", "2"), ("23", "3"), ("123", "1"), ("123", "23")]
    )
    for leaf in "0123":
        g.nodes[leaf]["scope"] = [int(leaf)]
    return from_networkx(g)


@EVERY
@pytest.mark.parametrize("context", [0, 3])
def test_sums_to_one(name: str, context: int) -> None:
    circuit = MAKE[name](context=context, seed=5)
    verify(circuit.module(), stage="circuit")
    given = {"context": np.random.default_rng(1).normal(size=(3, context))} if context else {}
    joint = Joint(circuit, given)
    assert np.allclose(joint.p.sum(axis=1), 1, atol=2e-6)
    assert joint.p.min() > 0
    assert (circuit.n, circuit.cards) == (joint.x.shape[1], (V,) * circuit.n)
    if context:
        assert np.abs(joint.p[0] - joint.p[1]).max() > 1e-4  # it does depend on the context


@EVERY
def test_a_seed_is_a_circuit(name: str) -> None:
    make = MAKE[name]
    assert make(seed=1).root is make(seed=1).root
    assert make(seed=1).root is not make(seed=2).root


@EVERY
def test_logits_in_place_of_the_context(name: str) -> None:
    circuit = MAKE[name](context=3, seed=2)
    given = circuit.with_logits()
    assert set(circuit.inputs()) == {"context"}
    assert set(given.inputs()) == {n for n, _, _ in circuit.logits}
    context = np.random.default_rng(0).normal(size=(1, 3))
    x = states(circuit.cards)[::7]
    values = {n: run((node,), {"context": context}, Semiring())[0] for n, node, _ in circuit.logits}
    a = log_value(circuit.root, x, None, {"context": context})
    assert gap(a, log_value(given.root, x, None, values)) < 1e-12


def probabilities(rng: np.random.Generator, *shape: int) -> Values:
    p = rng.uniform(0.1, 1, shape)
    return (p / p.sum(-1, keepdims=True)).astype(np.float32).astype(float)


def joint(circuit: Circuit) -> dict[tuple[int, ...], float]:
    j = Joint(circuit)
    return {tuple(int(v) for v in x): float(p) for x, p in zip(j.x, j.p[0], strict=True)}


def test_the_equation_of_ff() -> None:
    phi = probabilities(np.random.default_rng(0), 3, 1, V)
    for x, p in joint(tm.ff(3, V, weights={"emissions": phi, "sums": []})).items():
        assert np.isclose(p, np.prod([phi[i, 0, x[i]] for i in range(3)]), rtol=1e-12)


def test_the_equation_of_cp() -> None:
    rng = np.random.default_rng(1)
    phi, w = probabilities(rng, 3, R, V), probabilities(rng, 1, 1, R)
    for x, p in joint(tm.cp(3, R, V, weights={"emissions": phi, "sums": [w]})).items():
        parts = [w[0, 0, z] * np.prod([phi[i, z, x[i]] for i in range(3)]) for z in range(R)]
        assert np.isclose(p, sum(parts), rtol=1e-12)


def test_the_equation_of_hmm() -> None:
    """Sum 0 is the last transition, sum n - 1 the initial distribution."""
    rng, n = np.random.default_rng(2), 4
    phi, pi = probabilities(rng, n, R, V), probabilities(rng, 1, 1, R)
    steps = [probabilities(rng, 1, R, R) for _ in range(n - 1)]
    circuit = tm.hmm(n, R, V, weights={"emissions": phi, "sums": [*steps, pi]})
    for x, p in joint(circuit).items():
        total = 0.0
        for z in itertools.product(range(R), repeat=n):
            q = pi[0, 0, z[0]] * phi[0, z[0], x[0]]
            for i in range(1, n):
                q *= steps[n - 1 - i][0, z[i - 1], z[i]] * phi[i, z[i], x[i]]
            total += q
        assert np.isclose(p, total, rtol=1e-12)


def test_the_equation_of_a_tree() -> None:
    """((0 1) (2 3)): sum 0 has the folds of both pairs, sum 1 is the root."""
    rng = np.random.default_rng(3)
    phi, pairs = probabilities(rng, 4, R, V), probabilities(rng, 2, R, R)
    top = probabilities(rng, 1, 1, R)
    circuit = tm.btree(4, R, V, weights={"emissions": phi, "sums": [pairs, top]})
    assert (
        circuit.root
        is tm.tree(balanced(4), R, V, weights={"emissions": phi, "sums": [pairs, top]}).root
    )
    for x, p in joint(circuit).items():
        m = np.zeros((2, R))
        for f, k, z in np.ndindex(2, R, R):
            left, right = phi[2 * f, z, x[2 * f]], phi[2 * f + 1, z, x[2 * f + 1]]
            m[f, k] += pairs[f, k, z] * left * right
        assert np.isclose(p, sum(top[0, 0, z] * m[0][z] * m[1][z] for z in range(R)), rtol=1e-12)


def test_a_region_graph_of_a_tree_is_the_tree() -> None:
    """One fold a layer or all folds of a level: the same law from the same numbers."""
    rng = np.random.default_rng(4)
    phi, pairs = probabilities(rng, 4, R, V), probabilities(rng, 2, R, R)
    top = probabilities(rng, 1, 1, R)
    folded = tm.tree(((0, 1), (2, 3)), R, V, weights={"emissions": phi, "sums": [pairs, top]})
    apart = {"emissions": phi, "sums": [pairs[:1], pairs[1:], top]}
    plain = tm.region_graph(((0, 1), (2, 3)), R, V, weights=apart)
    assert gap(np.log(Joint(folded).p), np.log(Joint(plain).p)) < 1e-12


ORACLE = [
    "ff-n8-r1-v16", "cp-n16-r32-v16", "hmm-n8-r4-v16", "hmm-n4-r4-v320", "btree-n8-r32-v16",
    "btree-n16-r4-v16", "x-btree-n5-r4-v16",
]  # fmt: skip


@pytest.mark.parametrize("name", ORACLE)
def test_published_numbers_in_the_published_order(name: str, shared: Callable[[str], Path]) -> None:
    """Templates take the published head's parameters as they lie, tables in token order."""
    with np.load(shared(f"oracle/head/{name}.npz"), allow_pickle=False) as f:
        data = {k: f[k] for k in f.files}

    def parameter(key: str) -> Values:
        return data[key].astype(float) * float(data[f"{key}@scale"])

    phi = parameter("mt_head._categorical_log_probs_heads.0.head.proj")
    tables = np.empty_like(phi)
    tables[data["scope_idx"]] = phi
    sums, n, r, vocab = [], *phi.shape[:3]
    while (key := f"mt_head._sum_weights_heads.{len(sums)}.head.proj") in data:
        sums.append(parameter(key))
    weights = {"emissions": tables, "sums": sums}
    kind = name.removeprefix("x-").split("-")[0]
    more: dict[str, Any] = {"context": phi.shape[3], "weights": weights}
    if kind == "ff":
        more["weights"]["sums"] = []
        circuit = tm.ff(n, vocab, **more)
    else:
        circuit = {"cp": tm.cp, "hmm": tm.hmm, "btree": tm.btree}[kind](n, r, vocab, **more)
    for s, context in enumerate(data["e"]):
        got = log_value(
            circuit.root, data["tokens"][s].astype(np.int64), None, {"context": context[None]}
        )
        assert gap(data["joint_logp_f64"][s], got[:, 0, 0]) < 1e-9


def given(emissions: Any, sums: list[Any]) -> Callable[[], object]:
    """One variable of two values, fully factorised, from these parameters."""
    return lambda: tm.ff(1, 2, weights={"emissions": emissions, "sums": sums})


WRONG: list[tuple[str, str, Callable[[], object]]] = [
    ("no variables", "T100", lambda: tm.ff(0, V)),
    ("no units", "T100", lambda: tm.cp(2, 0, V)),
    ("no values", "T100", lambda: tm.hmm(2, R, 0)),
    ("no repetitions", "T100", lambda: tm.btree(2, R, V, repetitions=0)),
    ("negative context", "T100", lambda: tm.cp(2, R, V, context=-1)),
    ("no sums", "T101", lambda: tm.ff(1, 2, weights={"emissions": np.ones((1, 1, 2))})),
    ("too few sums", "T101", lambda: tm.cp(1, 1, 2, weights={"emissions": [[[1, 0]]], "sums": []})),
    ("too many sums", "T101", given(np.ones((1, 1, 2)), [1])),
    ("wrong shape", "T101", given(np.ones((1, 2)), [])),
    ("NaN", "T101", given(np.full((1, 1, 2), np.nan), [])),
    ("too large", "T101", given(np.full((1, 1, 2), 1e39), [])),
    ("negative", "T101", given(np.full((1, 1, 2), -1), [])),
    ("words", "T101", given(np.full((1, 1, 2), "a"), [])),
    ("not a tree", "T103", lambda: tm.tree(shared_regions(), R, V)),
    ("a variable twice", "T102", lambda: tm.tree(((0, 1), 1), R, V)),
    ("no context to replace", "E123", lambda: tm.cp(2, R, V).with_logits()),
]


@pytest.mark.parametrize(("what", "code", "build"), WRONG, ids=[w for w, _, _ in WRONG])
def test_wrong_input(what: str, code: str, build: Callable[[], object]) -> None:
    with pytest.raises(PccError) as e:
        build()
    assert e.value.code == code, str(e.value)
