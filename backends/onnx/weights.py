"""Models on disk: one graph file per query, all over one weight file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import BOUND, DTYPE, INLINE, Stored
from pcc.backends.weightfile import Spot, WeightFile
from pcc.errors import PccError


def save_models(
    models: Mapping[str, ir.Model],
    folder: Path,
    weights: str = "weights.bin",
    say: Callable[[str], None] | None = None,
) -> WeightFile:
    """Write `folder/NAME.onnx` for every model over `folder/weights`, equal tensors once.

    Trained arrays are streamed, one in memory at a time. Returns the finished weight file, which
    knows where each array lies, and its hash. Weights that are to be inputs lose their numbers, and
    `model.meta[BOUND]` lists them. Errors: B203 (the disk is too full).
    """
    require_room(folder, models)
    with WeightFile(folder / weights, say) as file:
        for model in models.values():
            for value in list(model.graph.initializers.values()):
                if (spot := _placed(file, value)) is None:
                    continue
                tensor = value.const_value
                assert tensor is not None
                if value.meta.get(BOUND):  # the caller binds it: an input without a default
                    del model.graph.initializers[value.name or ""]
                    value.const_value = None
                    model.meta.setdefault(BOUND, []).append(_bound(value, spot))
                    continue
                value.const_value = ir.ExternalTensor(
                    weights, spot.offset, spot.length, tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=folder,
                )  # fmt: skip
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return file


def _bound(value: ir.Value, spot: Spot) -> dict[str, Any]:
    """Return what the manifest says of a weight that is an input."""
    assert value.shape is not None
    dtype = next(k for k, kind in DTYPE.items() if kind == value.dtype)
    return {"name": value.name, "dtype": dtype, "shape": [int(d) for d in value.shape.numpy()],
            "offset": spot.offset}  # fmt: skip


def _placed(file: WeightFile, value: ir.Value) -> Spot | None:
    """Write an initializer to the file; None if it stays in the graph."""
    tensor = value.const_value
    assert tensor is not None
    if tensor.nbytes < INLINE:
        return None
    if isinstance(tensor, Stored) and not (len(tensor.shape) <= 1 and tensor.array.dtype == "i64"):
        return file.place(tensor.array, tensor.turned)
    array = np.ascontiguousarray(tensor.numpy())
    return None if _sizes(value, array) else file.put(array)


def require_room(folder: Path, models: Mapping[str, ir.Model]) -> None:
    """Refuse to begin what the disk cannot hold. Errors: B203."""
    listed = [v.const_value for m in models.values() for v in m.graph.initializers.values()]
    stored = {(x.array, x.turned): x.array.nbytes for x in listed if isinstance(x, Stored)}
    need, free = sum(stored.values()), shutil.disk_usage(folder).free
    if need > free:
        what = f"the weights take {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise PccError("B203", what, at=str(folder), hint="free some, or write elsewhere")


def _sizes(value: ir.Value, array: np.ndarray[Any, Any]) -> bool:
    """Whether shape inference may read the numbers: it cannot read another file.

    Sizes of a `Split`, ends of a `Slice`, dimensions of a `Reshape`: vectors of integers, as many
    as a layer has folds. What is only gathered, or gathered by, has no such reader.
    """
    vector = array.ndim <= 1 and array.dtype.kind == "i"
    return vector and any(use.node.op_type != "Gather" for use in value.uses())
