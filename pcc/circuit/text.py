"""Reading and writing modules as text: strings, and files with their arrays beside them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pcc.circuit.registry import load_ops
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.ir import text as form
from pcc.ir.array import dtype_of
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


def load(path: Path | str, arrays: form.Resources | None = None) -> Module:
    """Read a `.pcir` file and the arrays beside it, or those that `arrays` finds by hash."""
    path = Path(path)
    try:
        data = read_bounded(path, MAX_TEXT_BYTES, "E011", large="E010")
        text = data.decode("utf-8")
    except OSError as e:
        raise PccError("E011", f"cannot read the file: {e.strerror}", at=str(path)) from None
    except ValueError as e:
        if not isinstance(e, UnicodeDecodeError):
            raise PccError("E011", f"cannot read the file: {e}", at=repr(str(path))) from None
        line = data.count(b"\n", 0, e.start) + 1
        what = f"byte {data[e.start]:#04x} is not UTF-8 text"
        hint = "a .pcir file is text; is this another kind of file?"
        raise PccError("E001", what, at=f"{path}:{line}", hint=hint) from None
    return parse(text, str(path), arrays or arrays_of(path.with_suffix(".safetensors")))


def arrays_of(path: Path) -> form.Resources:
    """Return a reader of the arrays in a file: only what the text names is loaded."""
    if not path.is_file():
        return {}
    import safetensors as st

    wrong = (
        st.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
    )

    def refusal(e: BaseException) -> PccError:
        return PccError("E008", f"cannot read the arrays: {e}", at=str(path))

    try:
        file: Any = st.safe_open(str(path), framework="numpy")
        names = set(file.keys())
    except wrong as e:
        raise refusal(e) from None

    def find(ref: str) -> Values | None:
        try:
            if ref not in names:
                return None
            if file.get_slice(ref).get_dtype() == "BF16":
                dtype_of("bf16")  # NumPy knows the name once ml_dtypes is imported
            return np.asarray(file.get_tensor(ref))
        except wrong as e:
            raise refusal(e) from None

    return find
