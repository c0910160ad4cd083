"""Head parameterisations beyond the published linear one, as their checkpoints store them.

With E the prefix ``mt_head._categorical_log_probs_heads.0.head.``:

low rank  logits[f,z] = U[f] e + G[f,z] (C e) + c[f,z]: ``E base`` (F,V,D), ``E factor`` (F,r,V,k),
          ``E code`` (k,D), ``E bias`` (F,r,V); the last three are absent for one expert.
trunk     e' = e + B silu(A e) before every projection: ``mt_head.trunk.up`` (H,D), ``.down`` (D,H).
int8      a tensor T of int8 rows with ``T.scale``, T's shape without its last axis: rows x scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.errors import PccError

Array = np.ndarray[Any, Any]

PREFIX = "mt_head._categorical_log_probs_heads.0.head."
BASE = PREFIX + "base"
PARTS = tuple(PREFIX + name for name in ("factor", "code", "bias"))
TRUNK = ("mt_head.trunk.up", "mt_head.trunk.down")
KEYS = (BASE, *PARTS, *TRUNK)
_SCALE = ".scale"


@dataclass(frozen=True)
class Experts:
    """Low-rank experts around shared tables: factor (F,r,V,k), code (k,D), bias (F,r,V)."""

    factor: Array = field(repr=False)
    code: Array = field(repr=False)
    bias: Array = field(repr=False)


@dataclass(frozen=True)
class Trunk:
    """e + B silu(A e): up A (H,D), down B (D,H)."""

    up: Array = field(repr=False)
    down: Array = field(repr=False)


def dequantise(named: Mapping[str, Array], at: str) -> dict[str, Array]:
    """Replace int8 rows and their scales by float32. Errors: F113."""
    out: dict[str, Array] = {}
    for key, value in named.items():
        scale = named.get(key + _SCALE)
        if value.dtype == np.int8 and scale is not None:
            if scale.shape != value.shape[:-1] or scale.dtype.kind != "f":
                what = f"scales {scale.dtype} {scale.shape} for rows {value.shape}"
                raise PccError("F113", what, at=f"{at}:{key}{_SCALE}")
            with np.errstate(over="ignore", invalid="ignore"):
                out[key] = value.astype(np.float32) * scale.astype(np.float32)[..., None]
        elif not (key.endswith(_SCALE) and _quantised(named, key)):
            out[key] = value
    return out


def _quantised(named: Mapping[str, Array], key: str) -> bool:
    of = named.get(key.removesuffix(_SCALE))
    return of is not None and of.dtype == np.int8


def quantise(value: Array) -> tuple[Array, Array]:
    """Return int8 rows and float32 scales: the largest entry of a row becomes 127."""
    x = np.asarray(value, np.float32)
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    safe = np.where(scale > 0, scale, 1)[..., None]
    return np.rint(x / safe).astype(np.int8), scale.astype(np.float32)


def read_experts(
    floats: Mapping[str, Array], emissions: tuple[int, ...], r: int | None, at: str
) -> Experts | None:
    """Return the experts around tables (F,1,V,D), None for one expert. Errors: F111, F113."""
    have = [key for key in PARTS if key in floats]
    if not have and r in (None, 1):
        return None
    if len(have) != len(PARTS):
        lacking = next(key for key in PARTS if key not in floats)
        raise PccError("F111", f"missing {lacking}", at=at, hint="a low-rank head has all of them")
    factor, code, bias = (floats[key] for key in PARTS)
    folds, _, vocab, width = emissions
    rank = len(code) if code.ndim == 2 else 0
    many = factor.shape[1] if factor.ndim == 4 else 0
    want = ((folds, many, vocab, rank), (rank, width), (folds, many, vocab))
    for key, value, shape in zip(PARTS, (factor, code, bias), want, strict=True):
        if value.shape != shape or not value.size or r not in (None, many):
            what = f"shape {value.shape}, expected {shape} with r={r or many}"
            hint = "check config.yaml against the tensors"
            raise PccError("F113", what, at=f"{at}:{key}", hint=hint)
    return Experts(factor, code, bias)


def read_trunk(floats: Mapping[str, Array], width: int, at: str) -> Trunk | None:
    """Return the trunk, if the checkpoint has one. Errors: F111, F113."""
    have = [key for key in TRUNK if key in floats]
    if not have:
        return None
    if len(have) == 1:
        raise PccError("F111", f"{have[0]} is there without its partner", at=at)
    up, down = (floats[key] for key in TRUNK)
    if up.ndim != 2 or up.shape[1] != width or down.shape != up.shape[::-1] or not up.size:
        what = f"shapes {up.shape} and {down.shape}, expected (H, {width}) and ({width}, H)"
        raise PccError("F113", what, at=f"{at}:{TRUNK[0]}")
    return Trunk(up, down)
