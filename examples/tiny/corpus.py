"""D_train = the standard library's .py files less the held-out modules; D_test = those modules.

Python's own standard library as a byte corpus with V = 128 (byte = id). Files that contain a byte
of 128 or above are dropped, and so are generated tables, vendored or test code, and names that
differ between machines.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from encoder import VOCAB, WINDOW

Ids = npt.NDArray[np.integer]

HELD_OUT = (
    "calendar.py",
    "cmd.py",
    "csv.py",
    "filecmp.py",
    "fileinput.py",
    "glob.py",
    "netrc.py",
    "pprint.py",
    "sched.py",
    "shelve.py",
    "timeit.py",
    "zipapp.py",
)
SKIP_FOLDERS = {
    "__pycache__",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
SKIP_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Corpus:
    """stream = 0^24 file_1 0^24 file_2 ..; a start s is drafted: x = stream[s : s + n]."""

    stream: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    names: tuple[str, ...]
    sha256: str

    def batch(self, rows: Ids, n: int) -> tuple[Ids, Ids]:
        """(x_{s-24..s-1}, x_{s..s+n-1}) for each s = starts[row]."""
        at = self.starts[rows][:, None]
        return self.stream[at + np.arange(-WINDOW, 0)], self.stream[at + np.arange(n)]


def build(files: dict[str, bytes], n: int) -> Corpus:
    """S = {every offset of every file that leaves n bytes to draft}, the starts."""
    parts, starts, offset = [], [], 0
    for data in files.values():
        offset += WINDOW
        parts += [b"\0" * WINDOW, data]
        starts.append(np.arange(offset, offset + max(0, len(data) - n + 1)))
        offset += len(data)
    whole = b"".join(parts)
    return Corpus(
        np.frombuffer(whole, np.uint8),
        np.concatenate(starts),
        tuple(files),
        hashlib.sha256(whole).hexdigest(),
    )


def read() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(train, held out): name to bytes, in sorted order of the path under the library's root."""
    root = Path(os.__file__).parent
    train: dict[str, bytes] = {}
    held: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        if SKIP_FOLDERS & set(parts) or any(p.startswith(SKIP_PREFIXES) for p in parts):
            continue
        data = path.read_bytes()
        if data and max(data) < VOCAB:
            (held if name in HELD_OUT else train)[name] = data
    return train, held


def excerpts(files: dict[str, bytes], size: int) -> dict[str, bytes]:
    """From the first line that opens a def or a class, `size` bytes, cut back to a line's end."""
    out = {}
    for name, data in files.items():
        found = [i for i in (data.find(b"\ndef "), data.find(b"\nclass ")) if i >= 0]
        start = min(found, default=-1) + 1
        piece = data[start : start + size]
        out[name] = piece[: piece.rfind(b"\n") + 1]
    return out
