"""Circuits of 100,000 nodes, as deep as that: build, print, parse and verify stay linear."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pcc.circuit.text import parse, resources, show
from pcc.interp.run import log_value
from pcc.ir.verify import verify

HERE = Path(__file__).parent
KINDS = {"chain": 100_000, "states": 100_000, "tree": 100_000}


def measured(kind: str, nodes: int) -> dict[str, float]:
    """Run `scale.py` in a process of its own, so that its peak memory is its own."""
    run = subprocess.run(
        [sys.executable, str(HERE / "scale.py"), kind, str(nodes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(json.loads(run.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_full_size(kind: str, record_property: pytest.FixtureRequest) -> None:
    got = measured(kind, KINDS[kind])
    record_property(kind, got)  # type: ignore[operator]
    assert got["nodes"] >= 99_000
    assert kind == "tree" or got["depth"] >= 50_000
    assert got["peak_mb"] < 1024


@pytest.mark.parametrize("kind", KINDS)
def test_small_size(kind: str) -> None:
    got = measured(kind, 6000)
    assert got["nodes"] > 5900
    assert kind == "tree" or got["depth"] >= 4000  # deeper than Python's recursion limit
    assert got["peak_mb"] < 200


def test_text_is_linear_in_the_circuit() -> None:
    """Scopes that grow along a chain are runs, so a line does not grow with its depth."""
    sys.path.insert(0, str(HERE))
    from scale import states

    small, large = (len(show(states(n))) for n in (1500, 6000))
    assert large < 4.5 * small


def test_a_deep_circuit_is_evaluated() -> None:
    sys.path.insert(0, str(HERE))
    from scale import states

    m = states(6000)
    verify(m)
    assert parse(show(m), resources=resources(m)) == m
    x = np.zeros((1, m.n), np.int64)
    assert np.allclose(log_value(m.roots[0], x), m.n * np.log(0.5), rtol=1e-12)
