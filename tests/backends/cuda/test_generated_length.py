"""A job of too many statements is divided: a part of it is stored first."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from generated import Kernels, Values
from graphs import agree

from pcc.backends.cuda.codegen import generate, work
from pcc.errors import PccError
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.tensor import ops as t

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def equal(module: Module, feed: dict[str, Values], tolerance: float) -> Kernels:
    kernels = Kernels([module], 1)
    got, want = kernels(0, feed, 1), kernels.meaning(0, feed)
    for name, value in got.items():
        agree(want[name], value, tolerance=tolerance, what=name)
    return kernels


def pairs(count: int, x: Op) -> Op:
    """Return sum_i x_i x_{i+1} in float32, as a balanced tree of additions."""
    parts: list[Op] = [t.Mul(t.Take(x, 0, (i,)), t.Take(x, 0, (i + 1,))) for i in range(count)]
    while len(parts) > 1:
        parts = [t.Add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@compiled
def test_a_sum_of_too_many_parts_is_divided_in_the_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = t.Input("x", "f32", "b", (257,))
    module = Module("m", (), (("y", pairs(256, x)),))
    feed = {"x": np.random.default_rng(0).normal(size=(1, 257)).astype(np.float32)}
    made = equal(module, feed, 1e-5).made["k0"]
    assert made.phases == 2  # what is stored is stored side by side
    monkeypatch.setattr(work, "TEXT", 1 << 20)
    assert equal(module, feed, 1e-5).made["k0"].phases == 1


@compiled
@pytest.mark.parametrize("beyond", [0, 1, 2, work.DEEP])
def test_a_long_chain_is_divided(beyond: int) -> None:
    """Ops on ops, as many as may be and more: its end, which is stored, is not what is refused."""
    x = t.Input("x", "f32", "b", (3,))
    y: Op = x
    for _ in range(work.DEEP + beyond):
        y = t.Add(y, x)
    feed = {"x": np.array([[0.5, -0.25, 0.75]], np.float32)}
    equal(Module("m", (), (("y", y),)), feed, 1e-6)


def test_an_op_of_too_many_operands_is_refused() -> None:
    """What it reads is stored already: nothing is left that could be stored first."""
    xs = tuple(t.Input(f"x{i}", "f32", "b", (2, 3)) for i in range(work.TEXT))
    joined = t.Concat(xs, 1)
    with pytest.raises(PccError, match="E182") as caught:
        generate("k", [joined], list(xs), [joined], 1)
    assert caught.value.hint
