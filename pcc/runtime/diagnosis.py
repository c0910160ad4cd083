"""Where values stop being numbers: the first graph node whose output holds a NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.runtime.ort import import_ort
from pcc.runtime.runner import HostRunner

if TYPE_CHECKING:
    from pcc.runtime.rounds import Rounds
    from pcc.runtime.runner import Calls


def first_bad_layer(rounds: Rounds, call: Calls) -> str:
    """Run the tokens of a failed call through `verify` with every value as an output.

    Returns the first node and layer that gives a NaN. Slow and memory-hungry, for an engine that is
    broken anyway. Needs the onnx package; without it the answer says so.
    """
    try:
        import onnx
    except ImportError:
        return "install onnx to find the layer"
    engine = rounds.engine
    graph = engine.queries["verify"]["graph"]
    if engine.provider != "cpu" or not graph.endswith(".onnx"):
        return "compile with --target onnx, and its error names the layer"
    model = onnx.load(
        str(engine.path / engine.queries["verify"]["graph"]), load_external_data=False
    )
    known = {o.name for o in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = _open(model, engine.path / engine.queries["verify"]["graph"])
    names = [o.name for o in session.get_outputs()]
    weights = engine.runner.weights("verify") if isinstance(engine.runner, HostRunner) else {}
    rounds.place.quiet()
    past = {f"past.{k}": rounds.states.read(k) for k in rounds.states.past}
    for ids, length in _pieces(rounds, call):
        feed = {"input_ids": ids, "length": length, **past, **weights}
        values = dict(zip(names, session.run(names, feed), strict=True))
        for node in model.graph.node:
            for name in node.output:
                v = values.get(name)
                if v is not None and v.dtype.kind == "f" and np.isnan(v).any():
                    layer = {p.key: p.value for p in node.metadata_props}.get("pcc.layer", "")
                    return f"first in node '{node.name}' of layer '{layer}'"
        past = {k: values[k.replace("past.", "present.", 1)] for k in past}
    return "not in the verifier's own pass: look at the head"


def _open(model: Any, path: Path) -> Any:
    ort = import_ort()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _pieces(rounds: Rounds, call: Calls) -> Iterator[tuple[Any, Any]]:
    """Yield ids `[B, n]` and lengths: the window of a round, or a prompt's chunk in windows."""
    if "window" in call.inputs:
        yield call["window"], call["length"]
        return
    ids, n = call["input_ids"], rounds.n
    for at in range(0, int(call["valid"].max()), n):
        piece = np.zeros((len(ids), n), np.int64)
        piece[:, : ids.shape[1] - at] = ids[:, at : at + n]
        yield piece, call["length"] + at
