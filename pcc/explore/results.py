"""results.jsonl: a line a point, written as soon as it is measured; the newest of a key counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pcc.circuit.text import write
from pcc.errors import PccError
from pcc.explore.records import SCHEMA, STATUSES, Line, conforms
from pcc.files import read_bounded
from pcc.knobs import MAX_RESULT_BYTES
from pcc.train import lock


def key_of(*parts: Mapping[str, Any]) -> str:
    """Return the hash of everything that a measurement depends on."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Results:
    """The lines of one folder. A line cut by a crash, or not of this shape, does not count."""

    def __init__(self, path: Path) -> None:
        self.path, self.ignored = path, 0
        self.lines: dict[str, Line] = {}
        try:
            data = read_bounded(path, MAX_RESULT_BYTES, "G104") if path.exists() else b""
        except OSError as e:
            raise PccError("G104", f"cannot read it: {e.strerror}", at=str(path)) from None
        for text in data.splitlines():
            line = _line(text)
            if line is None:
                self.ignored += 1
            else:
                self.lines[line["key"]] = line
        self._torn = bool(data) and not data.endswith(b"\n")

    def finished(self, key: str) -> bool:
        """Return whether a point needs no measuring: failed ones are tried again."""
        return key in self.lines and self.lines[key]["status"] != "failed"

    def add(self, line: Line) -> None:
        """Append a line in one write, flushed to the disk. Errors: G104."""
        text = json.dumps(line, allow_nan=False) + "\n"
        data = (b"\n" if self._torn else b"") + text.encode()
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._torn = True  # until all of it is written
                if os.write(fd, data) < len(data):
                    raise OSError(None, "no room for the whole line")
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            hint = "make room and run the same command again: it goes on from what is there"
            what = f"cannot write: {e.strerror}"
            raise PccError("G104", what, at=str(self.path), hint=hint) from None
        self._torn = False
        self.lines[line["key"]] = line


def _line(text: bytes) -> Line | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not conforms(value, Line) or value["schema"] != SCHEMA:
        return None
    told = value["error"] if value["status"] == "failed" else value["figures"]
    return value if told is not None and value["status"] in STATUSES else None


def write_file(path: Path, value: object) -> None:
    """Replace a file by JSON, or by text, whole or not at all. Errors: G104."""
    text = value if isinstance(value, str) else json.dumps(value, indent=1, allow_nan=False) + "\n"
    try:
        write(path, text.encode("utf-8", "replace"))  # a file's name may be no Unicode
    except OSError as e:
        what = f"cannot write: {e.strerror}"
        raise PccError("G104", what, at=str(path), hint="make room and run again") from None


def exclusive(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder for one exploration at a time. Errors: G104, G105."""
    return lock.exclusive(folder, "exploration", cannot="G104", taken="G105")
