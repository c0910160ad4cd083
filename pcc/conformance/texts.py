"""Files of expectations: the texts of verifiers as a CPU makes them, JSON, gzip where named .gz.

They come from strangers too: what they hold is bounded, also once it is unpacked.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcc.circuit import text
from pcc.conformance.protocol import RUNS, Trace
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.knobs import MAX_RESULT_BYTES

PACKED = ".gz"
GZIP = 16 + zlib.MAX_WBITS


def write(path: Path, texts: Mapping[str, Any]) -> None:
    """Write expectations; equal ones are equal files."""
    data = json.dumps(texts, separators=(",", ":")).encode()
    text.write(path, gzip.compress(data, mtime=0) if path.suffix == PACKED else data)


def read(path: Path) -> dict[str, Any]:
    """Return expectations, checked as a whole. Errors: C141."""
    try:
        data = read_bounded(path, MAX_RESULT_BYTES, "C141")
        if path.suffix == PACKED:
            data = _unpacked(data, path)
        value = json.loads(data.decode("utf-8"))
    except OSError as e:
        raise PccError("C141", f"cannot read it: {e.strerror}", at=str(path)) from None
    except (ValueError, RecursionError):
        raise PccError("C141", "it is no JSON", at=str(path)) from None
    return checked(value)


def _unpacked(data: bytes, path: Path) -> bytes:
    """Return what a gzip file holds, of a bounded size."""
    unpacker = zlib.decompressobj(GZIP)
    try:
        out = unpacker.decompress(data, MAX_RESULT_BYTES)
    except zlib.error:
        raise PccError("C141", "it is no gzip file", at=str(path)) from None
    if not unpacker.eof or unpacker.unused_data:
        what = "it is cut off, or holds more than it may"
        raise PccError("C141", what, at=str(path))
    return out


def checked(value: Any) -> dict[str, Any]:
    """Return expectations that were read as JSON, checked as a whole. Errors: C141."""
    if not isinstance(value, dict):
        raise PccError("C141", "expectations are an object: texts by verifier, precision and rows")
    for key, texts in value.items():
        try:
            for run in RUNS:
                Trace.read(texts[run.name])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            hint = "write it again: pcc conformance --save-expected FILE"
            raise PccError("C141", f"no texts of {str(key)[:60]!r} are in it", hint=hint) from None
    return value
