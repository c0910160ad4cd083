"""Arrays from strangers' files: no pickles, bounded sizes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.knobs import MAX_ARRAY_BYTES


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an `.npz` file; pickled objects and oversized members are refused."""
    try:
        with zipfile.ZipFile(path) as z:
            if sum(i.file_size for i in z.infolist()) > MAX_ARRAY_BYTES:
                raise PccError(
                    "C110", f"the arrays take more than {MAX_ARRAY_BYTES} bytes", at=str(path)
                )
        with np.load(path, allow_pickle=False) as data:
            return {k: data[k] for k in data.files}
    except OSError as e:
        raise PccError("C111", f"cannot read the file: {e.strerror or e}", at=str(path)) from None
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as e:
        raise PccError("C111", f"not an .npz of plain arrays: {e}", at=str(path)) from None
