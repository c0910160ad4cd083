"""Trained arrays, held by content: equal bytes are one object, so equal constants are one node."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from pcc.errors import PccError
from pcc.ir.recipe import Recipe, named, selected
from pcc.ir.types import HALVES, INT8, NARROW

_DTYPES: dict[str, Any] = {
    "f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i64": np.dtype("<i8"), "bool": np.dtype("?"),
    "i8": np.dtype("i1"),
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
    """Return half numbers and i8 as f32, which holds them exactly; other arrays as they are."""
    return a.astype(np.float32) if kind_of(a) in NARROW else a


def rounded(a: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return the nearest numbers of a float dtype, ties to even; too large ones are infinite."""
    with np.errstate(over="ignore"):
        return a.astype(dtype_of(kind))


def finite_cast(a: np.ndarray[Any, Any], kind: str, at: str = "") -> np.ndarray[Any, Any]:
    """Return `rounded(a, kind)`; E107 if that makes a finite number infinite."""
    out = a if a.dtype == dtype_of(kind) else rounded(a, kind)
    if kind in HALVES and out is not a:
        _refuse_overflow(a, out, kind, at)
    return out


def _refuse_overflow(
    a: np.ndarray[Any, Any], out: np.ndarray[Any, Any], kind: str, at: str = ""
) -> None:
    if not np.isinf(out).any():
        return
    if (bad := np.isinf(out) & ~np.isinf(a)).any():
        worst = float(np.abs(a[bad].astype(np.float64)).max())
        what = f"the number {worst:.6g} is too large for {kind}"
        hint = "use bf16, whose range is that of f32, or fp32"
        raise PccError("E107", what, at=at, hint=hint)


