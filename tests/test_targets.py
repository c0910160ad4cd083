"""Targets as data: names, precisions, opsets, batches; what is refused and how."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import pcc
from pcc.emission import WRITERS
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.targets import HALF_OF, PRECISIONS, TARGETS, target_of


@pytest.mark.parametrize("name", TARGETS)
def test_descriptions_are_whole(name: str) -> None:
    t = TARGETS[name]
    assert t.name == name
    assert t.format in WRITERS
    assert importlib.util.find_spec(WRITERS[t.format]), "its writer exists"
    assert "fp32" in t.precisions
    assert set(t.precisions) <= set(PRECISIONS) == set(HALF_OF)
    assert t.attention in ("parts", "mask", "nonpad")
    assert t.kv in ("scatter", "scatter_nd", "scatter_io")
    assert t.weights in ("file", "inputs")
    if t.format != "cuda":  # fused operators and TensorScatter are of opset 24
        assert t.opset == 24 or (t.attention == "parts" and t.kv == "scatter_nd")
    assert t.static or t.branches


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"name": "abacus"}, "E141", "tensorrt-rtx"),
        ({"name": None}, "E141", "onnx"),
        ({"name": "tensorrt", "precision": "bf16"}, "E141", "fp16"),
        ({"name": "onnx", "precision": "bf16"}, "E141", "fp16"),
        ({"name": "onnx-cuda", "precision": "int8"}, "E141", "bf16"),
        ({"name": "onnx-cuda", "opset": 17}, "E410", "24"),
        ({"name": "cuda", "opset": 24}, "E410", "no ONNX graphs"),
    ],
)
def test_refusals(given: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(PccError) as e:
        target_of(**given)
    assert e.value.code == code
    assert said in str(e.value)


def test_older_opsets_write_caches_otherwise() -> None:
    old = target_of("onnx", opset=17)
    assert (old.opset, old.kv) == (17, "scatter_nd")
    assert target_of("onnx") is TARGETS["onnx"]


@pytest.mark.parametrize(
    ("how", "code"),
    [({"batch": 2}, "E141"), ({"batch": 0}, "E148"), ({"batch": True}, "E148"),
     ({"target": "onnx-cuda", "batch": 1 << 20}, "E141"), ({"gpu": 90}, "E148"),
     ({"truncation": 1}, "E148")],
)  # fmt: skip
def test_compile_refuses(how: dict[str, Any], code: str) -> None:
    with pytest.raises(PccError, match=code):
        pcc.compile(templates.ff(2, 3), out=None, **how)


def test_a_static_bundle_says_its_batch_and_target() -> None:
    made = pcc.compile(templates.cp(3, 2, 4, context=5), out=None, target="onnx-cuda", batch=3)
    m = made.manifest
    assert m["target"] == "onnx-cuda"
    assert m["variants"] == [
        {"provider": "cuda", "format": "onnx", "gpu": None, "onnxruntime": ">=1.28"}
    ]
    assert {spec["batch"] for spec in m["queries"].values()} == {3}
    assert "one_row" not in m["queries"]["draft"]
