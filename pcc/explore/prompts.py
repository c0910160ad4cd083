"""Prompts: bytes from a file (one a line) or a folder (one a file)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pcc.errors import PccError
from pcc.explore.config import Prompts

MAX_FILE = 64 << 20  # bytes of a file of prompts
MAX_FILES = 1 << 20


def read(p: Prompts) -> list[bytes]:
    """Return at most `limit` prompts, spread evenly over what is there. Errors: G106."""
    path = Path(p.path)
    try:
        if path.exists() and not (path.is_dir() or path.is_file()):
            raise PccError("G106", "this is neither a file nor a folder", at=p.path)
        found = _folder(path, p) if path.is_dir() else _file(path, p)
    except OSError as e:
        raise PccError("G106", f"cannot read the prompts: {e.strerror}", at=p.path) from None
    if not found:
        hint = "a file with one prompt a line, or a folder with one a file"
        raise PccError("G106", "there are no prompts", at=p.path, hint=hint)
    return found


def _file(path: Path, p: Prompts) -> list[bytes]:
    if path.stat().st_size > MAX_FILE:
        raise PccError("G106", f"more than {MAX_FILE} bytes", at=p.path)
    lines = [line[: p.bytes] for line in path.read_bytes().splitlines()]
    return [lines[i] for i in _spread([i for i, x in enumerate(lines) if x], p.limit)]


def _folder(path: Path, p: Prompts) -> list[bytes]:
    """Files of the folder itself; links are not followed, and no more is read than is used."""
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.is_symlink())
    files = [f for f in files if f.stat().st_size]
    if len(files) > MAX_FILES:
        raise PccError("G106", f"more than {MAX_FILES} files", at=p.path)
    out = []
    for i in _spread(list(range(len(files))), p.limit):
        with files[i].open("rb") as f:
            out.append(f.read(p.bytes))
    return out


def _spread(found: list[int], limit: int) -> list[int]:
    count = min(len(found), limit)
    return [found[i * len(found) // count] for i in range(count)]


def digest(prompts: list[bytes]) -> str:
    """Return the hash of the prompts that are used, in order."""
    h = hashlib.sha256()
    for p in prompts:
        h.update(len(p).to_bytes(8, "little") + p)
    return h.hexdigest()
