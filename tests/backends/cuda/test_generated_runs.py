"""Products that load eight neighbours at once: where they may; drafts of true size."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from generated import Kernels

from pcc.backends.cuda.codegen import Generated
from pcc.backends.cuda.partition import partition
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.models.proposal import sampled
from pcc.passes.manager import Manager
from pcc.passes.pipelines import storage_pipeline
from pcc.shapes import Synthetic
from pcc.tensor import ops as t

RNG = np.random.default_rng(2)
F, K, V = 3, 4, 5
X = t.Input("x", "f32", "b", (512,))
ROWS = t.Input("rows", "f32", "b", (7, 512))
SEL = t.Input("sel", "i64", "b", (F,))
ONE = t.Input("one", "i64", "b", (1,))


def const(*shape: int, dtype: str = "bf16") -> Op:
    return t.Const(Array.of(RNG.normal(size=shape), dtype))


def experts(width: int, dtype: str = "bf16", x: Op = X) -> Op:
    """Return the products of x with chosen rows of a table, as a latent-first draft has them."""
    chosen = t.SelectRow(const(F, K, V * width, dtype=dtype), SEL)
    return t.Contract(x, t.Reshape(chosen, (F, V, width)), "d,fvd->fv")


def row(width: int = 512) -> Op:
    """Return a row that is chosen among others, as a round's features are."""
    picked = t.SelectRow(t.Reshape(ROWS, (1, 7, width)), ONE)
    return t.Reshape(picked, (width,))


ODD = t.Input("odd", "f32", "b", (260,))  # not a multiple of eight
CASES = [
    ("halves", experts(512), True),
    ("f16", experts(512, "f16"), True),
    ("floats", experts(512, "f32"), True),
    ("of a row", experts(512, x=row()), True),
    ("a table", t.Contract(X, const(9, 512, dtype="f32"), "d,nd->n"), True),
    ("taken", t.Contract(X, t.Take(const(9, 512, dtype="f32"), 0, (8, 0, 3)), "d,nd->n"), True),
    ("odd", experts(260, x=ODD), False),
    ("other way", t.Contract(X, t.Transpose(const(512, 9, dtype="f32"), (1, 0)), "d,nd->n"), False),
    ("sum", t.Contract(t.Add(X, X), const(9, 512, dtype="f32"), "d,nd->n"), False),
    ("part", t.Contract(t.Take(X, 0, tuple(range(1, 257))), const(9, 256), "d,nd->n"), False),
    ("short", t.Contract(t.Take(X, 0, tuple(range(128))), const(99, 128), "d,nd->n"), False),
]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_products_of_eights() -> None:
    modules = [Module(f"m{i}", (), (("y", y),)) for i, (_, y, _) in enumerate(CASES)]
    kernels = Kernels(modules, 3, quick=True)
    feed = {
        "x": RNG.normal(size=(3, 512)), "rows": RNG.normal(size=(3, 7, 512)),
        "odd": RNG.normal(size=(3, 260)), "sel": RNG.integers(0, K, (3, F)),
        "one": RNG.integers(0, 7, (3, 1)),
    }  # fmt: skip
    feed = {k: v if k in ("sel", "one") else v.astype(np.float32) for k, v in feed.items()}
    for i, (what, _, eights) in enumerate(CASES):
        assert ("eight_" in kernels.made[f"k{i}"].source) is eights, what
        want, got = kernels.meaning(i, feed), kernels(i, feed)
        np.testing.assert_allclose(got["y"], want["y"], atol=2e-4, err_msg=what)


# ---------------------------------------------------------------- drafts


DRAFTS = {  # phases, barriers of the generated kernel; at most
    "cp": (6, 2),
    "hmm": (6, 3),
    "btree": (14, 8),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_latent_first_draft_of_true_size(kind: str) -> None:
    """One product and one kernel: no product, copy or table of a state stands by itself."""
    circuit, manager = Synthetic("evabyte-6.5b").head(f"{kind},n=16,r=32"), Manager(validate=False)
    (root,) = manager.run(circuit.module(), storage_pipeline("bf16")).roots
    circuit = type(circuit)(root, circuit.cards, circuit.name)
    module = sampled(circuit, manager, "latent-first", truncation=False, maps=True).module
    builder = partition(module, tuple(n for n in module.nodes() if isinstance(n, t.Input)), 1)
    product, generated = (x.kernel for x in builder.launches)
    assert "pcc::narrow<" in product.source
    assert isinstance(generated, Generated)
    phases, barriers = DRAFTS[kind]
    assert generated.phases <= phases
    assert generated.barriers <= barriers
    assert "eight_bf16" in generated.source
    steps = [n for n in module.nodes() if isinstance(n, t.Trajectory)]
    assert [tensor(n).shape for n in steps] == ([(15,)] if kind == "hmm" else [])
