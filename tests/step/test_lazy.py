"""`lazy-experts`: the law on random selections, and the cases that it declines."""

from __future__ import annotations

import numpy as np
import pytest

from pcc.interp.run import run
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.passes import pieces as mk
from pcc.passes.lazy_experts import LazyExperts
from pcc.passes.manager import Manager, Notes
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate

F, K, V, D = 4, 5, 3, 6
W = np.random.default_rng(0).normal(size=(F, K, V, D)).astype(np.float32)
E = t.Input("context", "f32", "c", (D,))
LOGITS = t.Contract(E, mk.const(W), "d,abcd->abc")


def sel(rows: int, name: str = "sel") -> Op:
    return t.Input(name, "i64", "b", (rows,))


def feed(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "context": rng.normal(size=(1, D)),
        "sel": rng.integers(0, K, (7, rows)),
        "temperature": rng.choice([0.5, 1.0, 2.0], 7),
        "top_p": rng.random(7),
    }


def law(x: Op) -> Op:
    hot = t.Softmax(Temper(x, t.Input("temperature", "f32", "b", ())))
    return Truncate(hot, mk.const(np.int64(0)), t.Input("top_p", "f32", "b", ()))


@pytest.mark.parametrize(
    ("value", "rows", "experts"),
    [
        (t.SelectRow(t.Softmax(LOGITS), sel(F)), F, F),
        (t.SelectRow(t.LogSoftmax(LOGITS), sel(F)), F, F),
        (t.SelectRow(law(LOGITS), sel(F)), F, F),
        (t.SelectRow(t.Take(t.Softmax(LOGITS), 0, (2, 0)), sel(2)), 2, 2),
        (t.SelectRow(t.Softmax(t.Take(LOGITS, 0, (1, 2, 3))), sel(3)), 3, 3),
        (t.ReduceSum(t.Softmax(t.Take(LOGITS, 0, (1,))), 2), 0, K),
    ],
)
def test_the_same_values_from_fewer_experts(value: Op, rows: int, experts: int) -> None:
    before = Module("m", (), (("y", value),))
    after = Manager().run(before, (LazyExperts(),))
    env = feed(rows)
    (a,), (b,) = run(before.roots, env, Real()), run(after.roots, env, Real())
    assert np.abs(a - b).max() < 1e-12
    products = [n for n in after.nodes() if isinstance(n, t.Contract)]
    assert sum(int(np.prod(tensor(n).shape[:-1])) for n in products) == experts
    assert LOGITS not in set(after.nodes())


@pytest.mark.parametrize(
    "values",
    [
        (t.SelectRow(t.Softmax(LOGITS), sel(F)), t.Softmax(LOGITS)),  # all rows are read anyway
        tuple(t.SelectRow(t.Softmax(LOGITS), sel(F, f"sel{i}")) for i in range(K)),  # no fewer
        (t.ReduceSum(t.Softmax(LOGITS), 2),),
        (t.SelectRow(t.Exp(LOGITS), sel(F)),),  # no row-wise op that it knows
    ],
)
def test_declines(values: tuple[Op, ...]) -> None:
    module = Module("m", (), tuple((f"y{i}", v) for i, v in enumerate(values)))
    notes = Notes()
    after = LazyExperts().run(module, notes)
    assert all(a is b for a, b in zip(module.roots, after.roots, strict=True))
    assert any(line.startswith("declined") for line in notes.lines)


def test_a_wrong_gather_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation after every pass sees weights of another expert."""
    from pcc.errors import PccError
    from pcc.passes import lazy_experts

    true = lazy_experts._select

    def wrong(n: Op, chosen: Op) -> Op:
        (rows,) = tensor(chosen).shape
        return true(n, mk.take(chosen, [0] * rows))

    monkeypatch.setattr(lazy_experts, "_select", wrong)
    module = Module("m", (), (("y", t.SelectRow(t.Softmax(LOGITS), sel(F))),))
    with pytest.raises(PccError, match="E303"):
        Manager().run(module, (LazyExperts(),))
