"""Trained arrays, held by content: equal bytes are one object, so equal constants are one node."""

from __future__ import annotations

import hashlib
import threading
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from pcc.errors import PccError
from pcc.ir.types import HALVES

_DTYPES: dict[str, Any] = {
    "f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i64": np.dtype("<i8"), "bool": np.dtype("?"),
}  # fmt: skip
_LIVE: WeakValueDictionary[str, Array] = WeakValueDictionary()
_LOCK = threading.Lock()


def dtype_of(kind: str) -> np.dtype[Any]:
    """Return the NumPy dtype of `kind`; bf16 is that of ml_dtypes, imported when asked for."""
    if kind == "bf16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    dtype: np.dtype[Any] = _DTYPES[kind]
    return dtype


def kind_of(a: np.ndarray[Any, Any]) -> str:
    """Return the dtype of the IR that an array has as it is, '' if none."""
    if a.dtype.kind == "V" and a.dtype.name == "bfloat16":
        return "bf16"
    return next((k for k, dtype in _DTYPES.items() if a.dtype == dtype), "")


def widened(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return half numbers as f32, which holds them exactly; other arrays as they are."""
    return a.astype(np.float32) if kind_of(a) in HALVES else a


def rounded(a: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return the nearest numbers of a float dtype, ties to even; too large ones are infinite."""
    with np.errstate(over="ignore"):
        return a.astype(dtype_of(kind))


class Array:
    """A read-only array of dtype f32, f16, bf16, i64 or bool with its content hash `ref`."""

    __slots__ = ("__weakref__", "dtype", "ref", "value")

    dtype: str
    ref: str
    value: np.ndarray[Any, Any]

    @staticmethod
    def of(value: object, dtype: str = "") -> Array:
        """Intern an array; floats become f32, or `dtype` (f16 and bf16 too), integers i64.

        Rounding to half numbers may not make a finite number infinite: E107.
        """
        a = np.asarray(value)
        floats = a.dtype.kind == "f" or kind_of(a) == "bf16"
        kind = "f32" if floats else {"i": "i64", "u": "i64", "b": "bool"}.get(a.dtype.kind)
        if kind is None or (dtype not in ("", kind) and not (floats and dtype in HALVES)):
            what = f"an array of {a.dtype} cannot be a constant{' of ' * bool(dtype)}{dtype}"
            raise PccError("E104", what)
        if dtype not in HALVES:
            return Array.adopt(np.array(a, dtype_of(kind), order="C", copy=True))
        out = np.asarray(rounded(a, dtype), order="C")
        if (bad := np.isinf(out) & ~np.isinf(a)).any():
            worst = float(np.abs(a[bad].astype(np.float64)).max())
            what = f"the number {worst:.6g} is too large for {dtype}"
            raise PccError("E107", what, hint="use bf16, whose range is that of f32, or fp32")
        return Array.adopt(out)

    @staticmethod
    def adopt(a: np.ndarray[Any, Any]) -> Array:
        """Intern an array without copying it: the caller holds the only reference, and drops it.

        It must have one of the dtypes, be in row-major order, and own its memory or view such.
        """
        kind = kind_of(a)
        if not kind or not a.flags.c_contiguous:
            raise PccError("E104", f"an array of {a.dtype} cannot be a constant as it is")
        if kind in ("f32", *HALVES) and np.isnan(a).any():
            raise PccError("E105", "a constant array holds NaN", hint="check the trained weights")
        head = f"{kind}{a.shape}".encode()
        digest = hashlib.sha256(head)
        digest.update(a.reshape(-1).view(np.uint8).data)
        ref = "sha256-" + digest.hexdigest()[:32]
        with _LOCK:
            if (found := _LIVE.get(ref)) is not None:
                return found
            new = object.__new__(Array)
            a.flags.writeable = False
            new.dtype, new.ref, new.value = kind, ref, a
            return _LIVE.setdefault(ref, new)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.value.shape)
