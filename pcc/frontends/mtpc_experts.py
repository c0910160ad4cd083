"""Head parameterisations beyond the published linear one, as their checkpoints store them.

With E the prefix ``mt_head._categorical_log_probs_heads.0.head.``:

low rank  logits[f,z] = U[f] e + G[f,z] (C e) + c[f,z]: ``E base`` (F,V,D), ``E factor`` (F,r,V,k),
          ``E code`` (k,D), ``E bias`` (F,r,V); the last three are absent for one expert.
trunk     e' = e + B silu(A e) before every projection: ``mt_head.trunk.up`` (H,D), ``.down`` (D,H).
integers  a tensor T may be stored as rows of integers with scales: `pcc.frontends.scaled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends.unread import floats

Array = np.ndarray[Any, Any]

PREFIX = "mt_head._categorical_log_probs_heads.0.head."
BASE = PREFIX + "base"
PARTS = tuple(PREFIX + name for name in ("factor", "code", "bias"))
TRUNK = ("mt_head.trunk.up", "mt_head.trunk.down")


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


def read_experts(
    named: Mapping[str, Any], emissions: tuple[int, ...], r: int | None, at: str
) -> Experts | None:
    """Return the experts around tables (F,1,V,D), None for one expert. Errors: F111 to F113."""
    have = [key for key in PARTS if key in named]
    if not have and r in (None, 1):
        return None
    if len(have) != len(PARTS):
        lacking = next(key for key in PARTS if key not in named)
        raise PccError("F111", f"missing {lacking}", at=at, hint="a low-rank head has all of them")
    factor, code, bias = (named[key] for key in PARTS)
    folds, _, vocab, width = emissions
    rank = len(code) if code.ndim == 2 else 0
    many = factor.shape[1] if factor.ndim == 4 else 0
    want = ((folds, many, vocab, rank), (rank, width), (folds, many, vocab))
    for key, value, shape in zip(PARTS, (factor, code, bias), want, strict=True):
        if value.shape != shape or not value.size or r not in (None, many):
            what = f"shape {value.shape}, expected {shape} with r={r or many}"
            hint = "check config.yaml against the tensors"
            raise PccError("F113", what, at=f"{at}:{key}", hint=hint)
    return Experts(*(floats(named[key], f"{at}:{key}") for key in PARTS))


def read_trunk(named: Mapping[str, Any], width: int, at: str) -> Trunk | None:
    """Return the trunk, if the checkpoint has one. Errors: F111 to F113."""
    have = [key for key in TRUNK if key in named]
    if not have:
        return None
    if len(have) == 1:
        raise PccError("F111", f"{have[0]} is there without its partner", at=at)
    up, down = (named[key] for key in TRUNK)
    if up.ndim != 2 or up.shape[1] != width or down.shape != up.shape[::-1] or not up.size:
        what = f"shapes {up.shape} and {down.shape}, expected (H, {width}) and ({width}, H)"
        raise PccError("F113", what, at=f"{at}:{TRUNK[0]}")
    return Trunk(*(floats(named[key], f"{at}:{key}") for key in TRUNK))
