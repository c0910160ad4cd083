"""Heads that stay in their file: the same circuit, read when it is needed, with the same errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pcc
from pcc.errors import PccError
from pcc.frontends import state
from pcc.frontends.mtpc import load_mtpc
from pcc.frontends.mtpc_checkpoint import EMISSIONS, SCOPE, load
from pcc.frontends.unread import Unread

N, R, V, D = 4, 2, 5, 3
SUM = "mt_head._sum_weights_heads.0.head.proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONFIG = """circuit: {name: cp, n_token: 4, n_component: 2, n_repetition: 1}
data: {vocab_size: 5}
lm: {}
adaptor: {}
mt_head: {hyperparameters: {n_embd: 3, transformer_n_layer: 0}}
"""


def write(folder: Path, dtype: torch.dtype, *, pickled: bool = False, bad: float = 0.0) -> Path:
    torch.manual_seed(5)
    tensors = {
        EMISSIONS: torch.randn(N, R, V, D).to(dtype),
        SUM: torch.randn(1, 1, R, D).to(dtype),
        SCOPE: torch.arange(N)[:, None],
    }
    if bad:
        tensors[EMISSIONS][3, 1, 4, 2] = bad
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    if pickled:
        torch.save({"model_state_dict": tensors}, folder / "model@1.pt")
    else:
        save_file(tensors, folder / "model@1.safetensors")
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pickled", [False, True])
def test_an_unread_head_is_the_same_circuit(
    dtype: torch.dtype, pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "c", dtype, pickled=pickled)
    eager = load(folder)
    text = pcc.show(load_mtpc(folder).module())
    monkeypatch.setattr(state, "LARGE", 0)
    lazy: Any = load(folder)
    assert isinstance(lazy.emissions, Unread)
    assert isinstance(lazy.sums[0], Unread)
    assert (lazy.emissions.ndim, lazy.emissions.size, len(lazy.emissions)) == (4, 120, N)
    assert np.array_equal(np.asarray(lazy.emissions), eager.emissions)
    assert lazy.fingerprint == eager.fingerprint
    assert pcc.show(load_mtpc(folder).module()) == text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pickled", [False, True])
def test_numbers_that_are_not_finite_are_found(
    bad: float, pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LARGE", 0)
    with pytest.raises(PccError, match=r"F112.*(NaN|infinite)"):
        load(write(tmp_path / "c", torch.float32, pickled=pickled, bad=bad))


def test_bundles_of_both_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "c", torch.bfloat16)
    eager = pcc.compile(folder, out=tmp_path / "a.pcc")
    monkeypatch.setattr(state, "LARGE", 0)
    lazy = pcc.compile(folder, out=tmp_path / "b.pcc")
    names = set(eager.manifest["files"])
    assert names == set(lazy.manifest["files"])
    different = {n for n in names if eager.manifest["files"][n] != lazy.manifest["files"][n]}
    assert not {n for n in different if not n.startswith("samples/")}
    assert pcc.verify(lazy.path).ok


def test_adapters_are_looked_for_without_reading_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcc.models.lora import read_lora

    folder = write(tmp_path / "c", torch.float32)
    monkeypatch.setattr(state, "LARGE", 4)
    monkeypatch.setattr(Unread, "array", lambda self: pytest.fail("the head was read"))
    assert read_lora(folder) is None
