"""Storing a verifier's weights and caches in half precision.

Matrices that products and look-ups read, and the caches, are what a pass moves: they become f16 or
bf16. Norms, biases, rotary tables and pooling vectors are small, and stay f32, as results do.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from pcc.errors import PccError
from pcc.ir.core import Op
from pcc.models.base import Factored, Model
from pcc.tensor import ops as t

# Fields of models and layers that hold such matrices; `dtype` says it to their states.
MATRICES = ("embedding", "expansion", "head", "qkv", "out", "gate_up", "up", "down")
PARTS = ("layers", "draft")
M = TypeVar("M", bound=Model)


def in_precision(model: M, dtype: str) -> M:
    """Return `model` with its matrices and caches stored as `dtype`: "f32", "f16" or "bf16".

    Matrices that are not in memory are not read. Errors: E107 (a weight is too large for f16).
    """
    return model if dtype == "f32" else _stored(model, dtype, type(model).__name__)


def _stored(part: Any, dtype: str, at: str) -> Any:
    assert is_dataclass(part)
    assert not isinstance(part, type)
    new: dict[str, Any] = {}
    for name in (f.name for f in fields(part)):
        value, place = getattr(part, name), f"{at}.{name}"
        if name in PARTS:
            new[name] = tuple(_stored(x, dtype, f"{place}.{i}") for i, x in enumerate(value))
        elif name in MATRICES and value is not None:
            new[name] = _matrix(value, dtype, place)
        elif name == "dtype":
            new[name] = dtype
    return replace(part, **new)


def _matrix(w: Op | Factored, dtype: str, at: str) -> Op | Factored:
    if isinstance(w, Factored):
        return Factored(*(_const(x, dtype, at) for x in (w.full, w.a, w.b)))
    return _const(w, dtype, at)


def _const(w: Op, dtype: str, at: str) -> Op:
    assert isinstance(w, t.Const)
    try:
        return t.Const(w.value.cast(dtype))
    except PccError as e:
        raise PccError(e.code, e.what, at=e.at or at, hint=e.hint) from None
