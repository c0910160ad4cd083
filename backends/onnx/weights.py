"""Models on disk: one graph file per query, all over one weight file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import INLINE

PAGE, LINE = 4096, 64  # alignment of large tensors (memory-mapped) and of the others


def save_models(
    models: Mapping[str, ir.Model], folder: Path, weights: str = "weights.bin"
) -> dict[object, tuple[int, int]]:
    """Write `folder/NAME.onnx` for every model over `folder/weights`, equal tensors once.

    Returns where each array lies in the weight file, (offset, bytes) by `key_of`.
    """
    placed: dict[object, tuple[int, int]] = {}
    seen: dict[int, tuple[object, object]] = {}  # arrays that graphs share are hashed once
    with (folder / weights).open("wb") as out:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                array = np.ascontiguousarray(tensor.numpy())
                if array.nbytes < INLINE or _sizes(value, array):
                    continue
                if id(array) not in seen:
                    seen[id(array)] = (array, key_of(array))  # held, so that its id stays its own
                key = seen[id(array)][1]
                if key not in placed:
                    step = PAGE if array.nbytes >= 1 << 20 else LINE
                    out.write(b"\0" * (-out.tell() % step))
                    placed[key] = (out.tell(), array.nbytes)
                    out.write(array.data)
                offset, length = placed[key]
                value.const_value = ir.ExternalTensor(
                    weights,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(array.shape),
                    name=value.name or "",
                    base_dir=folder,
                )
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return placed


def _sizes(value: ir.Value, array: np.ndarray[Any, Any]) -> bool:
    """Whether shape inference may read the numbers: it cannot read another file.

    Sizes of a `Split`, ends of a `Slice`, dimensions of a `Reshape`: vectors of integers, as many
    as a layer has folds. What is only gathered, or gathered by, has no such reader.
    """
    vector = array.ndim <= 1 and array.dtype.kind == "i"
    return vector and any(use.node.op_type != "Gather" for use in value.uses())


def key_of(array: np.ndarray[Any, Any]) -> object:
    """Return a digest of the bytes: one place serves arrays that differ in shape only."""
    return array.nbytes, hashlib.sha256(array.data).digest()
