"""Passes of small verifiers as graphs for TensorRT, and bundles of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

import pcc
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.conformance import models
from pcc.conformance.verifiers import KINDS
from pcc.models.load import load_model
from pcc.models.step import Steps

ROWS = 256
PROMPT = b"\x07\x50ab"


def session(model: ir.Model) -> ort.InferenceSession:
    """Open a graph; ONNX Runtime does not know the attribute that TensorRT wants."""
    for node in model.graph:
        node.attributes.pop("TRT_decomposable", None)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, ["CPUExecutionProvider"])


def steps(kind: str, folder: Path, **size: Any) -> Steps:
    source, model = KINDS[kind](folder, **size)
    loaded = load_model(model, max_rows=ROWS, precision="fp32")
    if source is None or not hasattr(source, "cards"):
        source = models.head("ff", 4, 1, vocab=loaded.vocab)
    return Steps(loaded, source, ROWS)


def random_feed(model: ir.Model, r: TensorRt, seed: int) -> dict[str, Any]:
    """Return inputs of a pass: ids, a length of 5, and whatever in the states."""
    rng, feed = np.random.default_rng(seed), dict[str, Any]()
    for v in model.graph.inputs:
        shape = [int(d) for d in v.shape or ()]  # type: ignore[arg-type]
        ids = v.name == "input_ids" or "recent" in str(v.name)
        x: Any = rng.integers(0, 200, shape) if ids else rng.normal(size=shape)
        if v.name == "length":
            x = np.full(shape, 5)
        if v.name in ("input_ids", "length") and not r.wide:
            x[..., 1] = 0  # the high word
        assert v.dtype is not None
        feed[str(v.name)] = x.astype(v.dtype.numpy())
    return feed


def compiled(kind: str, r: TensorRt, folder: Path, chunk: int = 8, **engine: Any) -> Any:
    source, model = KINDS[kind](folder)
    return pcc.compile(
        source, verifier=model, out=folder / "m.pcc", target=r.target, max_seq=128, chunk=chunk,
        queries=["draft"], validate=False, engine={"profiles": True, **engine},
    )  # fmt: skip


def check_texts(kind: str, made: Any, folder: Path, count: int = 50) -> None:
    """Need that a bundle for TensorRT writes what one for the host does, greedy and sampled."""
    source, model = KINDS[kind](folder / "again")
    how: dict[str, Any] = {"max_seq": 128, "chunk": 8, "queries": ["draft"], "truncation": False}
    pcc.compile(source, verifier=model, out=folder / "host.pcc", **how)
    host, engine = (
        pcc.load(folder / "host.pcc", threads=1),
        pcc.load(made.path, provider="tensorrt"),
    )
    for options in ({"greedy": True}, {"seed": 4, "temperature": 0.8}):
        want = host.session(**options).generate(PROMPT, count)
        got = engine.session(**options).generate(PROMPT, count)
        assert got.bytes == want.bytes
