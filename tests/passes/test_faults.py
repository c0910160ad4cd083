"""Validation catches seeded faults in what passes return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faults import faults
from laws import applied
from strategies import random_circuit

from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES
from pcc.driver import query_module
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.interp.queries import evaluate
from pcc.ir.module import Module
from pcc.passes.manager import Exact, Pass
from pcc.passes.pipelines import circuit_pipeline, tensor_pipeline
from pcc.passes.validate import Mismatch, compare
from pcc.tensor.ops import Input

CIRCUITS = {
    "cp": templates.cp(3, 3, 4, context=3),
    "hmm": templates.hmm(3, 2, 3, context=3),
    "tree": templates.btree(4, 2, 3, repetitions=2, shuffle=1),
}


LIMIT = 5  # faults per pass
ROWS = 300
SHARE = 0.1


def steps(circuit: Circuit, query: str | None) -> list[tuple[Pass, Module, Module]]:
    """What each pass made of a module."""
    if query is None:
        module, passes = circuit.module(), circuit_pipeline()
    else:
        module, passes = query_module(circuit, circuit.root, query)[0], tensor_pipeline()
    out = []
    for p in passes:
        after, _ = applied(p, module)
        if after.roots != module.roots:
            out.append((p, module, after))
        module = after
    return out


def caught(p: Pass, before: Module, wrong: Module) -> bool:
    try:
        compare(before, wrong, p.exact, p.tolerance)
    except (Mismatch, PccError):
        return True
    return False


def harm(right: Module, wrong: Module, circuit: Circuit) -> float:
    """Return the share of many random rows on which a fault changes an output.

    Some faults are none: a factor that every value of a row shares is lost in normalising, a branch
    may be reached by impossible evidence only.
    """
    env = inputs(right, circuit)
    with np.errstate(all="ignore"):
        pairs = zip(evaluate(right, env), evaluate(wrong, env), strict=True)
        changed = [
            np.abs(a - b) > 1e-6 * np.maximum(1, np.abs(a))
            for a, b in map(finite, *zip(*pairs, strict=True))
        ]
    return float(np.mean(np.any([c.reshape(ROWS, -1).any(axis=1) for c in changed], axis=0)))


def finite(a: Any, b: Any) -> tuple[Any, Any]:
    """Replace infinities by large numbers, NaN by larger ones, and give both all rows."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    whole = (ROWS, *shape[1:])
    return tuple(  # type: ignore[return-value]
        np.broadcast_to(
            np.nan_to_num(np.asarray(v, float), nan=1e9, posinf=1e8, neginf=-1e8), whole
        )
        for v in (a, b)
    )


def inputs(m: Module, circuit: Circuit) -> dict[str, Any]:
    rng, env = np.random.default_rng(5), {}
    wanted = {n.key: n for n in m.nodes() if isinstance(n, Input)} | circuit.inputs()
    for key, n in wanted.items():
        env[key] = rng.normal(size=(ROWS, *n.shape))
        if key in ("x", "carry"):
            env[key] = rng.integers(0, circuit.cards[0], env[key].shape)
        elif key == "u":
            env[key] = rng.random(env[key].shape)
        elif n.dtype == "bool":
            env[key] = rng.random(env[key].shape) < 0.5
    env.setdefault("x", rng.integers(0, circuit.cards[0], (ROWS, circuit.n)))
    env.setdefault("observed", rng.random((ROWS, circuit.n)) < 0.5)
    return env


def survivors(circuit: Circuit, query: str | None, exact: Exact) -> tuple[int, list[str]]:
    """Try a sample of all faults; return how many were caught, and the harmful ones missed."""
    rng, found, missed = np.random.default_rng(0), 0, []
    for p, before, after in steps(circuit, query):
        assert compare(before, after, p.exact, p.tolerance) <= p.tolerance
        if p.exact is not exact:
            continue
        every = list(faults(after))
        for i in rng.permutation(len(every))[:LIMIT]:
            what, wrong = every[i]
            if caught(p, before, wrong):
                found += 1
            elif (share := harm(after, wrong, circuit)) > SHARE:
                missed.append(f"{p.name}: {what} changes {share:.0%} of the rows")
    return found, missed


def test_polynomial_passes() -> None:
    total = 0
    for seed in range(8):  # templates are in layers already: node graphs, so that passes fire
        found, missed = survivors(random_circuit(seed), None, Exact.POLYNOMIAL)
        total += found
        assert not missed
    assert total >= 50


@pytest.mark.parametrize("query", sorted(QUERIES))
@pytest.mark.parametrize("kind", CIRCUITS)
def test_rounding_passes(kind: str, query: str) -> None:
    found, missed = survivors(CIRCUITS[kind], query, Exact.ROUNDING)
    assert not missed
    assert found >= 7
