"""Models on disk: one graph file per query, all over one weight file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

INLINE = 1024  # bytes; smaller tensors stay in the graph file
PAGE, LINE = 4096, 64  # alignment of large tensors (memory-mapped) and of the others


def save_models(models: Mapping[str, ir.Model], folder: Path, weights: str = "weights.bin") -> None:
    """Write `folder/NAME.onnx` for every model over `folder/weights`, equal tensors once."""
    placed: dict[tuple[str, tuple[int, ...], bytes], tuple[int, int]] = {}
    with (folder / weights).open("wb") as out:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                array = np.ascontiguousarray(tensor.numpy())
                if array.nbytes < INLINE:
                    continue
                data = array.tobytes()
                key = (str(array.dtype), tuple(array.shape), data)
                if key not in placed:
                    step = PAGE if len(data) >= 1 << 20 else LINE
                    out.write(b"\0" * (-out.tell() % step))
                    placed[key] = (out.tell(), len(data))
                    out.write(data)
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
