"""Adapted last layers: a draft decoder that shares all but k layers with its verifier.

A published checkpoint holds, for each adapted product y = x W, thin matrices A [r,in] and
B [out,r] in the layout of peft: the draft's product is x (W + s A^T B^T), s = lora_alpha / r. The
layers below the first adapted one are run once, for both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends.state import lookup, read_state
from pcc.ir.core import Op
from pcc.models.base import Factored, Model, Values, Weight, constant
from pcc.models.decoder import Decoder, Layer
from pcc.tensor import ops as t

FORMS = ("auto", "merged", "factored")
PREFIX = "lm._lm.base_model.model."
_KEY = re.compile(
    re.escape(PREFIX) + r"(?:model\.)?layers\.(\d{1,6})\.(?:self_attn|mlp)\."
    r"([a-z]+_proj)\.lora_([AB])\.[A-Za-z0-9_]+\.weight"
)
# Which stored products stand side by side in one matrix of a layer.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Lora:
    """Thin matrices by (layer, product): A^T [in,r] and s B^T [r,out]; where they come from."""

    pairs: Mapping[tuple[int, str], tuple[Values, Values]]
    source: str

    @property
    def first(self) -> int:
        """Index of the lowest adapted layer."""
        return min(layer for layer, _ in self.pairs)


def read_lora(folder: Path | str, *, step: int | None = None) -> Lora | None:
    """Return the adapters in a checkpoint folder, None if it has none. Errors: M114, F1xx."""
    config, state, path = read_state(folder, step=step, unread=True)  # for its names
    names = tuple(k for k in state if ".lora_" in k)
    if not names:
        return None
    _, state, path = read_state(folder, step=step, keep=names)
    at = str(Path(folder) / "config.yaml")
    options = lookup(config, "adaptor.hyperparameters", at=at) or {}
    if not isinstance(options, Mapping):
        raise PccError("M114", "adaptor.hyperparameters is not a mapping", at=at)
    halves: dict[tuple[int, str], dict[str, Values]] = {}
    for name in names:
        match, value = _KEY.fullmatch(name), state[name]
        if match is None or value is None or value.ndim != 2:
            what = f"{name!r} is no thin matrix of a known product"
            raise PccError("M114", what, at=str(path), hint=f"known: {GROUPS}")
        halves.setdefault((int(match[1]), match[2]), {})[match[3]] = np.asarray(value, np.float32)
    alpha = _alpha(options, at)
    pairs = {key: _pair(key, ab, alpha, str(path)) for key, ab in halves.items()}
    return Lora(pairs, str(path))


def _alpha(options: Mapping[str, Any], at: str) -> float:
    alpha = options.get("lora_alpha")
    plain = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is None or not plain or not np.isfinite(alpha) or options.get("use_rslora", False):
        what = f"lora_alpha is {alpha!r}: the scale of the adapters is unknown"
        hint = "config.yaml must give adaptor.hyperparameters.lora_alpha, without use_rslora"
        raise PccError("M114", what, at=at, hint=hint)
    return float(alpha)


def _pair(key: tuple[int, str], ab: Mapping[str, Values], alpha: float, at: str) -> Any:
    a, b = ab.get("A"), ab.get("B")
    if a is None or b is None or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        what = f"layer {key[0]}, {key[1]}: lora_A and lora_B do not fit"
        raise PccError("M114", what, at=at, hint="copy the checkpoint again")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise PccError("M107", f"layer {key[0]}, {key[1]}: NaN or infinity", at=at)
    return a.T, b.T * np.float32(alpha / a.shape[0])


def split(model: Decoder, lora: Lora, *, form: str = "auto") -> Decoder:
    """Return `model` with a draft of its own from the lowest adapted layer on.

    `form`: "merged" stores adapted copies of the matrices, "factored" the thin ones beside the
    shared matrices, "auto" whichever is the smaller for each matrix.
    """
    if form not in FORMS:
        raise PccError("M114", f"unknown form {form!r}", hint=f"choose one of {FORMS}")
    count = len(model.layers)
    if (top := max(layer for layer, _ in lora.pairs)) >= count:
        what = f"layer {top} is adapted, but the verifier has {count}"
        hint = "checkpoint and verifier belong to different models"
        raise PccError("M115", what, at=lora.source, hint=hint)
    draft = (adapted(model, lora, i, form) for i in range(lora.first, count))
    return replace(model, draft=tuple(draft))


def with_draft(model: Model, source: Path | str | Lora | None) -> Model:
    """Return `model` with the adapters of a checkpoint, or as it is where there are none."""
    lora = read_lora(source) if isinstance(source, Path | str) else source
    if lora is None:
        return model
    if not isinstance(model, Decoder):
        what = f"adapters are not supported for {type(model).__name__}"
        hint = "supported: Llama-style decoders, byte-Llama, EvaByte"
        raise PccError("M115", what, at=lora.source, hint=hint)
    return split(model, lora)


def adapted(model: Decoder, lora: Lora, index: int, form: str) -> Layer:
    """Return layer `index` with its adapters applied."""
    s, layer = model.shape, model.layers[index]
    q, k = s.heads * s.head_width, s.key_heads * s.head_width
    widths = {"qkv": (q, k, k), "out": (s.width,), "gate_up": (s.inner,) * 2, "down": (s.width,)}
    new: dict[str, Any] = {}
    for group, names in GROUPS.items():
        pairs = [lora.pairs.get((index, name)) for name in names]
        if any(p is not None for p in pairs):
            weight = getattr(layer, group)
            thin = _side_by_side(pairs, weight, widths[group], lora.source, f"{index}.{group}")
            new[group] = _joined(weight, *thin, form)
    return replace(layer, **new)


def _side_by_side(
    pairs: Sequence[tuple[Values, Values] | None],
    weight: Op,
    widths: Sequence[int],
    at: str,
    what: str,
) -> tuple[Values, Values]:
    """Return A [D, sum r] and the block-diagonal B [sum r, sum K] of products side by side."""
    assert isinstance(weight, t.Const)
    inputs = weight.value.shape[0]
    ranks = [0 if p is None else p[0].shape[1] for p in pairs]
    a = np.zeros((inputs, sum(ranks)), np.float32)
    b = np.zeros((sum(ranks), sum(widths)), np.float32)
    row, column = 0, 0
    for pair, rank, width in zip(pairs, ranks, widths, strict=True):
        if pair is not None:
            if pair[0].shape[0] != inputs or pair[1].shape[1] != width:
                found = f"{pair[0].shape[0]} to {pair[1].shape[1]}"
                text = f"layer {what}: adapters map {found}, the verifier {inputs} to {width}"
                hint = "checkpoint and verifier belong to different models"
                raise PccError("M115", text, at=at, hint=hint)
            a[:, row : row + rank] = pair[0]
            b[row : row + rank, column : column + width] = pair[1]
        row, column = row + rank, column + width
    return a, b


def _joined(weight: Op, a: Values, b: Values, form: str) -> Weight:
    """Return W + A B: as one matrix, or as it stands (then products take it factor by factor)."""
    assert isinstance(weight, t.Const)
    smaller = a.size + b.size < weight.value.size
    if form == "factored" or (form == "auto" and smaller):
        return Factored(weight, constant(a), constant(b))
    full = weight.value.value.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    return constant(full.astype(np.float32))
