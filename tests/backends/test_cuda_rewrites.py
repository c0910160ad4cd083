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
