"""sum-collapse, fold-leaf-sums and fusions: products of sums and sums of products."""

from __future__ import annotations

import pytest
from laws import applied, const, leaf, module, outline, prove

from pcc.circuit import ops as c
from pcc.ir.core import Op
from pcc.passes.collapse import SumCollapse
from pcc.passes.fuse import FuseCp, FuseCpt, FuseTucker
from pcc.passes.leaf_sums import FoldLeafSums
from pcc.passes.manager import Pass
from pcc.tensor import ops as t


def wide(k: int = 3) -> Op:
    return c.Hadamard((leaf(0, k=k), leaf(1, k=k, v=2)))


def contextual(*shape: int) -> Op:
    z = t.Input("z", "f32", "c", (2,))
    return t.Softmax(t.Contract(z, const(*shape, 2), "d,abcd->abc"))


def ops(m: object) -> list[str]:
    return [line.split()[2] for line in outline(m) if " = c." in line]  # type: ignore[arg-type]


def test_sum_collapse() -> None:
    before = module(c.Sum(c.Sum(wide(), const(1, 4, 3)), const(1, 2, 4)), 3, 2)
    after, notes = applied(SumCollapse(), before)
    assert outline(before)[-2] == "%8 = c.sum %6, %7 : units<1x2>[{0-1}]"
    assert outline(after)[-3] == '%7 = t.contract %5, %6 {eq="foh,fhi->foi"} : f32[1,2,3]'
    assert "2x4 times 4x3" in notes[0]
    prove(before, after)


@pytest.mark.parametrize("reason", ["costs more", "another reader"])
def test_sum_collapse_declines(reason: str) -> None:
    inner = c.Sum(wide(), const(1, 1, 3))
    if reason == "costs more":
        root: Op = c.Sum(inner, const(1, 4, 1))
    else:
        root = c.Mix((c.Sum(inner, const(1, 1, 1)), inner), const(1, 1, 2))
    before = module(root, 3, 2)
    after, notes = applied(SumCollapse(), before)
    assert after.roots == before.roots
    assert reason in notes[0]


def test_leaf_sums_become_tables() -> None:
    before = module(c.Sum(c.Gather(leaf(0, 1, 2), (2, 0)), const(2, 4, 2)), 3, 3, 3)
    after, _ = applied(FoldLeafSums(), before)
    assert ops(before) == ["c.categorical", "c.gather", "c.sum"]
    assert ops(after) == ["c.categorical"]
    assert "vars=[2 0]" in outline(after)[-2]
    prove(before, after)


@pytest.mark.parametrize("reason", ["context", "grow"])
def test_leaf_sums_decline(reason: str) -> None:
    w = contextual(1, 2, 2) if reason == "context" else const(1, 9, 2)
    before = module(c.Sum(leaf(0), w), 3)
    after, notes = applied(FoldLeafSums(), before)
    assert after.roots == before.roots
    assert reason in notes[0]


FUSIONS: list[tuple[Pass, Op, str]] = [
    (FuseTucker(), c.Sum(c.Kronecker(leaf(0), leaf(1, k=3)), const(1, 4, 6)), "c.tucker"),
    (FuseCpt(), c.Sum(wide(), contextual(1, 2, 3)), "c.cpt"),
    (
        FuseCp(),
        c.Hadamard((c.Sum(leaf(0), const(1, 4, 2)), c.Sum(leaf(1, k=3), const(1, 4, 3)))),
        "c.cp",
    ),
]


@pytest.mark.parametrize(("fusion", "root", "name"), FUSIONS)
def test_fusions(fusion: Pass, root: Op, name: str) -> None:
    before = module(root, 3, 3 if name != "c.cpt" else 2)
    after, notes = applied(fusion, before)
    assert ops(before)[-1] == root.name
    assert ops(after) == ["c.categorical", "c.categorical", name]
    assert notes[0].startswith("did")
    prove(before, after)


def test_fusions_decline_a_layer_with_two_readers() -> None:
    h = wide()
    pair = c.Mix((c.Sum(h, const(1, 3, 3)), h), const(1, 3, 2))
    after, notes = applied(FuseCpt(), module(pair, 3, 2))
    assert after.roots == (pair,)
    assert "2 readers" in notes[0]
    k = c.Kronecker(leaf(0), leaf(1, v=2))
    twice = c.Mix((c.Sum(k, const(1, 4, 4)), k), const(1, 4, 2))
    assert applied(FuseTucker(), module(twice, 3, 2))[0].roots == (twice,)


def test_fuse_cp_declines_factors_that_are_no_sums() -> None:
    root = c.Hadamard((c.Sum(leaf(0), const(1, 2, 2)), leaf(1)))
    after, notes = applied(FuseCp(), module(root, 3, 3))
    assert after.roots == (root,)
    assert "1 of 2 factors are not sums" in notes[0]
