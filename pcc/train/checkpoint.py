"""The state of a run in one safetensors file: weights, moments, step. No pickles.

One file, replaced atomically, is either the old state or the new one; the last `keep` stay.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from pcc.errors import PccError
from pcc.train.files import newest, read_tensors, write_tensors

_NAME = re.compile(r"state@(\d{1,12})\.safetensors")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest(folder: Path) -> Path | None:
    """Return the newest state of a run, if it has one."""
    return newest(folder, "state@*.safetensors", _step)


def save_state(
    folder: Path,
    step: int,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    mark: str,
    keep: int,
) -> Path:
    """Write `state@STEP.safetensors`; older ones beyond `keep` go only after it is whole."""
    tensors: dict[str, Tensor] = {}
    for name, p in params.items():
        tensors[f"weight.{name}"] = p
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    path = folder / f"state@{step}.safetensors"
    write_tensors(path, tensors, None, {"step": str(step), "run": mark})
    for old in sorted(folder.glob("state@*.safetensors"), key=_step)[:-keep]:
        with suppress(OSError):
            old.unlink()
    return path


def load_state(
    path: Path, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, mark: str
) -> int:
    """Restore weights and moments bit for bit; return the step. Errors: N132, N150, N151."""
    tensors, meta = _read(path)
    if meta.get("run") != mark:
        names = ", ".join(changed(meta.get("run", ""), mark))
        what = f"this state was written by a run with other settings or inputs: {names}"
        hint = "use another `out`, or delete the old states to start afresh"
        raise PccError("N150", what, at=str(path), hint=hint)
    step = _step_of(path, meta)
    if step and not any(k.startswith("exp_avg.") for k in tensors):
        raise PccError("N151", "it has no moments", at=str(path), hint="delete it")
    for name, p in params.items():
        value = tensors.get(f"weight.{name}")
        if value is None or value.shape != p.shape:
            raise PccError("N151", f"no weight '{name}' of shape {tuple(p.shape)}", at=str(path))
        with torch.no_grad():
            p.copy_(value)
        found = {
            key: tensors[f"{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{key}.{name}" in tensors
        }
        for key, v in found.items():
            if v.shape != (() if key == "step" else p.shape) or not v.is_floating_point():
                raise PccError("N151", f"'{key}' of '{name}' has another shape", at=str(path))
        if found and len(found) < 3:
            raise PccError("N151", f"'{name}' lacks some of its moments", at=str(path))
        if found:
            optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
    return step


def _step_of(path: Path, meta: dict[str, str]) -> int:
    """Return the step that a state says it is of, as its name does. Errors: N151."""
    said = meta.get("step", "")
    if said != str(_step(path)):
        what = f"its name says step {_step(path)}, its metadata {said[:20]!r}"
        raise PccError("N151", what, at=str(path), hint="delete it: an older state is taken")
    return int(said)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a state; if it is damaged, say which older one is good. Errors: N132."""
    try:
        return read_tensors(path)
    except PccError as e:
        older = sorted(path.parent.glob("state@*.safetensors"), key=_step, reverse=True)
        good = next((p for p in older if _step(p) < _step(path) and _readable(p)), None)
        hint = f"delete it: the run goes on from {good.name if good else 'the start'}"
        raise PccError(e.code, e.what, at=e.at, hint=hint) from None


def _readable(path: Path) -> bool:
    try:
        read_tensors(path)
    except PccError:
        return False
    return True


def fingerprint(value: object) -> str:
    """Return a text that is equal for equal configurations and inputs."""
    return json.dumps(value, sort_keys=True)


def changed(old: str, new: str) -> list[str]:
    """Return the dotted names whose values differ between two fingerprints."""
    try:
        a, b = _leaves(json.loads(old)), _leaves(json.loads(new))
    except (ValueError, RecursionError):
        return ["all (the state does not say what it came from)"]
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or a[k] != b[k])


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """Return the values of nested mappings by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, object] = {}
    for k, v in value.items():
        found |= _leaves(v, f"{name}.{k}".strip("."))
    return found
