"""A head's projections as 8-bit integers: which products, by how much, and what stays exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from features import Features

import pcc
from pcc.backends.onnx import contractions
from pcc.backends.onnx.graph import Graph
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.ir.array import Array
from pcc.ir.core import tensor
from pcc.ir.module import Module
from pcc.models.proposal import sampled
from pcc.passes import integer_projections as passes
from pcc.passes.integer_projections import IntegerProjections
from pcc.passes.manager import Manager, Notes
from pcc.passes.pipelines import storage_pipeline
from pcc.tensor import nn
from pcc.tensor import ops as t

D, V = 48, 40
FEATURES = Features(D, V)
CONTEXT, RNG = FEATURES.context, FEATURES.rng
const, one = FEATURES.const, FEATURES.one


def stored(m: Module) -> list[str]:
    products = [n for n in m.nodes() if isinstance(n, t.Contract | t.ScaledContract)]
    return [tensor(n.b).dtype for n in products]


def made(m: Module, dtype: str = "f16") -> Module:
    return Manager().run(m, (IntegerProjections(dtype),))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_products_of_features_become_integers_through_layers(dtype: str) -> None:
    hidden = nn.Silu(t.Add(t.Contract(CONTEXT, const(100, D), "d,kd->k"), const(100)))
    scores = t.Contract(hidden, const(2, 3, V, 100), "d,abcd->abc")
    after = made(one(t.Softmax(scores)), dtype)
    assert stored(after) == ["i8", "i8"]
    assert {n.dtype for n in after.nodes() if isinstance(n, t.ScaledContract)} == {dtype}
    scales = [n.scale for n in after.nodes() if isinstance(n, t.ScaledContract)]
    assert [str(s.type) for s in scales] == ["f32[100]", "f32[2,3,40]"]
    assert after.stored == dtype


def test_declined_for_probabilities_and_other_forms() -> None:
    table = const(V, V)
    law = t.Softmax(t.Contract(CONTEXT, const(V, D), "d,kd->k"))
    lost = t.Contract(t.Reshape(CONTEXT, (6, 8)), const(6, 8, 100), "ab,abk->k")
    m = Module("m", (V, V), (("y", t.Contract(law, table, "v,vw->w")), ("z", lost)))
    assert stored(made(m)) == ["i8", "f32", "f32"]
    mixed = Manager().run(m, storage_pipeline("f16", int8=True))
    assert stored(mixed) == ["i8", "f32", "f16"]  # what is left becomes half


def test_columns_and_rows_are_outputs() -> None:
    x = t.Input("context", "f32", "b", (3, D))
    m = Module("m", (V,), (("y", t.Contract(x, const(D, 100), "nd,dk->nk")),
                           ("z", t.Contract(x, const(100, D), "nd,kd->nk"))))  # fmt: skip
    after = made(m)
    assert stored(after) == ["i8", "i8"]
    assert {str(n.scale.type) for n in after.nodes() if isinstance(n, t.ScaledContract)} == {
        "f32[100]"
    }


@pytest.mark.parametrize("fault", ["rolled scales", "rolled rows", "no scales"])
def test_wrong_integers_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = (RNG.normal(size=(V, 200)) * np.geomspace(0.05, 2, V)[:, None] / 14).astype(np.float32)
    right = passes.by_rows

    def wrong(array: Array) -> tuple[Array, Array]:
        q, s = right(array)
        if fault == "rolled rows":
            return Array.of(np.roll(q.value, 1, axis=0), "i8"), s
        return q, Array.of(np.roll(s.value, 1) if fault == "rolled scales" else np.ones(V))

    monkeypatch.setattr(passes, "by_rows", wrong)
    x = t.Input("context", "f32", "c", (200,))
    with pytest.raises(PccError, match="E303"):
        made(one(t.Contract(x, t.Const(Array.of(w)), "d,kd->k")))


def test_large_matrices_are_judged_by_some_rows() -> None:
    m = one(t.Contract(CONTEXT, const(4, 200, V, D), "d,abcd->abc"))
    (probe,) = IntegerProjections().sites(m).roots
    assert tensor(probe).shape == (256,)
    assert stored(IntegerProjections().run(m, Notes())) == ["i8"]


def head(kind: str) -> Circuit:
    make = getattr(templates, kind)
    return make(4, V, context=D, seed=2) if kind == "ff" else make(4, 3, V, context=D, seed=2)


@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_later_passes_keep_projections_whole(kind: str) -> None:
    """Integers are stacked along folds as the weights would be: no product more than without."""
    circuit = head(kind)

    def draft(*pipeline: IntegerProjections) -> Module:
        (root,) = Manager().run(circuit.module(), pipeline).roots
        return sampled(replace(circuit, root=root), Manager(), "full", truncation=False).module

    plain, integers = draft(), draft(IntegerProjections("f16"))
    features = [n for n in plain.nodes() if isinstance(n, t.Contract) and n.a is CONTEXT]
    scaled = [n for n in integers.nodes() if isinstance(n, t.ScaledContract)]
    assert len(scaled) == len(features)
    assert all(isinstance(x, t.Const) for n in scaled for x in (n.b, n.scale))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_bundles_with_integers_verify_and_say_so(kind: str, precision: str) -> None:
    artifact = pcc.compile(head(kind), precision=precision, int8="head", out=None)
    assert artifact.manifest["precision"] == {"default": "fp32", "head": f"{precision}+int8"}
    (record,) = [p for p in artifact.manifest["passes"] if p["name"] == "integer-projections"]
    assert 1e-2 < record["error"] < 2
    report = pcc.verify(artifact.path)
    assert report.ok, str(report)


def test_a_backend_that_scales_wrongly_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contractions._scales

    def wrong(g: Graph, n: t.ScaledContract) -> ir.Value:
        value = right(g, n)
        assert value.const_value is not None
        return g.const(np.roll(value.const_value.numpy(), 1))

    monkeypatch.setattr(contractions, "_scales", wrong)
    path = pcc.compile(head("cp"), int8="head", queries=["loglik"], out=None).path
    assert not pcc.verify(path).ok


REFUSED = [
    ({"int8": "both"}, "int8='both'"),
    ({"int8": "verifier"}, "no verifier"),
    ({"int8": "head", "target": "tensorrt-rtx"}, "tensorrt-rtx"),
    ({"int8": "head", "target": "tensorrt"}, "tensorrt"),
    ({"int8": "head", "target": "cuda", "precision": "fp32"}, "cuda"),
    ({"int8": "head", "proposal": "latent-first"}, "latent-first"),
    ({"int8": "all", "draft_mode": "latent-first"}, "latent-first"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_is_not_supported_is_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(PccError, match=f"E141.*{says}"):
        pcc.compile(head("ff"), out=None, **options)


def test_a_head_without_projections_is_refused() -> None:
    circuit = templates.cp(4, 3, V, seed=2)
    with pytest.raises(PccError, match=r"E141.*no matrix"):
        pcc.compile(circuit, out=None, int8="head")
