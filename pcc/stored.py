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
from pcc.ir.core import Values
from pcc.ir.module import Module
from pcc.ir.text import Resources
from pcc.knobs import MAX_TEXT_BYTES

WEIGHTS, ARRAYS = "graphs/weights.bin", "ir/arrays.safetensors"
DTYPES = ("<f4", "<i8", "|b1")


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

    def _find(self, ref: str) -> Values | None:
        own = self._own(ref) if callable(self._own) else self._own.get(ref)
        if own is not None or not self._shared:
            return own
        if self._index is None:
            self._index = self._read_index()
        spot = self._index.get(ref)
        return None if spot is None else self._read(spot)

    def _read_index(self) -> dict[str, Any]:
        path = inside(self.folder, "ir/weights.json")
        try:
            index = json.loads(read_bounded(path, MAX_TEXT_BYTES, "B218").decode("utf-8"))
        except (ValueError, RecursionError):
            index = None
        if not isinstance(index, dict):
            raise PccError("B218", "the index of arrays is damaged", at=str(path))
        return index

    def _read(self, spot: Any) -> Values:
        path = inside(self.folder, WEIGHTS)
        try:
            dtype, shape, offset = spot["dtype"], tuple(spot["shape"]), spot["offset"]
            plain = dtype in DTYPES and all(type(d) is int and d >= 0 for d in (*shape, offset))
            if not plain:
                raise ValueError("malformed entry")
            if spot.get("turned"):  # a projection: [.., D] stored as [D, ..]
                flat = (shape[-1], math.prod(shape[:-1]))
                return np.memmap(path, dtype, "r", offset, flat).T.reshape(shape)
            return np.asarray(np.memmap(path, dtype, "r", offset, shape))
        except (LookupError, TypeError, ValueError, OSError, OverflowError) as e:
            raise PccError("B218", f"the index of arrays is damaged: {e}", at=str(path)) from None
