"""TensorRT on a GPU: queries as the evaluator answers, texts of a CPU, halves that sum to one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcc
from pcc.conformance.bundles import Setting
from pcc.conformance.circuits import check_queries
from pcc.conformance.report import BAD
from pcc.conformance.scenarios import SCENARIOS, check_protocol
from pcc.conformance.texts import read
from pcc.frontends import templates

pytest.importorskip("tensorrt", reason="TensorRT is not installed")
ROOT = Path(__file__).resolve().parents[2]
QUICK = (("level", 1),)
ROUNDS = (*QUICK, ("only", "step,step_greedy,prefill,prefill_greedy"))


def driver() -> bool:
    """Whether there is a GPU: without one, some releases crash the process."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not driver(), reason="there is no GPU")


def test_queries_of_small_circuits(tmp_path: Path) -> None:
    setting = Setting("tensorrt", "tensorrt", "fp32", engine=QUICK)
    found = list(check_queries(setting, tmp_path, print))
    assert [f for f in found if f.verdict in BAD] == []
    assert len([f for f in found if f.verdict == "ok"]) > 20


@pytest.mark.parametrize("name", ["llama-hmm-n4", "evabyte-own-heads-n4"])
@pytest.mark.parametrize("profiles", [False, True])
def test_texts_are_those_of_a_cpu(tmp_path: Path, name: str, profiles: bool) -> None:
    stored = read(ROOT / "benchmarks/results/conformance_expected.json.gz")
    engine = (*ROUNDS, ("profiles", profiles))
    setting = Setting("tensorrt", "tensorrt", "fp32", engine=engine)
    chosen = tuple(s for s in SCENARIOS if s.name == name)
    found = list(check_protocol(setting, tmp_path, print, stored, chosen))
    assert [f for f in found if f.verdict in BAD] == []
    assert any(f.verdict == "ok" for f in found)


@pytest.mark.parametrize(("kind", "n"), [("cp", 4), ("btree", 4), ("hmm", 8)])
def test_q_sums_to_one_in_half_precision(tmp_path: Path, kind: str, n: int) -> None:
    """Of the HMM, 8.6 once rounded u, the context and q on their way."""
    circuit = getattr(templates, kind)(n, 8, 320, context=512, seed=1)
    how: Any = {"target": "tensorrt", "precision": "fp16", "validate": False}
    pcc.compile(circuit, queries=["draft"], out=tmp_path / "m.pcc", engine=dict(QUICK), **how)
    engine, rng = pcc.load(tmp_path / "m.pcc", provider="tensorrt"), np.random.default_rng(0)
    slots = next(i["shape"][1] for i in engine.queries["draft"]["inputs"] if i["name"] == "u")
    for _ in range(10):
        feed: dict[str, Any] = {
            "context": rng.normal(size=(1, 512)).astype(np.float32),
            "carry": rng.integers(0, 320, 1), "u": rng.random((1, slots)).astype(np.float32),
        }  # fmt: skip
        q = engine.run("draft", **feed)["q"].astype(np.float64)
        assert np.abs(q.sum(-1) - 1).max() < 1e-5


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_a_refitted_engine_answers_as_the_new_head(tmp_path: Path, kind: str) -> None:
    heads = [getattr(templates, kind)(4, 8, 40, context=16, seed=s) for s in (1, 2)]
    how: dict[str, Any] = {"queries": ["prefix"], "validate": False}
    pcc.compile(heads[0], target="tensorrt", out=tmp_path / "a.pcc",
                engine={**dict(QUICK), "refit": "refit"}, **how)  # fmt: skip
    pcc.compile(heads[1], target="tensorrt", out=tmp_path / "b.pcc", engine=dict(QUICK), **how)
    pcc.refit(tmp_path / "a.pcc", heads[1], out=tmp_path / "c.pcc", validate=False)
    rng = np.random.default_rng(0)
    feed = {"x": rng.integers(0, 40, (1, 4)),
            "context": rng.normal(size=(1, 16)).astype(np.float32)}  # fmt: skip
    old, new, got = (
        pcc.load(tmp_path / f"{k}.pcc", provider="tensorrt").run("prefix", **feed)["log_cond"]
        for k in "abc"
    )
    assert np.abs(old - new).max() > 1e-2
    np.testing.assert_allclose(got, new, atol=1e-4)
