"""The published numbers: heads with their weights, as circuits and as compiled queries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from graphs import Compiled

from pcc.circuit.circuit import Circuit
from pcc.driver import query_module
from pcc.frontends.mtpc import from_head
from pcc.frontends.mtpc_checkpoint import from_arrays
from pcc.ir.core import Op
from pcc.ir.places import fresh
from pcc.passes.manager import Manager
from pcc.passes.pipelines import circuit_pipeline, tensor_pipeline

Values = np.ndarray[Any, Any]
REFERENCE, RUNTIME = 1e-9, 5e-5  # what float64 and fp32 values may differ by, absolutely
HEADS = (
    "btree-n16-r4-v16", "btree-n8-r32-v16", "btree-n8-r4-v320", "cp-n16-r32-v16", "cp-n8-r4-v320",
    "ff-n8-r1-v16", "hmm-n16-r32-v16", "hmm-n4-r4-v320", "hmm-n8-r4-v16", "x-btree-n5-r4-v16",
    "x-random-btree-n8-r4-v16",
)  # fmt: skip
TINY = ("ff-n3-r1-v4", "cp-n3-r2-v4", "hmm-n3-r2-v4", "btree-n3-r2-v4", "btree-n4-r2-v4")


def weights_of(arrays: dict[str, Values], prefix: str = "") -> dict[str, Values]:
    """Return the weights by checkpoint key: int8 times a scale, exact in float32."""
    out: dict[str, Values] = {}
    for key, value in arrays.items():
        if key.startswith(prefix + "mt_head") and not key.endswith("@scale"):
            scale = arrays[key + "@scale"]
            out[key.removeprefix(prefix)] = value.astype(np.float32) * np.float32(scale)
    return out


@dataclass(frozen=True)
class Head:
    """A published head: the circuit and what its implementation computed."""

    name: str
    data: dict[str, Values]
    weights: dict[str, Values]
    kind: str
    n: int

    @cached_property
    def circuit(self) -> Circuit:
        """The head as a circuit of the input `context`."""
        scope = [int(i) for i in np.ravel(self.data["scope_idx"])]
        return from_head(from_arrays(self.weights, self.kind, self.n, scope))

    def compiled(self, query: str, *, opset: int = 24) -> Compiled:
        """The query as an ONNX session, beside its tensor module."""
        return compile_query(self.circuit, query, opset=opset)


def optimised(circuit: Circuit, *, maximise: bool = False) -> Op:
    """The circuit after the default passes."""
    manager = Manager(validate=False)  # the passes have their own tests
    return manager.run(circuit.module(), circuit_pipeline(maximise=maximise)).roots[0]


def compile_query(circuit: Circuit, query: str, *, opset: int = 24) -> Compiled:
    """Compile one query with the default pipelines."""
    with fresh():
        root = optimised(circuit, maximise=query == "mode")
        module, _ = query_module(circuit, root, query)
        module = Manager(validate=False).run(module, tensor_pipeline())
        return Compiled(module, opset=opset)


def load_head(path: Path) -> Head:
    """Read one file of `oracle/head`."""
    with np.load(path, allow_pickle=False) as f:
        data = {k: f[k] for k in f.files}
    meta = json.loads(str(data["meta_json"]))
    return Head(meta["name"], data, weights_of(data), meta["kind"], meta["n"])


def load_tiny(path: Path, name: str) -> Head:
    """Read one configuration of `oracle/sampling_tiny.npz`."""
    with np.load(path, allow_pickle=False) as f:
        data = {k.split("/", 1)[1]: f[k] for k in f.files if k.startswith(name + "/")}
    kind, n = name.split("-")[:2]
    return Head(name, data, weights_of(data), kind, int(n[1:]))


def apart(want: Values, got: Values) -> float:
    """The largest difference of two arrays; equal infinities are equal, a NaN is infinite."""
    want, got = np.broadcast_arrays(np.asarray(want, float), np.asarray(got, float))
    if np.isnan(want).any() or np.isnan(got).any():
        return float("inf")
    with np.errstate(invalid="ignore"):
        return float(np.where(want == got, 0.0, np.abs(want - got)).max(initial=0.0))
