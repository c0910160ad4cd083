"""Strangers' files: regular ones of bounded size, or an error before a byte is read; and JSON."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from pcc.errors import PccError


def open_regular(path: Path, code: str) -> BufferedReader:
    """Open a regular file (or a link to one) for reading.

    A pipe would block for ever, a device has no end: both are refused with `code`. What the system
    refuses is an `OSError`, as of `open`.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PccError(code, "this is not a regular file", at=str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bounded(path: Path, limit: int, code: str, *, large: str = "") -> bytes:
    """Return the bytes of a regular file, at most `limit`; `large` is the code of a larger one."""
    with open_regular(path, code) as f:
        size = os.fstat(f.fileno()).st_size
        data = b"" if size > limit else f.read(limit + 1)
        if max(size, len(data)) > limit:
            what = f"{max(size, len(data))} bytes are too many (limit {limit})"
            raise PccError(large or code, what, at=str(path))
        return data


def finite(v: Any, other: Callable[[float], Any] = lambda _: None) -> Any:
    """Return a value as JSON takes it: lists for tuples, `other` for infinities and NaN (null)."""
    match v:
        case dict():
            return {k: finite(x, other) for k, x in v.items()}
        case list() | tuple():
            return [finite(x, other) for x in v]
        case float():
            return v if v - v == 0 else other(v)
        case _:
            return v
