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
from pcc.ir.text import resources, show
from pcc.knobs import MAX_TEXT_BYTES

__all__ = ["form", "load", "parse", "resources", "save", "show", "write"]


def parse(text: str, file: str = "<text>", resources: form.Resources | None = None) -> Module:
    """Return the module that `text` describes."""
    load_ops()
    return form.parse(text, file, resources)


def save(module: Module, path: Path | str) -> None:
    """Write `path` and, if arrays are named by hash, `path` with the suffix `.safetensors`.

    Arrays come first: a reader that sees new arrays with old text gets an error, never other
    numbers, because text names arrays by their hash.
    """
    from safetensors.numpy import save as encode

    path = Path(path)
    beside = path.with_suffix(".safetensors")
    if beside == path:
        raise PccError("E011", "the text needs another suffix than .safetensors", at=str(path))
    if arrays := resources(module):
        write(beside, encode(arrays))
    write(path, show(module).encode())


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


def load(path: Path | str, arrays: Path | None = None) -> Module:
    """Read a `.pcir` file and the arrays beside it."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise PccError("E011", "this is not a file", at=str(path))
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise PccError("E010", f"the file has {size} bytes", at=str(path))
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as e:
        raise PccError("E011", f"cannot read the file: {e.strerror}", at=str(path)) from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        what = f"byte {data[e.start]:#04x} is not UTF-8 text"
        hint = "a .pcir file is text; is this another kind of file?"
        raise PccError("E001", what, at=f"{path}:{line}", hint=hint) from None
    return parse(text, str(path), _arrays(arrays or path.with_suffix(".safetensors")))


def _arrays(path: Path) -> dict[str, Values]:
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as e:
        raise PccError("E008", f"cannot read the arrays: {e}", at=str(path)) from None
