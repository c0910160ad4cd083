"""Write model folders, build modules over N tokens, run them in float64 and in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from pcc.backends.onnx.lower import lower
from pcc.interp.run import run
from pcc.ir.array import dtype_of
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import LogReal
from pcc.models.base import Model
from pcc.targets import TARGETS
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]


def write_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], shards: int = 1
) -> Path:
    """Write config.json and the weights, in one file or behind an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors")
        return folder
    placed = {}
    for i in range(shards):
        part = {k: v for j, (k, v) in enumerate(state.items()) if j % shards == i}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def module_of(model: Model, count: int, rows: int) -> tuple[Module, list[t.Input]]:
    """Return a module over `count` tokens with outputs hidden, draft_hidden, logits, present.*."""
    ids, start = t.Input("ids", "i64", "b", (count,)), t.Input("length", "i64", "b", ())
    done = t.Input("done", "i64", "b", ())
    specs = model.states(rows)
    past = {s.name: t.Input(f"past.{s.name}", s.dtype, "b", s.shape) for s in specs}
    made = model.forward(ids, start, dict(past))
    outputs: list[tuple[str, Op]] = [
        ("hidden", made.hidden),
        ("draft_hidden", made.draft_hidden),
        ("logits", made.logits),
    ]
    new = made.present(done)
    assert set(new) == set(past)
    outputs += [(f"present.{s.name}", new[s.name]) for s in specs]
    return Module(f"pass_{count}", (), tuple(outputs)), [ids, start, done, *past.values()]


def state_of(model: Model, rows: int, batch: int, fill: float = 0.0, seed: int = 0) -> Any:
    """Return empty states; with `fill`, rows hold noise of that size."""
    rng = np.random.default_rng(seed)
    out = {}
    for s in model.states(rows):
        shape = (batch, *s.shape)
        noise = rng.normal(size=shape) * fill if s.dtype != "i64" else np.zeros(shape)
        out[s.name] = noise.astype(dtype_of(s.dtype))
    return out


class Runner:
    """Runs passes of any width: the judge in float64, or ONNX Runtime."""

    def __init__(
        self, model: Model, rows: int, opset: int | None = None, *, fused: bool = False
    ) -> None:
        self.model, self.rows, self.opset, self.fused = model, rows, opset, fused
        self.made: dict[int, Any] = {}
        self.graphs: dict[int, ir.Model] = {}

    def __call__(
        self, ids: Values, length: Values, state: dict[str, Values], done: Values | None = None
    ) -> dict[str, Values]:
        """Return the outputs; present.* become the caller's next state."""
        count = ids.shape[1]
        if count not in self.made:
            module, inputs = module_of(self.model, count, self.rows)
            self.made[count] = (module, self._session(count, module, inputs))
        module, session = self.made[count]
        feed = {"ids": ids, "length": length, "done": np.full_like(length, count)}
        if done is not None:
            feed["done"] = done
        feed |= {f"past.{k}": v for k, v in state.items()}
        names = [name for name, _ in module.outputs]
        if session is None:
            values = run(module.roots, feed, LogReal())
        else:
            values = session.run(names, feed)
        return dict(zip(names, values, strict=True))

    def _session(self, count: int, module: Module, inputs: list[t.Input]) -> Any:
        if self.opset is None:
            return None
        open_axes = {
            f"{way}.{s.name}": {s.rows_axis: s.rows_name}
            for s in self.model.states(self.rows)
            for way in ("past", "present")
            if s.rows_axis is not None
        }
        target = replace(TARGETS["onnx"], attention="mask" if self.fused else "parts")
        made = lower(module, target, opset=self.opset, inputs=inputs, symbols=open_axes)
        self.graphs[count] = made
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 2
        data = ir.to_proto(made).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def in_passes(
    run: Runner, ids: Values, widths: Sequence[int], state: dict[str, Values]
) -> dict[str, Values]:
    """Run `ids` i64[B,N] in passes of these widths; return what one pass over them would."""
    at, parts = 0, []
    for width in widths:
        parts.append(run(ids[:, at : at + width], np.full(len(ids), at), state))
        state, at = next_state(parts[-1]), at + width
    assert at == ids.shape[1]
    whole = {k: np.concatenate([p[k] for p in parts], axis=1)
             for k in ("hidden", "draft_hidden", "logits")}  # fmt: skip
    return parts[-1] | whole


def follow(run: Runner, ids: Values, length: int, width: int, vocab: int) -> list[int]:
    """Return the greedy text after `ids[:length]`, as long as `ids` says, through wrong drafts.

    Each pass verifies `width` ids of `ids`, wrong from a random place on: rollback by length.
    """
    rng, goal = np.random.default_rng(width), len(ids) - length
    state = next_state(run(ids[None, :length], np.array([0]), state_of(run.model, run.rows, 1)))
    found = [int(ids[length])]
    while len(found) < goal:
        draft = np.resize(ids[length : length + width], width)
        good = int(rng.integers(1, width + 1))
        draft[good:] = rng.integers(0, vocab, width - good)
        out = run(draft[None], np.array([length]), state, np.array([good]))
        kept = min(good, goal - len(found))
        found += out["logits"][0, :kept].argmax(axis=-1).tolist()
        state, length = next_state(out), length + kept
    return found


def close(got: Values, want: Values, logits: Values | None = None) -> None:
    """The bound of the project's promise: 2e-5 of the largest logit (default: of `want`)."""
    limit = 2e-5 * max(1.0, float(np.abs(want if logits is None else logits).max()))
    assert got.shape == want.shape
    assert float(np.abs(got - want).max()) <= limit


def next_state(out: Mapping[str, Values]) -> dict[str, Values]:
    """Return the states after a pass."""
    return {k.removeprefix("present."): v for k, v in out.items() if k.startswith("present.")}
