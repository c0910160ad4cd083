"""Trained arrays, held by content: equal bytes are one object, so equal constants are one node."""

from __future__ import annotations

import hashlib
import threading
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from pcc.errors import PccError

_DTYPES: dict[str, Any] = {"f32": np.dtype("<f4"), "i64": np.dtype("<i8"), "bool": np.dtype("?")}
_LIVE: WeakValueDictionary[str, Array] = WeakValueDictionary()
_LOCK = threading.Lock()


class Array:
    """A read-only array of dtype f32, i64 or bool with its content hash `ref`."""

    __slots__ = ("__weakref__", "dtype", "ref", "value")

    dtype: str
    ref: str
    value: np.ndarray[Any, Any]

    @staticmethod
    def of(value: object) -> Array:
        """Intern an array; floats become float32, integers int64."""
        a = np.asarray(value)
        kind = {"f": "f32", "i": "i64", "u": "i64", "b": "bool"}.get(a.dtype.kind)
        if kind is None:
            raise PccError("E104", f"an array of {a.dtype} cannot be a constant")
        return Array.adopt(np.array(a, dtype=_DTYPES[kind], order="C", copy=True))

    @staticmethod
    def adopt(a: np.ndarray[Any, Any]) -> Array:
        """Intern an array without copying it: the caller holds the only reference, and drops it.

        It must be f32, i64 or bool, in row-major order, and own its memory or be a view of such.
        """
        kind = next((k for k, dtype in _DTYPES.items() if a.dtype == dtype), None)
        if kind is None or not a.flags.c_contiguous:
            raise PccError("E104", f"an array of {a.dtype} cannot be a constant as it is")
        if kind == "f32" and np.isnan(a).any():
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
