"""Weights that graphs take as inputs: pieces of `graphs/weights.bin`, which all graphs share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc.bundle import WEIGHTS, inside
from pcc.errors import PccError
from pcc.runtime.dtypes import ITEM, NUMPY

FILE = WEIGHTS
Values = np.ndarray[Any, Any]


def pieces(folder: Path, listed: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return (offset, bytes) of each listed weight by name. Errors: B216 beyond the file's end."""
    found = list(listed)
    size = inside(folder, FILE).stat().st_size if found else 0
    out: dict[str, tuple[int, int]] = {}
    for w in found:
        length = math.prod(w["shape"]) * ITEM[w["dtype"]]
        if w["offset"] + length > size:
            what = f"weight {w['name'][:60]!r} lies beyond the end of {FILE}"
            raise PccError("B216", what, at=str(folder), hint="compile the bundle again")
        out[w["name"]] = w["offset"], length
    return out


def mapped(
    folder: Path, listed: Iterable[Mapping[str, Any]], known: dict[tuple[Any, ...], Values]
) -> dict[str, Values]:
    """Return weights as arrays over the file, read when they are touched; equal places once.

    Errors: B216 for a weight beyond the file's end; R114 for bf16, which is no type of the host's.
    """
    listed = list(listed)
    places, out = pieces(folder, listed), dict[str, Values]()
    for w in listed:
        if w["dtype"] == "bf16":
            what = "the weights are stored in bf16, which ONNX Runtime does not run on a CPU"
            raise PccError("R114", what, at=str(folder), hint="load it with provider='cuda'")
        offset, _ = places[w["name"]]
        key = (offset, w["dtype"], *w["shape"])
        if key not in known:
            known[key] = np.memmap(folder / FILE, NUMPY[w["dtype"]], "r", offset, tuple(w["shape"]))
        out[w["name"]] = known[key]
    return out
