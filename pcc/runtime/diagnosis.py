"""Where values stop being numbers: the first graph node whose output holds a NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.runtime.ort import import_ort

if TYPE_CHECKING:
    from pcc.runtime.rounds import Rounds


def first_bad_layer(rounds: Rounds) -> str:
    """Run the `verify` graph on the last window with every value as an output; name the first NaN.

    Slow and memory-hungry, for an engine that is broken anyway. Needs the onnx package; without it
    the answer says so.
    """
    try:
        import onnx
    except ImportError:
        return "install onnx to find the layer"
    engine = rounds.engine
    if "verify" not in engine.queries:
        return "the bundle has no 'verify' graph to look into"
    path = engine.path / engine.queries["verify"]["graph"]
    model = onnx.load(str(path), load_external_data=False)
    known = {o.name for o in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    ort = import_ort()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    values = dict(zip(names, session.run(names, _feed(rounds)), strict=True))
    for node in model.graph.node:
        for name in node.output:
            v = values.get(name)
            if v is not None and v.dtype.kind == "f" and np.isnan(v).any():
                layer = {p.key: p.value for p in node.metadata_props}.get("pcc.layer", "")
                return f"first in node '{node.name}' of layer '{layer}'"
    return "not in the verifier's own pass: look at the head"


def _feed(rounds: Rounds) -> dict[str, Any]:
    step = rounds.call(rounds.step_name)
    window = step["window"] if "window" in step.inputs else None
    feed: dict[str, Any] = {"length": rounds.length}
    feed["input_ids"] = window
    feed |= {f"past.{k}": b.array for k, b in rounds.states.past.items()}
    return feed
