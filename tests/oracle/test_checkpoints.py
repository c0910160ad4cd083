"""Whole checkpoint folders, compiled to bundles: the published first round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import RUNTIME, apart

import pcc
from pcc.runtime.engine import Engine

Shared = Callable[[str], Path]
Record = Callable[[str, object], None]
Values = np.ndarray[Any, Any]
FOLDERS = (
    "evabyte-tiny-btree-n-6-r-4", "evabyte-tiny-btree-n-8-r-4", "evabyte-tiny-hmm-n-8-r-4",
    "evabyte-tiny-lora-last-1-btree-n-8-r-4", "llama-tiny-hmm-n-4-r-4", "nanogpt-tiny-cp-n-4-r-4",
)  # fmt: skip
EVERY = pytest.mark.parametrize("folder", FOLDERS)


def bundle(source: Path, out: Path) -> Engine:
    pcc.compile(source, out=out, queries=["loglik", "prefix", "marginal", "mode"])
    return pcc.load(out, threads=1)


def first_round(source: Path) -> dict[str, Values]:
    with np.load(source / "expected_first_round.npz", allow_pickle=False) as f:
        return {k: f[k] for k in f.files}


def answers(engine: Engine, want: dict[str, Values]) -> dict[str, Values]:
    """The greedy draft from the last hidden state, and its values."""
    context = want["draft_hidden_f32"][-1:]
    draft = want["first_draft_argmax"].astype(np.int64)[None]
    mode = engine.run("mode", context=context)
    return {
        "draft": mode["x"],
        "joint": engine.run("loglik", x=draft, context=context)["log_prob"],
        "prefix": np.cumsum(
            engine.run("prefix", x=draft, context=context)["log_cond"].astype(float), axis=1
        ),
    }


@EVERY
def test_the_first_round(
    folder: str, shared: Shared, tmp_path: Path, record_property: Record
) -> None:
    source = shared(f"oracle/checkpoints/{folder}")
    engine, want = bundle(source, tmp_path / "m.pcc"), first_round(source)
    got = answers(engine, want)
    np.testing.assert_array_equal(got["draft"][0], want["first_draft_argmax"])
    joint = apart(want["first_draft_joint_logp_f32"], got["joint"])
    prefix = apart(want["first_draft_prefix_logp_f32"], got["prefix"])
    record_property("joint", joint)
    record_property("prefix", prefix)
    assert joint <= RUNTIME
    assert prefix <= RUNTIME
    # The comparison can fail: the hidden state of another position gives another value.
    draft = want["first_draft_argmax"].astype(np.int64)[None]
    other = engine.run("loglik", x=draft, context=want["draft_hidden_f32"][:1])
    assert apart(want["first_draft_joint_logp_f32"], other["log_prob"]) > 0.01


@pytest.mark.parametrize("folder", [FOLDERS[0], FOLDERS[4]])
def test_the_same_folder_as_safetensors(folder: str, shared: Shared, tmp_path: Path) -> None:
    """The keys of the `.pt` file in safetensors give the same graphs, weights and answers."""
    import torch
    from safetensors.torch import save_file

    source, other = shared(f"oracle/checkpoints/{folder}"), tmp_path / folder
    other.mkdir()
    shutil.copy(source / "config.yaml", other)
    state = torch.load(source / "model@900.pt", weights_only=True)["model_state_dict"]
    tensors = {k: v.clone() for k, v in state.items() if v is not None}
    save_file(tensors, other / "model@900.safetensors")
    engines = [bundle(source, tmp_path / "a.pcc"), bundle(other, tmp_path / "b.pcc")]
    first, second = (answers(e, first_round(source)) for e in engines)
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])
    assert engines[0].manifest["files"] == engines[1].manifest["files"]
