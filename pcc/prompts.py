"""Prompts to measure with: bytes from a file (one a line) or a folder (one a file)."""

from __future__ import annotations

from pathlib import Path

from pcc.errors import PccError
from pcc.files import open_regular, read_bounded
from pcc.knobs import MAX_PROMPT_BYTES, MAX_PROMPT_FILES


def read(path: Path, *, limit: int, most: int, code: str) -> list[bytes]:
    """Return up to `limit` prompts of up to `most` bytes, spread evenly over what is there.

    Empty lines and files are no prompts. What cannot be read, or is none, raises `code`.
    """
    try:
        found = (
            _folder(path, limit, most, code) if path.is_dir() else _file(path, limit, most, code)
        )
    except OSError as e:
        raise PccError(code, f"cannot read the prompts: {e.strerror}", at=str(path)) from None
    if not found:
        hint = "a file with one prompt a line, or a folder with one a file"
        raise PccError(code, "there are no prompts", at=str(path), hint=hint)
    return found


def _file(path: Path, limit: int, most: int, code: str) -> list[bytes]:
    lines = [line[:most] for line in read_bounded(path, MAX_PROMPT_BYTES, code).splitlines()]
    return [lines[i] for i in _spread([i for i, x in enumerate(lines) if x], limit)]


def _folder(path: Path, limit: int, most: int, code: str) -> list[bytes]:
    """Files of the folder itself; links are not followed, and no more is read than is used."""
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.is_symlink())
    files = [f for f in files if f.stat().st_size]
    if len(files) > MAX_PROMPT_FILES:
        raise PccError(code, f"more than {MAX_PROMPT_FILES} files", at=str(path))
    out = []
    for i in _spread(list(range(len(files))), limit):
        with open_regular(files[i], code) as f:
            out.append(f.read(most))
    return out


def _spread(found: list[int], limit: int) -> list[int]:
    count = min(len(found), limit)
    return [found[i * len(found) // count] for i in range(count)]
