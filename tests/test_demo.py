"""What ships: its size, the demo's output, and its numbers against those of the training script.

`examples/tiny/metrics.json` was written by `train.py`, which evaluates the heads in plain numpy
and shares no code with the compiler.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from shipped import EXAMPLES, HEADS, ROOT, TINY

import pcc

METRICS: dict[str, Any] = json.loads((TINY / "metrics.json").read_text())["excerpts"]["heads"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))  # drafts, decoding, demo
    return importlib.import_module("drafts")


def test_what_ships_is_small_and_documented() -> None:
    files = [p for p in EXAMPLES.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    tiny = [p for p in files if TINY in p.parents]
    assert sum(p.stat().st_size for p in tiny) < 1_000_000
    text = (TINY / "README.md").read_text()
    for name in (*HEADS, "train.py", "encoder.safetensors", "heldout.npz"):
        assert name in text
    assert not [p for p in files if p.suffix in (".pt", ".pkl", ".pickle")]


def test_demo_runs_without_torch(tmp_path: Path) -> None:
    """As `make demo` runs it, with one trained head, where torch cannot be imported."""
    block = tmp_path / "torch"
    block.mkdir()
    (block / "__init__.py").write_text("raise ImportError('torch is not for the demo')\n")
    args = "--every 200 --heads ff-n8 --prompts 2 --bytes 24".split()
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = {args}; "
        f"runpy.run_path({str(EXAMPLES / 'demo.py')!r}, run_name='__main__')"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in (*HEADS, "ff-n8"):
        assert f"{name}.pcc: " in done.stdout
    assert done.stdout.count("agrees with the float64 reference") == 4
    assert done.stdout.count("    true ") == 3
    assert re.search(r"\(\d+ rounds, [\d.]+ bytes each", done.stdout)
    assert re.search(r"^  autoregressive +\d+ +1.00 +1.00 +2/2$", done.stdout, re.M)
    assert re.search(
        r"^  fully factorised +\d+ +[\d.]+ +[\d.]+ +.* (2/2|1/2, 1 part)", done.stdout, re.M
    )
    assert done.stdout.endswith("every check passed\n")


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    run = [sys.executable, str(EXAMPLES / "demo.py"), "--models", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "error[E140]" in done.stderr


def test_lanes_count_what_differs(demo: ModuleType) -> None:
    """Identical, parted at a near-tie, different: each is counted as such and shown."""
    decoding = importlib.import_module("decoding")
    lane, margins = decoding.Lane(), [float("nan"), 1.0, 1e-5, 1.0]
    decoding._compare(lane, [1, 2, 3, 4], [1, 2, 3, 4], margins)
    decoding._compare(lane, [1, 2, 3, 4], [1, 2, 9, 9], margins)
    decoding._compare(lane, [1, 2, 3, 4], [1, 9, 3, 4], margins)
    assert (lane.identical, lane.near_ties, lane.different) == (1, 1, 1)
    assert "1 DIFFER" in lane.remark()
    lane.add(2.0, 1.0, 8, 2)
    lane.add(2.0, 1.0, 4, 2)
    assert (lane.rate(), lane.round_size()) == (3.0, 3.0)
    assert lane.per_token().tolist() == [0.25, 0.5]


def test_prompts_are_spread_over_held_out_text(demo: ModuleType) -> None:
    decoding = importlib.import_module("decoding")
    few, all_of_them = decoding.prompts(8), decoding.prompts(10_000)
    assert len(set(few)) == 8
    assert len(all_of_them) == 256
    assert {len(p) for p in all_of_them} == {255}
    assert set(few) <= set(all_of_them)


@pytest.mark.parametrize("head", HEADS)
def test_drafts_equal_those_of_the_training_script(
    demo: ModuleType, tmp_path: Path, head: str
) -> None:
    """Row by row, on a part of the windows."""
    heads = importlib.import_module("heads")  # examples/tiny/heads.py: the demo put it on the path
    queries = ["loglik", "mode", "conditionals"]
    engine = pcc.load(pcc.compile(TINY / head, out=tmp_path / "m.pcc", queries=queries).path)
    held, trained = demo.Held(8, every=150), heads.load(TINY / head)
    joint = heads.loss(trained, held.context, held.x, 1.0)[1]
    got = engine.run("loglik", x=held.x, context=held.context)["log_prob"]
    np.testing.assert_allclose(got, joint, atol=1e-4)
    np.testing.assert_array_equal(
        demo.mode(engine, held.context), heads.draft(trained, held.context)
    )
    step = heads.greedy(trained, held.context)
    np.testing.assert_array_equal(demo.stepwise(engine, held.context), step)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_numbers_equal_those_of_training(demo: ModuleType, tmp_path: Path, head: str) -> None:
    """Drafts over every held-out window: the same accepted lengths and likelihood."""
    queries = ["loglik", "mode", "conditionals", "draft"]
    engine = pcc.load(pcc.compile(TINY / head, out=tmp_path / "m.pcc", queries=queries).path)
    got = demo.measure(engine, demo.Held(8))
    want = METRICS[head]
    assert got["stepwise"] == pytest.approx(want["accepted_stepwise"], abs=1.1e-3)
    assert got["mode"] == pytest.approx(want["accepted_max_product"], abs=1.1e-3)
    assert got["nats"] == pytest.approx(want["nll_per_byte"], abs=1e-4)
    base = demo.unigram(demo.Held(8))
    assert base["stepwise"] == pytest.approx(METRICS["unigram"]["accepted_stepwise"], abs=1e-3)
    assert base["nats"] == pytest.approx(METRICS["unigram"]["nll_per_byte"], abs=1e-4)
    assert got["stepwise"] > 1.5 * base["stepwise"]


def test_stepwise_drafts_equal_the_one_call_count(demo: ModuleType, tmp_path: Path) -> None:
    engine = pcc.load(pcc.compile(TINY / HEADS[2], out=tmp_path / "m.pcc",
                                  queries=["conditionals"]).path)  # fmt: skip
    held = demo.Held(8, every=500)
    drafts = demo.stepwise(engine, held.context)
    rows = engine.run("conditionals", x=held.x, context=held.context)["log_cond"].argmax(-1)
    np.testing.assert_array_equal(demo.accepted(drafts, held.x), demo.accepted(rows, held.x))


def test_windows_and_contexts(demo: ModuleType) -> None:
    held = demo.Held(8)
    with np.load(TINY / "heldout.npz") as data:
        text, length = data["data"].tobytes(), int(data["lengths"][0])
    assert held.x[5].astype(np.uint8).tobytes() == text[5:13]
    assert held.before[40] == text[16:40]
    assert held.before[length - 7] == b""  # the next file begins without a past
    want = demo.load(TINY).context([b"", text[16:40]])
    np.testing.assert_allclose(held.context[[0, 40]], want, atol=1e-5)
