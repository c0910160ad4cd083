"""Terms of weight zero, and folds that nothing reads."""

from __future__ import annotations

import numpy as np
import pytest
from laws import applied, const, leaf, module, outline, prove

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.passes.prune import PruneUnreachable, PruneZero
from pcc.tensor import ops as t


def weight(zero: list[int], *, everywhere: bool = True) -> t.Const:
    w = np.random.default_rng(1).uniform(0.1, 0.9, (1, 2, 3)).astype(np.float32)
    w[:, : 2 if everywhere else 1, zero] = 0.0
    return t.Const(w)  # type: ignore[arg-type]


def three() -> tuple[c.CircuitOp, ...]:
    return tuple(leaf(0, seed=s) for s in (1, 2, 3))  # type: ignore[misc]


def test_zero_terms_go_before_and_after() -> None:
    before = module(c.Mix(three(), weight([1])), 3)
    after, notes = applied(PruneZero(), before)
    assert outline(before)[-2] == "%7 = c.mix [%1, %3, %5], %6 : units<1x2>[{0}]"
    assert outline(after)[-2] == "%5 = c.mix [%1, %3], %4 : units<1x2>[{0}]"
    assert "dropped 1 of 3 terms" in notes[0]
    prove(before, after)


def test_a_weight_that_is_zero_for_one_unit_only_stays() -> None:
    before = module(c.Mix(three(), weight([1], everywhere=False)), 3)
    assert applied(PruneZero(), before)[0].roots == before.roots


def test_a_circuit_of_zeros_is_an_error() -> None:
    with pytest.raises(PccError, match="E310"):
        applied(PruneZero(), module(c.Mix(three(), weight([0, 1, 2])), 3))


def test_folds_that_nothing_reads_go() -> None:
    x = c.Gather(leaf(0, 1, 2), (2, 0))
    before = module(c.Hadamard((c.Gather(x, (0,)), c.Gather(x, (1,)))), 3, 3, 3)
    after, notes = applied(PruneUnreachable(), before)
    assert outline(before)[1] == "%1 = c.categorical %0 {vars=[0 1 2]} : units<3x2>[{0} {1} {2}]"
    assert outline(after)[1] == "%1 = c.categorical %0 {vars=[0 2]} : units<2x2>[{0} {2}]"
    assert "kept 2 of 3 folds" in notes[0]
    prove(before, after)


def test_folds_of_a_sum_and_of_contextual_tables_go() -> None:
    p = t.Softmax(t.Contract(t.Input("z", "f32", "c", (2,)), const(3, 2, 3, 2), "d,abcd->abc"))
    layer = c.Sum(c.Categorical((0, 1, 2), p), const(3, 2, 2))
    before = module(c.Gather(layer, (1,)), 3, 3, 3)
    after, _ = applied(PruneUnreachable(), before)
    assert any("c.sum" in line and "units<1x2>" in line for line in outline(after))
    prove(before, after)


def test_a_layer_that_is_read_whole_stays() -> None:
    x = leaf(0, 1)
    both = c.Concat((c.Gather(x, (0,)), c.Sum(x, const(2, 2, 2))))
    before = module(both, 3, 3)
    assert applied(PruneUnreachable(), before)[0].roots == before.roots
