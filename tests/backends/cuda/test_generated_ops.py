"""Every tensor op in generated kernels, run on a CPU, against its float64 meaning."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from generated import Kernels
from graphs import agree

from pcc.backends.cuda.codegen.tables import emitted
from pcc.conformance.ops import Numbered, joined, numbered
from pcc.ir.core import OPS
from pcc.tensor import ops as t

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
GROUP = 30  # cases of one kernel
MARGIN = 4e-6  # of f32 sums in another order than the evaluator's


def cases() -> list[Numbered]:
    """All cases, operands as constants and as rows of the batch; "c" is no other form here."""
    out = []
    for c in numbered(("f16", "bf16")):
        forms = c.case.forms or ("kb" if len(c.case.operands) < 3 else "b")
        out.append(Numbered(dataclasses.replace(c.case, forms=forms), c.prefix))
    return out


def test_every_tensor_op_is_emitted() -> None:
    cases()  # loads every module of ops
    assert emitted() == {op for k, op in OPS.items() if k.startswith("t.")} - {t.Input, t.Const}


@pytest.fixture(scope="module")
def groups() -> list[list[Numbered]]:
    found = cases()
    return [found[i : i + GROUP] for i in range(0, len(found), GROUP)]


@pytest.mark.parametrize("rows", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_kernels_mean_what_the_ops_say(groups: list[list[Numbered]], rows: int) -> None:
    from pcc.conformance.cases import feeds

    modules = [joined(g) for g in groups]
    kernels = Kernels(modules, rows, blocks=1, threads=64, quick=True)
    seen = 0
    for i, group in enumerate(groups):
        feed = {}
        for c in group:
            feed |= feeds(c.case, c.module()[1], rows, 1, c.prefix)
        want = kernels.meaning(i, feed)
        for seed in (0, 1):
            got = kernels(i, feed, seed)
            for name, value in got.items():
                c = next(c for c in group if name.startswith(c.prefix))
                tolerance = max(c.case.tolerance, MARGIN)
                agree(want[name], value, tolerance=tolerance, what=f"{c.title} {name}")
                seen += 1
    assert seen > 1000 or rows == 1


def test_edge_inputs_reach_the_kernels(groups: list[list[Numbered]]) -> None:
    from pcc.conformance.cases import feeds

    found = [feeds(c.case, c.module()[1], 3, 1, c.prefix) for g in groups for c in g]
    floats = [a for f in found for a in f.values() if a.dtype == np.float32]
    assert any(np.isneginf(a).all(axis=-1).any() for a in floats if a.ndim > 1)
