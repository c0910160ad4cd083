"""The IR that a bundle holds: its stages, with arrays read from the weight file of the graphs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pcc.bundle import inside
from pcc.circuit import text
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.ir.array import Array, dtype_of
from pcc.ir.core import Values
from pcc.ir.module import Module
from pcc.ir.noise import Noise
from pcc.ir.recipe import Recipe, named
from pcc.ir.text import Resources
from pcc.ir.types import NARROW, TRAINED
from pcc.knobs import MAX_EXTENT, MAX_TEXT_BYTES

WEIGHTS, ARRAYS = "graphs/weights.bin", "ir/arrays.safetensors"
KINDS = {"<f4": "f32", "<i8": "i64", "|b1": "bool"}  # how bundles before 0.2 name dtypes
LAZY = 1 << 20  # elements of an array that is read when its numbers are asked for


class Stages:
    """The stages of a bundle by name, e.g. `circuit`, `tensor-step`."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder = folder
        listed = sorted(f for f in files if f.startswith("ir/") and f.endswith(".pcir"))
        self.names = {Path(f).stem.partition("-")[2]: f for f in listed}
        self._index: dict[str, Any] | None = None
        self._own: Resources = {}
        if ARRAYS in files:
            self._own = text.arrays_of(inside(folder, ARRAYS))
        self._shared = "ir/weights.json" in files

    def module(self, name: str) -> Module:
        """Return a stage's module; its arrays are checked against their hashes."""
        if name not in self.names:
            what = f"the bundle holds no stage {name!r}"
            raise PccError(
                "B217", what, at=str(self.folder), hint=f"it has {', '.join(self.names)}"
            )
        path = inside(self.folder, self.names[name])
        return text.load(path, self._find)

    def _find(self, ref: str) -> Values | Array | None:
        own = self._own(ref) if callable(self._own) else self._own.get(ref)
        if own is not None or not self._shared:
            return own
        if self._index is None:
            self._index = self._read_index()
        spot = self._index.get(ref)
        return None if spot is None else self._read(ref, spot)

    def _read_index(self) -> dict[str, Any]:
        path = inside(self.folder, "ir/weights.json")
        try:
            index = json.loads(read_bounded(path, MAX_TEXT_BYTES, "B218").decode("utf-8"))
        except (ValueError, RecursionError):
            index = None
        if not isinstance(index, dict):
            raise PccError("B218", "the index of arrays is damaged", at=str(path))
        return index

    def _read(self, ref: str, spot: Any) -> Values | Array:
        """Return an array of the weight file: the file's hash was checked when it was opened."""
        if isinstance(spot, dict) and ("noise" in spot or "absent" in spot):
            return self._elsewhere(ref, spot)
        path = inside(self.folder, WEIGHTS)
        try:
            kind, shape, offset = spot["dtype"], tuple(spot["shape"]), spot["offset"]
            kind = KINDS.get(kind, kind)
            plain = kind in TRAINED and all(type(d) is int and d >= 0 for d in (*shape, offset))
            if not plain or offset + math.prod(shape) > path.stat().st_size:
                raise ValueError("malformed entry")
            turned = bool(spot.get("turned"))
            if math.prod(shape) < LAZY:
                return np.ascontiguousarray(_mapped(path, kind, shape, offset, turned))
        except (LookupError, TypeError, ValueError, OSError, OverflowError) as e:
            raise PccError("B218", f"the index of arrays is damaged: {e}", at=str(path)) from None

        def whole() -> Values:
            return np.ascontiguousarray(_mapped(path, kind, shape, offset, turned))

        def read(start: int, stop: int) -> Values:
            return np.array(_mapped(path, kind, shape, offset, turned).reshape(-1)[start:stop])

        recipe = Recipe(named("bundle", ref), read, whole if turned else None)
        return Array.lazy(kind, shape, recipe, ref)

    def _elsewhere(self, ref: str, spot: dict[str, Any]) -> Array:
        """Return random numbers, made again. Errors: B219 (numbers that are not here)."""
        if "noise" not in spot:
            what = f"the numbers of {ref[:24]} are not in the bundle as this stage has them"
            hint = "a large model's are there once, as its target wants them: use onnx and fp32"
            raise PccError("B219", what, at=str(self.folder), hint=hint)
        try:
            seed, name, scale = spot["noise"]
            kind, shape = spot["dtype"], tuple(spot["shape"])
            good = kind in ("f32", *NARROW) and all(type(d) is int and d >= 0 for d in shape)
            good = good and type(seed) is int and 0 <= seed < 1 << 32 and type(name) is str
            if not good or not 0.0 < float(scale) < 1e3 or math.prod(shape) > MAX_EXTENT:
                raise ValueError("malformed noise")
        except (LookupError, TypeError, ValueError) as e:
            what = f"the index of arrays is damaged: {e}"
            raise PccError("B218", what, at=str(self.folder)) from None
        return Array.lazy(kind, shape, Noise(seed, name, float(scale)).recipe(kind), ref)


def _mapped(path: Path, kind: str, shape: tuple[int, ...], offset: int, turned: bool) -> Values:
    """Map a part of a file; a projection `[.., D]` is stored as `[D, ..]`."""
    dtype = dtype_of(kind)
    if not turned:
        return np.memmap(path, dtype, "r", offset, shape)
    flat = (shape[-1], math.prod(shape[:-1]))
    return np.memmap(path, dtype, "r", offset, flat).T.reshape(shape)
