"""Reading and writing modules as text: strings, and files with their arrays beside them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pcc.circuit.registry import load_ops
from pcc.errors import PccError
from pcc.ir import text as form
from pcc.ir.core import Values
from pcc.ir.module import Module

MAX_BYTES = 4 << 30


def show(module: Module) -> str:
    """Return the module's canonical text."""
    return form.show(module)


def parse(text: str, file: str = "<text>", have: form.Resources | None = None) -> Module:
    """Return the module that `text` describes."""
    load_ops()
    return form.parse(text, file, have)


def save(module: Module, path: Path) -> None:
    """Write `path` and, if arrays are named by hash, `path` with the suffix `.safetensors`."""
    from safetensors.numpy import save as encode

    arrays = form.resources(module)
    if arrays:
        write(path.with_suffix(".safetensors"), encode(arrays))
    write(path, form.show(module).encode())


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, arrays: Path | None = None) -> Module:
    """Read a `.pcir` file and the arrays beside it."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PccError("E010", f"the file has {size} bytes", at=str(path))
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise PccError("E011", f"cannot read the file: {e.strerror}", at=str(path)) from None
    except UnicodeDecodeError:
        raise PccError("E001", "the file is not UTF-8 text", at=str(path)) from None
    return parse(text, str(path), _arrays(arrays or path.with_suffix(".safetensors")))


def _arrays(path: Path) -> dict[str, Values]:
    if not path.exists():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as e:
        raise PccError("E008", f"cannot read the arrays: {e}", at=str(path)) from None
