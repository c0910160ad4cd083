"""The report of 8-bit weights: its arithmetic, and the tables that the docs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import int8

    return int8


def test_differences_are_what_they_say(report: Any) -> None:
    want = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]]]))
    got = np.log(np.array([[[0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]]]))
    two = np.concatenate([want, want]), np.concatenate([got, want])
    found = report.compared(*two, np.array([[9, 0, 2], [9, 0, 2]]))
    assert found["same_choice"] == pytest.approx(5 / 6)
    assert found["total_variation"]["mean"] == pytest.approx(0.25 / 3 / 2, abs=1e-4)
    # Bytes 0 and 2 follow: 1 bit and 0.51 before, 2 bits and 0.51 in one of the prompts after.
    assert found["change"]["mean"] == pytest.approx(0.25, abs=1e-4)
    before = np.mean([1.0, -np.log2(0.7)])
    assert found["bits_per_byte"]["mean"] == pytest.approx(before + 0.25, abs=1e-4)
    off = np.abs(two[1] - two[0]) / two[0].std(-1, keepdims=True)
    assert found["max_of_spread"] == pytest.approx(off.max())
    assert found["rms_of_spread"] == pytest.approx(np.sqrt((off**2).mean()))


def test_the_docs_hold_the_tables_of_the_results(report: Any) -> None:
    document = json.loads(report.RESULTS.read_text("utf-8"))
    text = report.DOC.read_text("utf-8")
    assert report.into(text, document) == text
    rows = {(r["head"], r["weights"]): r for r in document["rows"]}
    assert {head for head, _ in rows} == set(report.decoding.heads())
    assert {form for _, form in rows} == set(report.FORMS)
    for head in report.decoding.heads():
        plain, both = rows[head, "fp32"], rows[head, "int8 both"]
        assert both["weight_file_bytes"] < 0.5 * plain["weight_file_bytes"]
        assert "accepted_change" in both


def test_shipped_weights_are_rounded_by_less_than_random_ones() -> None:
    """Weights m t of a grid, |m| <= 63, become 127/63 m: what is lost grows with m, towards zero.

    Normal numbers of the same spread lose about a tenth more, independently of the number.
    """
    from pcc.ir.array import Array
    from pcc.ir.quantise import by_columns
    from pcc.models.load import load_model

    def lost(w: Any) -> tuple[float, float]:
        q, s = by_columns(Array.of(w))
        error = q.value * s.value - w
        return error.std() / w.std(), np.corrcoef(error.ravel(), w.ravel())[0, 1]

    model = load_model(ROOT / "examples/models/backbone", max_rows=8, precision="fp32")
    w = np.array(model.layers[0].qkv.value.value)
    rng = np.random.default_rng(0)
    (grid, on), (free, off) = lost(w), lost(rng.normal(size=w.shape).astype("f4") * w.std(0))
    assert -0.6 < on < -0.25
    assert abs(off) < 0.02
    assert 0.88 < grid / free < 0.94
