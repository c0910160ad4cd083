"""Identities that the CUDA engine applies before anything is matched, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pcc.backends.cuda.rewrites import PIECE, WIDE, rewritten
from pcc.interp.run import run
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.tensor import nn
from pcc.tensor import ops as t


@pytest.mark.parametrize("width", [96, WIDE, 3 * WIDE + PIECE, WIDE + 1])
def test_the_norm_of_a_selected_row(width: int) -> None:
    rng = np.random.default_rng(width)
    x = t.Input("x", "f32", "b", (5, width))
    sel = t.Input("sel", "i64", "b", (1,))
    weight = t.Const(Array.of(rng.normal(size=width)))
    normed = nn.RmsNorm(x, weight, 1e-5)
    row = t.SelectRow(t.Reshape(normed, (1, 5, width)), sel)
    module = Module("m", (), (("y", row),))
    new = rewritten(module)
    found = [n for n in new.nodes() if isinstance(n, nn.RmsNorm)]
    assert not any(tensor_rows(n) == 5 for n in found)  # the other rows are not computed
    assert bool(found) is (width < WIDE or width % PIECE != 0)
    feed = {"x": 30 * rng.normal(size=(2, 5, width)), "sel": np.array([[4], [0]])}
    want, got = (run(m.roots, feed, Real())[0] for m in (module, new))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def tensor_rows(n: nn.RmsNorm) -> int:
    return int(np.prod(n.type.shape[:-1]))  # type: ignore[attr-defined]


def test_projections_one_above_another_are_one() -> None:
    rng = np.random.default_rng(1)
    e, other = t.Input("e", "f32", "b", (8,)), t.Input("other", "f32", "b", (8,))

    def product(x: t.Input, folds: int) -> t.Contract:
        w = t.Const(Array.of(rng.normal(size=(folds, 3, 2, 8)), "f16"))
        return t.Contract(x, w, "d,abcd->abc")

    parts = (product(e, 1), product(e, 2), product(e, 1))
    module = Module("m", (), (("y", t.Concat(parts, 0)),))
    new = rewritten(module)
    (found,) = [n for n in new.nodes() if isinstance(n, t.Contract)]
    assert new.roots[0] is found
    feed = {"e": rng.normal(size=(5, 8)), "other": rng.normal(size=(5, 8))}
    want, got = (run(m.roots, feed, Real())[0] for m in (module, new))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    mixed = t.Concat((product(e, 1), product(other, 1)), 0)  # of two vectors
    wide = t.Concat((product(e, 1), product(e, 1)), 1)  # beside each other
    for whole in (mixed, wide):
        kept = rewritten(Module("m", (), (("y", whole),)))
        assert any(isinstance(n, t.Concat) for n in kept.nodes())
    both = t.Concat(parts[:1] * 2, 0)  # one product, twice
    assert any(n is parts[0] for n in rewritten(Module("m", (), (("y", both),))).nodes())
