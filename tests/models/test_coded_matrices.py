"""Coded matrices of a verifier, read by blocks of rows: the work grows with the file, no faster."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pcc.errors import PccError
from pcc.frontends import coded
from pcc.models import tensors
from pcc.models.matrix import BLOCK, Matrix
from pcc.models.tensors import Tensors

Array = np.ndarray[Any, Any]
K, D = 3000, 16


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count numbers that are inflated, and those that are read of `T.streams`, the only I32."""
    done = {"inflated": 0, "fields": 0}
    inflate, read = coded._inflate, tensors.read_tensor

    def inflated(data: Array, size: int, at: str) -> Array:
        done["inflated"] += size
        return inflate(data, size, at)

    def fields(*args: Any) -> Array:
        found = read(*args)
        done["fields"] += found.size if args[2] == "I32" else 0
        return found

    monkeypatch.setattr(coded, "_inflate", inflated)
    monkeypatch.setattr(tensors, "read_tensor", fields)
    monkeypatch.setattr(tensors, "LAZY_ELEMENTS", 0)
    return done


def matrix(folder: Path, q: Array, lead: int, many: int) -> Matrix:
    """Return a matrix with `many` groups of `lead` rows in a stream; scales are 1."""
    held = np.diff(q, axis=0, prepend=np.int8(0)) if lead > 1 else q
    streams = [zlib.compress(held[i : i + many * lead].tobytes())
               for i in range(0, len(q), many * lead)]  # fmt: skip
    state = {
        "T": torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8),
        "T.streams": torch.tensor([D, lead, many, *map(len, streams)], dtype=torch.int32),
        "T.scale": torch.ones(len(q), dtype=torch.float16),
    }
    save_file(state, folder / "model.safetensors")
    found = Tensors(folder).matrix("T", *q.shape)
    assert isinstance(found, Matrix)
    return found


@pytest.mark.parametrize("many", [1, 100, BLOCK, K])
def test_a_pass_inflates_each_number_once(many: int, work: dict[str, int], tmp_path: Path) -> None:
    q = np.random.default_rng(0).integers(-63, 64, (K, D)).astype(np.int8)
    found = matrix(tmp_path, q, 1, many)
    assert work == {"inflated": 0, "fields": 3 + -(-K // many)}
    for turn in (1, 2):
        np.testing.assert_array_equal(np.concatenate(list(found.blocks())), q)
        assert work == {"inflated": turn * K * D, "fields": 3 + -(-K // many)}


def test_matrices_that_would_be_inflated_for_each_block(tmp_path: Path) -> None:
    with pytest.raises(PccError, match=r"T\.streams.*F113.*groups of 3000 rows"):
        matrix(tmp_path, np.ones((K, D), np.int8), K, 1)
    many = (1 << 20) // D + 1
    q = np.random.default_rng(0).integers(-63, 64, (many, D)).astype(np.int8)
    with pytest.raises(PccError, match=r"T\.streams.*F113.*numbers in a stream"):
        matrix(tmp_path, q, 1, many)
