"""layerize and fold-layers: equal layers at one depth become one layer with all their folds."""

from __future__ import annotations

from laws import applied, const, leaf, module, outline, prove

from pcc.circuit import ops as c
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.passes.manager import Pass
from pcc.passes.stacking import FoldLayers, Layerize
from pcc.tensor import ops as t


def pairs(k: int) -> Module:
    def half(i: int, j: int) -> Op:
        h = c.Hadamard((leaf(i, k=k, seed=i), leaf(j, k=k, seed=j)))
        return c.Sum(h, const(1, k, k, seed=10 * i + j))

    root = c.Sum(c.Hadamard((half(0, 1), half(2, 3))), const(1, 1, k, seed=9))
    return module(root, 3, 3, 3, 3)


def stacked(p: Pass, before: Module) -> None:
    after, notes = applied(p, before)
    text = outline(after)
    assert sum("c.categorical" in line for line in outline(before)) == 4
    assert sum("c.categorical" in line for line in text) == 1
    assert sum("c.sum" in line for line in text) == 2
    assert any("2 layers into one" in line for line in notes)
    prove(before, after)


def test_scalar_nodes_become_layers() -> None:
    stacked(Layerize(), pairs(1))


def test_layers_become_folds() -> None:
    stacked(FoldLayers(), pairs(2))


def test_layerize_declines_layers_with_units() -> None:
    before = pairs(2)
    assert applied(Layerize(), before)[0].roots == before.roots


def test_folding_declines_where_wiring_would_cost_more() -> None:
    root = c.Hadamard((leaf(0, seed=1), leaf(1, seed=2)))
    before = module(root, 3, 3)
    assert applied(FoldLayers(), before)[0].roots == before.roots


def test_contextual_parameters_are_stacked_inside_their_softmax() -> None:
    z = t.Input("z", "f32", "c", (2,))

    def table(i: int) -> Op:
        p = t.Softmax(t.Contract(z, const(1, 2, 3, 2, seed=i), "d,abcd->abc"))
        return c.Categorical((i,), p)

    def half(i: int) -> Op:
        return c.Sum(c.Hadamard((table(i), table(i + 1))), const(1, 2, 2, seed=i))

    before = module(c.Hadamard((half(0), half(2))), 3, 3, 3, 3)
    after, _ = applied(FoldLayers(), before)
    assert sum("t.softmax" in line for line in outline(after)) == 1
    assert sum("t.contract" in line for line in outline(after)) == 1
    prove(before, after)
