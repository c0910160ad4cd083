"""A head's projections in half precision: which products, by how much, and what stays exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from features import Features

import pcc
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.ir.array import Array
from pcc.ir.core import tensor
from pcc.ir.module import Module
from pcc.ir.types import HALVES
from pcc.models.proposal import sampled
from pcc.passes.half_projections import HalfProjections
from pcc.passes.manager import Manager, Notes
from pcc.tensor import nn
from pcc.tensor import ops as t

D, V = 24, 11
FEATURES = Features(D, V)
CONTEXT, RNG = FEATURES.context, FEATURES.rng
const, one = FEATURES.const, FEATURES.one


def weights(m: Module) -> list[str]:
    return [tensor(n.b).dtype for n in m.nodes() if isinstance(n, t.Contract)]


def halved(m: Module, dtype: str = "f16") -> Module:
    return Manager().run(m, (HalfProjections(dtype),))


@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_features_are_rounded_through_layers(dtype: str) -> None:
    hidden = nn.Silu(t.Add(t.Contract(CONTEXT, const(5, D), "d,kd->k"), const(5)))
    scores = t.Contract(hidden, const(2, 3, V, 5), "d,abcd->abc")
    after = halved(one(t.Softmax(scores)), dtype)
    assert weights(after) == [dtype, dtype]
    assert after.stored == dtype
    kept = [n for n in after.nodes() if isinstance(n, t.Const) and len(tensor(n).shape) == 1]
    assert [tensor(n).dtype for n in kept] == ["f32"]  # the bias


def test_declined_for_probabilities_and_values() -> None:
    table = const(V, V)
    law = t.Softmax(t.Contract(CONTEXT, const(V, D), "d,kd->k"))
    x = t.Input("x", "f32", "b", (V,))
    after = halved(one(t.Add(t.Contract(law, table, "v,vw->w"), t.Contract(x, table, "v,vw->w"))))
    assert sorted(weights(after)) == ["f16", "f32", "f32"]


def test_elementwise_products_are_no_projections() -> None:
    m = one(t.Contract(CONTEXT, const(D), "d,d->d"))
    assert halved(m) is m or halved(m) == m


def test_a_wrong_rounding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    w = const(V, D)
    wrong = Array.of(np.roll(w.value.value, 1, axis=0), "f16")
    monkeypatch.setattr(Array, "cast", lambda self, dtype: wrong)
    with pytest.raises(PccError, match="E303"):
        halved(one(t.Contract(CONTEXT, w, "d,kd->k")))


def test_large_matrices_are_judged_by_some_rows() -> None:
    w = const(4, 200, V, D)
    m = one(t.Contract(CONTEXT, w, "d,abcd->abc"))
    (probe,) = HalfProjections().sites(m).roots
    assert tensor(probe).shape == (256,)
    assert weights(HalfProjections().run(m, Notes())) == ["f16"]


def head(kind: str) -> Circuit:
    make = getattr(templates, kind)
    return make(4, V, context=D, seed=2) if kind == "ff" else make(4, 3, V, context=D, seed=2)


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_latent_first_drafts_select_half_rows(kind: str) -> None:
    circuit = head(kind)
    (root,) = halved(circuit.module()).roots
    draft = sampled(replace(circuit, root=root), Manager(), "latent-first", truncation=False)
    tables = [n for n in draft.module.nodes()
              if isinstance(n, t.Const) and tensor(n).dtype == "f16"]  # fmt: skip
    assert tables
    selected = [tensor(n.w).dtype for n in draft.module.nodes()
                if isinstance(n, t.SelectRow) and isinstance(n.w, t.Const)]  # fmt: skip
    assert selected
    assert "f32" not in selected  # though the choice depends on other products
    assert not any(
        isinstance(n, t.Contract) and isinstance(n.b, t.Const) and tensor(n.b).dtype == "f32"
        and tensor(n.b).shape[-1] == D
        for n in draft.module.nodes()
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_bundles_in_fp16_verify_and_say_so(kind: str) -> None:
    made = pcc.compile(head(kind), precision="fp16", out=None)
    assert made.manifest["precision"] == {"default": "fp32", "head": "fp16"}
    (record,) = [p for p in made.manifest["passes"] if p["name"] == "half-projections"]
    assert 1e-5 < record["error"] < 2e-2
    report = pcc.verify(made.path)
    assert report.ok, str(report)
