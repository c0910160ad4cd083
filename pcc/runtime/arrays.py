"""Arrays from strangers' files: no pickles, bounded sizes."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pcc.errors import PccError
from pcc.files import open_regular
from pcc.ir.core import Values
from pcc.knobs import MAX_ARRAY_BYTES

BROKEN = (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, SyntaxError,
          zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # fmt: skip


def read_npz(path: Path) -> dict[str, Values]:
    """Return the arrays of an `.npz` file; pickled objects and oversized members are refused."""
    at = str(path)
    try:
        with open_regular(path, "C111") as file, zipfile.ZipFile(file) as z:
            total = sum(i.file_size for i in z.infolist())
            if total > MAX_ARRAY_BYTES:
                what = f"it unpacks to {total} bytes, more than {MAX_ARRAY_BYTES}"
                raise PccError("C110", what, at=at)
            return {i.filename.removesuffix(".npy"): _member(z, i, at) for i in z.infolist()}
    except OSError as e:
        raise PccError("C111", f"cannot read the file: {e.strerror or e}", at=at) from None
    except BROKEN as e:
        reason = " ".join(str(e).split())[:160]
        raise PccError("C111", f"not an .npz of plain arrays: {reason}", at=at) from None


def _member(z: zipfile.ZipFile, item: zipfile.ZipInfo, at: str) -> Values:
    """Read one array; its header may not claim more than the member holds."""
    with z.open(item) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}.get(version)  # fmt: skip
        if read is None:
            raise ValueError(f"'{item.filename[:40]}' has version {version}")
        shape, _, dtype = read(stream)
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if size > item.file_size:
            what = f"'{item.filename[:40]}' claims {size} bytes, but holds {item.file_size}"
            raise PccError("C110", what, at=at)
    with z.open(item) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
