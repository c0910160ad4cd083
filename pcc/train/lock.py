"""One run at a time in a folder: a lock that ends with the process, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pcc.errors import PccError


@contextmanager
def exclusive(
    folder: Path, what: str, *, cannot: str, taken: str, name: str = ".lock"
) -> Iterator[None]:
    """Hold the file `name` of a folder, both made if they are absent.

    Errors: `cannot` (no writing there), `taken` (another run holds it).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise PccError(cannot, f"cannot write here: {e.strerror}", at=str(folder)) from None
    try:
        with suppress(ImportError):  # no fcntl on Windows: two runs there are the user's care
            import fcntl

            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                hint = "wait for it, or give another `out`"
                say = f"another {what} writes to this folder"
                raise PccError(taken, say, at=str(folder), hint=hint) from None
        yield
    finally:
        os.close(fd)
