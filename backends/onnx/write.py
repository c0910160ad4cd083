"""The graphs of a bundle as ONNX files over one weight file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from pcc.backends.onnx.graph import BOUND
from pcc.backends.onnx.lower import lower
from pcc.backends.onnx.weights import save_models
from pcc.bundle import RUNTIME_OF_OPSET
from pcc.emission import Emission, Order, Say, Written


def write_graphs(order: Order, folder: Path, say: Say) -> Written:
    """Write `graphs/QUERY.onnx` for every query, and `graphs/weights.bin`."""
    target = order.target
    models: dict[str, ir.Model] = {}
    specs: dict[str, dict[str, Any]] = {}
    for q, e in order.emissions.items():
        say(f"graph '{q}'")
        models[q] = _model(order, q, e)
        specs[q] = {"graph": f"graphs/{q}.onnx", "nodes": len(models[q].graph)}
        if target.one_row:
            one = _model(order, q, e, streamed=True)
            if len(one.graph.inputs) > len(e.inputs):  # large weights meet a single vector
                models[f"{q}.one"], specs[q]["one_row"] = one, f"graphs/{q}.one.onnx"
    graphs = folder / "graphs"
    graphs.mkdir()
    file = save_models(models, graphs, say=say)
    for q in specs:
        if bound := models[q].meta.get(BOUND):
            specs[q]["weights"] = bound
    variant = {
        "provider": "any" if target.provider == "cpu" else target.provider,
        "format": "onnx",
        "gpu": None,
        "onnxruntime": f">={target.runtime or RUNTIME_OF_OPSET[target.opset]}",
    }
    return Written(specs, (variant,), file, {f"graphs/{file.path.name}": file.sha256})


def _model(order: Order, query: str, e: Emission, *, streamed: bool = False) -> ir.Model:
    doc = {"pcc.query": query, "pcc.circuit": order.name}
    batch = order.batch if order.target.static else None
    return lower(
        e.module, order.target, batch=batch, inputs=e.inputs, doc=doc, symbols=e.symbols,
        streamed=streamed,
    )  # fmt: skip
