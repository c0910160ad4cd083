"""What a bundle says of its TensorRT engines, checked before anything relies on it.

The compiler reads it when it takes engines over (`pcc refit`), the runtime when it opens them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcc.errors import PccError
from pcc.files import read_bounded

MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # nothing else is imported
FORMS = {"gpu": r"sm_[0-9]{2,3}[a-z]?", "version": r"[0-9A-Za-z.+_-]{1,40}", "runtime": r".{1,40}"}
WEIGHT_TYPES = ("f32", "f16", "bf16")
MAX_LIST = 64 << 20  # bytes of a list of weights
MAX_ELEMENTS = 1 << 40
TABLE_ALIGN = 256  # of each table in `tables.bin`: as an allocation of its own


def variant_of(manifest: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """Return the TensorRT variant of a manifest. Errors: B215 where it is malformed or missing.

    `gpu` is part of a folder's name, `version` of a command in a message: both have a form.
    """
    listed = manifest.get("variants")
    for v in listed if isinstance(listed, list) else ():
        if isinstance(v, dict) and v.get("format") == "tensorrt":
            texts = all(
                isinstance(v.get(k), str) and re.fullmatch(form, v[k]) for k, form in FORMS.items()
            )
            module = isinstance(v.get("module"), str) and v["module"] in MODULES
            if texts and module and isinstance(v.get("options"), dict):
                return v
            raise PccError("B215", "the manifest's TensorRT variant is malformed", at=at)
    raise PccError("B215", "the bundle holds no TensorRT engines", at=at,
                   hint="compile it with --target tensorrt")  # fmt: skip


def read_weights(path: Path, graph: str) -> dict[str, Mapping[str, Any]]:
    """Return by name where each float constant of a graph lies, as `refit.json` lists it.

    An entry has `dtype`, `shape`, `file` of the bundle, `offset` in it, and `changed`: whether the
    engine was built with other numbers. Errors: B215.
    """
    try:
        listed = json.loads(read_bounded(path, MAX_LIST, "B215").decode("utf-8"))[graph]
        found = {entry["name"]: _entry(entry) for entry in listed}
        if len(found) != len(listed):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        what = "the list of an engine's weights is malformed"
        raise PccError("B215", what, at=str(path), hint="compile the bundle again") from None
    return found


def _entry(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry of the list, or raise where it is none."""
    shape, offset = entry["shape"], entry["offset"]
    sizes = isinstance(shape, list) and all(type(d) is int and d >= 0 for d in shape)
    plain = type(offset) is int and offset >= 0 and type(entry["changed"]) is bool
    texts = all(isinstance(entry[k], str) for k in ("name", "file"))
    known = entry["dtype"] in WEIGHT_TYPES
    if not (sizes and plain and texts and known) or math.prod(shape) > MAX_ELEMENTS:
        raise ValueError
    return entry
