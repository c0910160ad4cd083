"""Machine code that was compiled before, in a folder that `PCC_CUDA_CACHE` names; without it, none.

The key is everything that decides what nvcc writes: its version, options, architecture, the
library's headers and the source. Files are whole or absent: written under another name, then
renamed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pcc.errors import PccError

VARIABLE = "PCC_CUDA_CACHE"


class Cache:
    """Code by source, for one compiler, its options and the headers in a folder."""

    def __init__(self, nvcc: Path, options: Sequence[str], headers: Path) -> None:
        named = os.environ.get(VARIABLE)
        self.folder = Path(named) if named else None
        self._base = _base(nvcc, options, headers) if named else b""

    def get(self, source: str, make: Callable[[], bytes]) -> bytes:
        """Return the code of a source, made if it is not there. Errors: X404."""
        if self.folder is None:
            return make()
        key = hashlib.sha256(self._base + source.encode()).hexdigest()
        path = self.folder / f"{key}.cubin"
        if path.is_file():
            return path.read_bytes()
        code = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as out:
                out.write(code)
            os.replace(out.name, path)
        except OSError as e:
            what = f"the folder of {VARIABLE} cannot be written: {e.strerror}"
            raise PccError("X404", what, at=str(self.folder), hint="name another") from None
        return code


def _base(nvcc: Path, options: Sequence[str], headers: Path) -> bytes:
    """Return a digest of the compiler, its options and every header. Errors: X401."""
    try:
        version = subprocess.run(
            [str(nvcc), "--version"], capture_output=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise PccError("X401", f"nvcc cannot be run: {e}", at=str(nvcc)) from None
    digest = hashlib.sha256(version + repr(tuple(options)).encode())
    for path in sorted(headers.glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()
