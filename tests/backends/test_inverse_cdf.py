"""The rule for drawing an index, through ONNX: a mass of zero never comes out.

index = the first j with mass_j > 0 and cumsum_j > u * total, else the last j with mass_j > 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Compiled

from pcc.backends.onnx.graph import Layout
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
EDGES = np.array([0.0, 2.0**-24, 0.25, 0.5, 1 - 2.0**-23, 1 - 2.0**-24], np.float32)
TINY, LEAST = np.float32(2.0**-149), np.float32(2.0**-126)  # smallest subnormal, smallest normal


def rule(mass: Values, u: Values) -> Values:
    """The rule as it is written, one float32 at a time."""
    out = np.zeros(len(mass), np.int64)
    for row, (m, level) in enumerate(zip(mass, u, strict=True)):
        cum = np.cumsum(m, dtype=np.float32)
        positive = np.flatnonzero(m > 0)
        hit = [j for j in positive if cum[j] > np.float32(level * cum[-1])]
        out[row] = hit[0] if hit else (positive[-1] if len(positive) else 0)
    return out


def masses(v: int) -> Values:
    """Rows with zero heads, zero tails, one-hot, and total masses from subnormal to huge."""
    rng = np.random.default_rng(5)
    rows = [np.eye(v, dtype=np.float32)[j] for j in range(v)]
    for size in (TINY, 3 * TINY, LEAST, np.float32(1e-30), np.float32(1), np.float32(1e30)):
        for head, tail in ((0, 0), (1, 0), (0, 1), (v // 3, v // 3), (v - 1, 0), (0, v - 1)):
            row = np.full(v, size, np.float32)
            row[:head] = 0
            row[v - tail :] = 0
            rows.append(row)
            gaps = row.copy()
            gaps[1:-1:2] = 0
            rows.append(gaps)
            rows.append((row * rng.random(v, dtype=np.float32)).astype(np.float32))
    absorbed = np.zeros(v, np.float32)
    absorbed[[0, -1]] = 1, 2.0**-60  # the last mass vanishes in the sum
    rows.append(absorbed)
    return np.stack([r for r in rows if (r > 0).any()])


def drawn(compiled: Compiled, mass: Values, u: Values) -> Values:
    got: Values = compiled({"mass": mass[:, None], "u": u[:, None]})["i"][:, 0]
    return got


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("v", [1, 2, 3, 17, 320])
def test_no_index_of_mass_zero(v: int, position: int, opset: int) -> None:
    mass = t.Input("mass", "f32", "b", (1, v))
    module = Module("draw", (), (("i", t.InverseCdf(mass, t.Input("u", "f32", "b", (1,)))),))
    compiled = Compiled(module, opset=opset, layout=Layout(position))
    for u in EDGES:
        rows = masses(v)
        level = np.full(len(rows), u, np.float32)
        got = drawn(compiled, rows, level)
        np.testing.assert_array_equal(rows[np.arange(len(rows)), got] > 0, True)
        if v < 100:  # longer sums may be added in another order
            np.testing.assert_array_equal(got, rule(rows, level))
    nothing = drawn(compiled, np.zeros((3, v), np.float32), EDGES[[0, 2, 5]])
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("size", [1.0, 1e-38, 1e-44])
def test_a_trained_row_in_subnormal_numbers(size: float) -> None:
    """A constant table is looked at when it is lowered: tiny rows get the guarded form."""
    table = np.array([[0, size, 0, size, 0], [0, 0, size, 0, 0]], np.float32)
    u = t.Input("u", "f32", "b", (2,))
    module = Module("draw", (), (("i", t.InverseCdf(t.Const(Array.of(table)), u)),))
    compiled = Compiled(module)
    for level in EDGES:
        got = compiled({"u": np.full((1, 2), level, np.float32)})["i"]
        want = rule(table, np.full(2, level, np.float32))
        np.testing.assert_array_equal(got[0], want)


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 1 - 2.0**-24])
def test_after_a_softmax_of_logs(u: float) -> None:
    """What compiled queries do: -inf scores are never drawn, whatever the uniform."""
    rng = np.random.default_rng(3)
    score = (40 * rng.normal(size=(200, 1, 9))).astype(np.float32)
    score[rng.random(score.shape) < 0.5] = -np.inf
    score[..., 4] = np.where(np.isneginf(score).all(axis=-1), 0.0, score[..., 4])
    x = t.Input("score", "f32", "b", (1, 9))
    mass = t.Softmax(t.Add(x, t.Const(Array.of(np.zeros((1, 9), np.float32)))))
    index = t.InverseCdf(mass, t.Input("u", "f32", "b", (1,)))
    compiled = Compiled(Module("draw", (), (("i", index),)))
    feed = {"score": score, "u": np.full((200, 1), u, np.float32)}
    got = compiled(feed)["i"]
    chosen = np.take_along_axis(score[:, 0], got, axis=-1)
    assert not np.isneginf(chosen).any()
    probability = np.exp(chosen[:, 0].astype(float) - score[:, 0].max(axis=-1))
    assert (probability > 2.0**-151).all()  # what rounds to a positive float32
