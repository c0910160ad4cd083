"""a (b c) = a b c; 1 x = x; whole and nested gathers; concatenations."""

from __future__ import annotations

import numpy as np
from laws import applied, const, leaf, module, outline, prove

from pcc.circuit import ops as c
from pcc.passes.canonicalize import Canonicalize
from pcc.tensor import ops as t


def ones(*shape: int) -> t.Const:
    return t.Const(np.ones(shape, np.float32))  # type: ignore[arg-type]


def test_flattens_and_removes_units_before_and_after() -> None:
    a, b, d = leaf(0, v=2), leaf(1, v=3), leaf(2, v=2, seed=4)
    nested = c.Hadamard((c.Hadamard((a, b)), c.Mix((d,), ones(1, 2, 1))))
    whole = c.Gather(c.Concat((nested,)), (0,))
    before = module(c.Sum(whole, const(1, 1, 2)), 2, 3, 2)
    after, _ = applied(Canonicalize(), before)
    assert [line for line in outline(before) if "c." in line and "categorical" not in line] == [
        "%4 = c.hadamard [%1, %3] : units<1x2>[{0-1}]",
        "%8 = c.mix [%6], %7 : units<1x2>[{2}]",
        "%9 = c.hadamard [%4, %8] : units<1x2>[{0-2}]",
        "%10 = c.concat [%9] : units<1x2>[{0-2}]",
        "%11 = c.gather %10 {folds=[0]} : units<1x2>[{0-2}]",
        "%13 = c.sum %11, %12 : units<1x1>[{0-2}]",
    ]
    assert [line for line in outline(after) if "c." in line and "categorical" not in line] == [
        "%6 = c.hadamard [%1, %3, %5] : units<1x2>[{0-2}]",
        "%8 = c.sum %6, %7 : units<1x1>[{0-2}]",
    ]
    prove(before, after)


def test_gathers_compose_and_look_through_concatenations() -> None:
    layers = c.Concat((leaf(0, 1), leaf(2, 3, seed=1)))
    twice = c.Gather(c.Gather(layers, (3, 0, 2)), (2, 0))
    before = module(twice, 3, 3, 3, 3)
    after, _ = applied(Canonicalize(), before)
    assert "c.gather %1 {folds=[0 1]}" not in " ".join(outline(after))
    assert not any("c.concat" in line for line in outline(after))
    prove(before, after)


def test_declines_what_has_another_reader() -> None:
    shared = c.Hadamard((leaf(0), leaf(1)))
    one = c.Hadamard((shared, leaf(2)))
    other = c.Hadamard((shared, leaf(2, seed=5)))
    before = module(c.Mix((one, other), const(1, 2, 2)), 3, 3, 3)
    after, _ = applied(Canonicalize(), before)
    assert after.roots == before.roots  # flattening would compute the product twice


def test_a_weight_near_one_stays() -> None:
    w = t.Const(np.full((1, 2, 1), 1.0000001, np.float32))  # type: ignore[arg-type]
    before = module(c.Mix((leaf(0),), w), 3)
    assert applied(Canonicalize(), before)[0].roots == before.roots