class Array:
    """A read-only array of dtype f32, f16, bf16, i64, i8 or bool with its content hash `ref`.

    A lazy array has a recipe instead of numbers. `value` and, while it is not `known`, `ref` then
    make all of them anew: whoever goes through large arrays takes `parts`.
    """

    __slots__ = ("__weakref__", "_ref", "_value", "dtype", "recipe", "shape")

    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe | None
    _ref: str
    _value: np.ndarray[Any, Any] | None

    @staticmethod
    def of(value: object, dtype: str = "") -> Array:
        """Intern an array; floats become f32, or `dtype` (f16 and bf16 too), integers i64 (or i8).

        Rounding to half numbers may not make a finite number infinite, integers must fit: E107.
        """
        a = np.asarray(value)
        if dtype == INT8 and a.dtype.kind in "iu":
            if a.size and not -128 <= int(a.min()) <= int(a.max()) <= 127:
                raise PccError("E107", f"{a.min()} .. {a.max()} do not fit into i8")
            return Array.adopt(np.array(a, np.int8, order="C"))
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
        digest = hashlib.sha256(f"{kind}{a.shape}".encode())
        digest.update(a.reshape(-1).view(np.uint8).data)
        ref = "sha256-" + digest.hexdigest()[:32]
        with _LOCK:
            if (found := _LIVE.get(ref)) is not None:
                return found
            a.flags.writeable = False
            return _LIVE.setdefault(ref, Array._new(kind, a.shape, ref, a, None))

    @staticmethod
    def lazy(kind: str, shape: tuple[int, ...], recipe: Recipe, ref: str = "") -> Array:
        """Intern an array that is made when its numbers are asked for; nothing is made here.

        `ref`: its content hash, where that is known.
        """
        key = "recipe-" + named(kind, shape, recipe.identity)
        with _LOCK:
            if (found := _LIVE.get(key)) is not None:
                return found
            return _LIVE.setdefault(key, Array._new(kind, shape, ref, None, recipe))

    @staticmethod
    def _new(
        kind: str,
        shape: tuple[int, ...],
        ref: str,
        value: np.ndarray[Any, Any] | None,
        recipe: Recipe | None,
    ) -> Array:
        new = object.__new__(Array)
        new.dtype, new.shape, new._ref = kind, tuple(shape), ref
        new._value, new.recipe = value, recipe
        return new

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * dtype_of(self.dtype).itemsize

    @property
    def value(self) -> np.ndarray[Any, Any]:
        """The numbers."""
        if self._value is not None:
            return self._value
        assert self.recipe is not None
        if self.recipe.whole is not None and self._ref:
            return self.recipe.whole().reshape(self.shape)
        out, at = np.empty(self.size, dtype_of(self.dtype)), 0
        for part in self.parts():
            out[at : at + part.size] = part
            at += part.size
        return out.reshape(self.shape)

    @property
    def ref(self) -> str:
        """The hash of dtype, shape and numbers."""
        if not self._ref:
            for _ in self.parts():
                pass
        return self._ref

    @property
    def known(self) -> bool:
        """Whether `ref` is known, so that asking for it costs nothing."""
        return bool(self._ref)

    def _hasher(self) -> Any:
        return hashlib.sha256(f"{self.dtype}{self.shape}".encode())

    def parts(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the numbers in row-major order, in flat pieces that are dropped after use.

        Whoever takes all of them for the first time makes `ref` known.
        """
        if self._value is not None:
            yield self._value.reshape(-1)
            return
        assert self.recipe is not None
        digest = None if self._ref else self._hasher()
        for part in self.recipe.parts(self.size):
            if part.dtype != dtype_of(self.dtype):
                raise PccError("E104", f"a recipe for {self.dtype} made {part.dtype}")
            flat = np.ascontiguousarray(part)
            if digest is not None:
                digest.update(flat.view(np.uint8).data)
            yield flat
        if digest is not None:
            self._ref = "sha256-" + digest.hexdigest()[:32]

    def row_keys(self) -> list[str]:
        """Return a key for each index of the first axis: equal rows of one shape share theirs."""
        if self.recipe is not None:
            rows = self.recipe.rows or ((self.recipe.identity, i) for i in range(self.shape[0]))
            return [f"{identity}[{i}]" for identity, i in rows]
        rows_of = self.value if self.shape else self.value[None]
        return [hashlib.blake2b(r.tobytes(), digest_size=12).hexdigest() for r in rows_of]

    def taken(self, rows: Sequence[int]) -> Array:
        """Return rows of the first axis, lazily if this is lazy; a run of rows is not copied."""
        return joined([self], [(0, r) for r in rows])

    def reshaped(self, shape: tuple[int, ...]) -> Array:
        """Return the same elements in another shape; nothing is copied or made."""
        if self.recipe is None:
            return Array.adopt(self.value.reshape(shape))
        rows = self.recipe.rows if shape[:1] == self.shape[:1] else None
        return Array.lazy(self.dtype, shape, replace(self.recipe, rows=rows))

    def cast(self, dtype: str) -> Array:
        """Return the nearest numbers of another float dtype, lazily if this is lazy: E107."""
        if dtype == self.dtype:
            return self
        if self.recipe is None:
            return Array.of(self.value, dtype)
        old = self.recipe
        if old.cast is not None:
            return Array.lazy(dtype, self.shape, old.cast(dtype))

        def read(start: int, stop: int) -> np.ndarray[Any, Any]:
            return finite_cast(old.part(start, stop), dtype)

        def whole() -> np.ndarray[Any, Any]:
            return finite_cast(self.value, dtype)

        identity = named("cast", old.identity, dtype)
        return Array.lazy(dtype, self.shape, Recipe(identity, read, old.whole and whole))


def joined(arrays: Sequence[Array], picks: Sequence[tuple[int, int]] | None = None) -> Array:
    """Return rows of several arrays, one after another: `picks` (array, row), or all of them."""
    first = arrays[0]
    if any(a.recipe is None for a in arrays):
        values = [a.value for a in arrays]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        if picks is None:
            return Array.adopt(whole)
        start = np.cumsum([0, *(len(v) for v in values)])
        rows = [int(start[k]) + i for k, i in picks]
        run = rows and rows == list(range(rows[0], rows[-1] + 1))
        return Array.adopt(whole[rows[0] : rows[-1] + 1] if run else whole[rows])
    if picks is None:
        picks = [(k, i) for k, a in enumerate(arrays) for i in range(a.shape[0])]
    shape = (len(picks), *first.shape[1:])
    sources = [(a.recipe, a.shape[0]) for a in arrays if a.recipe is not None]
    return Array.lazy(first.dtype, shape, selected(sources, picks, math.prod(shape[1:])))
