"""`pcc verify` of graphs with fixed sizes: as many rows as they were compiled for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pcc
from pcc.check import in_batches
from pcc.conformance import verifiers
from pcc.frontends import templates
from pcc.interp.reference import reference
from pcc.samples import sample_inputs


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_queries_of_a_static_bundle(batch: int, tmp_path: Path) -> None:
    """Stored samples have three rows: one at a time, in pairs, or filled up."""
    circuit = templates.hmm(3, 2, 4, context=5, seed=1)
    out = tmp_path / "m.pcc"
    pcc.compile(circuit, out=out, target="onnx-cuda", batch=batch, validate=False)
    report = pcc.verify(out)
    assert report.ok
    assert {c.query for c in report.checks} == set(pcc.load(out).queries)
    engine = pcc.load(out)
    inputs = sample_inputs(circuit, engine.queries["marginal"], 3, 7)
    got = in_batches(engine, "marginal", inputs)["log_prob"]
    want = reference(circuit, "marginal", inputs)["log_prob"]
    assert got.shape == want.shape == (7,)
    assert np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_generation_of_a_static_bundle(batch: int, tmp_path: Path) -> None:
    source, model = verifiers.llama(tmp_path, "ff", 2)
    out = tmp_path / "m.pcc"
    how = {"target": "onnx-cuda", "max_seq": 64, "chunk": 8, "validate": False}
    pcc.compile(source, verifier=model, out=out, batch=batch, queries=["draft"], **how)
    report = pcc.verify(out)
    assert report.ok
    rows = {c.what.partition(" (row ")[2] for c in report.checks if c.query == "verify"}
    assert rows == ({""} if batch == 1 else {"0)", "1)"})
    text = next(c.what for c in report.checks if c.what.startswith("greedy text"))
    assert ("is not compared" in text) is (batch > 1)
