"""f(constants) is computed at compile time, in float64, and rounded once."""

from __future__ import annotations

import numpy as np
from laws import applied, const, leaf, module, outline

from pcc.circuit import ops as c
from pcc.ir.core import Op
from pcc.passes.fold_constants import FoldConstants
from pcc.passes.manager import Manager
from pcc.tensor import ops as t


def product(*shapes: tuple[int, ...]) -> t.Contract:
    a, b = (const(*s, seed=i) for i, s in enumerate(shapes))
    return t.Contract(a, b, "foh,fhi->foi")


def test_a_chain_is_folded_before_and_after() -> None:
    w = product((1, 2, 4), (1, 4, 2))
    before = module(c.Sum(leaf(0), w), 3)
    (after) = Manager().run(before, [FoldConstants()])
    assert sum("t.contract" in line for line in outline(before)) == 1
    assert [line.split()[2] for line in outline(after)[:-1]] == [
        "t.const",
        "c.categorical",
        "t.const",
        "c.sum",
    ]
    found = after.roots[0].w.value.value  # type: ignore[attr-defined]
    a, b = (x.value.value.astype(np.float64) for x in (w.a, w.b))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found, (a @ b).astype(np.float32))


def test_a_chain_rounds_once() -> None:
    third = t.Const(np.array([1.0], np.float32))  # type: ignore[arg-type]
    three = t.Const(np.array([3.0], np.float32))  # type: ignore[arg-type]
    tenth: Op = t.Div(third, three)
    for _ in range(6):  # sums of float64 thirds; rounding each step to float32 would drift
        tenth = t.Mul(tenth, t.Div(third, three))
    out = applied(FoldConstants(), module(tenth))[0].roots[0]
    assert out.value.value[0] == np.float32((1 / 3) ** 7)  # type: ignore[attr-defined]


def test_what_depends_on_an_input_stays() -> None:
    z = t.Input("z", "f32", "c", (2,))
    root = c.Categorical((0,), t.Softmax(t.Contract(z, const(1, 2, 3, 2), "d,abcd->abc")))
    before = module(root, 3)
    assert applied(FoldConstants(), before)[0].roots == before.roots


def test_declines_results_that_are_much_larger() -> None:
    a, b = const(1, 6, 1), const(1, 1, 6)
    before = module(t.Mul(a, b))
    after, notes = applied(FoldConstants(limit=10, grow=2), before)
    assert after.roots == before.roots
    assert "36 elements from 12" in notes[0]
