"""Storing a verifier's weights and caches in half precision, its matrices in 8 bits.

Matrices that products and look-ups read, and the caches, are what a pass moves: they become f16 or
bf16. Norms, biases, rotary tables and pooling vectors are small, and stay f32, as results do.
With `int8` the matrices of layers become integers with a scale for each column. Tables are looked
up by rows, adapters are thin, and the output matrix is small beside the layers while its error
would be the logits' own: they keep the half type.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from pcc.errors import PccError
from pcc.ir.core import Op
from pcc.ir.quantise import by_columns
from pcc.models.base import Factored, Model, Scaled, Weight
from pcc.tensor import ops as t

# Fields of models and layers that hold such matrices; `dtype` says it to their states.
MATRICES = ("embedding", "expansion", "head", "qkv", "out", "gate_up", "up", "down")
LAYERS = ("qkv", "out", "gate_up", "up", "down")  # those of layers
PARTS = ("layers", "draft")
M = TypeVar("M", bound=Model)


def in_precision(model: M, dtype: str, *, int8: bool = False) -> M:
    """Return `model` with its matrices and caches stored as `dtype`: "f32", "f16" or "bf16".

    `int8`: the matrices of its layers as 8-bit integers, to whose products operands are rounded to
    `dtype`. Of those the scales are read here; other matrices that are not in memory are not read.
    Errors: E107 (a weight is too large for f16, or infinite).
    """
    return model if dtype == "f32" and not int8 else _Storage(dtype, int8).of(model)


@dataclass(frozen=True)
class _Storage:
    """In what matrices are stored."""

    dtype: str
    int8: bool

    def of(self, part: Any, at: str = "") -> Any:
        """Return a model, or one of its layers, stored so."""
        assert is_dataclass(part)
        assert not isinstance(part, type)
        at, new = at or type(part).__name__, dict[str, Any]()
        for name in (f.name for f in fields(part)):
            value, place = getattr(part, name), f"{at}.{name}"
            if name in PARTS:
                new[name] = tuple(self.of(x, f"{place}.{i}") for i, x in enumerate(value))
            elif name in MATRICES and value is not None:
                new[name] = self._matrix(value, place, int8=self.int8 and name in LAYERS)
            elif name == "dtype":
                new[name] = self.dtype
        return replace(part, **new)

    def _matrix(self, w: Weight, at: str, *, int8: bool) -> Weight:
        if isinstance(w, Factored):
            thin = (_const(x, self.dtype, at) for x in (w.a, w.b))
            return Factored(self._whole(w.full, at, int8=int8), *thin)
        return self._whole(w, at, int8=int8)

    def _whole(self, w: Op | Scaled, at: str, *, int8: bool) -> Op | Scaled:
        assert isinstance(w, t.Const)
        if not int8:
            return _const(w, self.dtype, at)
        try:
            q, scale = by_columns(w.value)
        except PccError as e:
            raise PccError(e.code, e.what, at=e.at or at, hint=e.hint) from None
        return Scaled(t.Const(q), t.Const(scale), self.dtype)


def _const(w: Op, dtype: str, at: str) -> Op:
    assert isinstance(w, t.Const)
    try:
        return t.Const(w.value.cast(dtype))
    except PccError as e:
        raise PccError(e.code, e.what, at=e.at or at, hint=e.hint) from None
