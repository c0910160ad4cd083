"""Exactness with key-value caches: a decoder, with and without adapted layers for the draft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import CASES, options, worst
from model_runs import write_folder
from torch_reference import decoder, decoder_state

from pcc.circuit.circuit import Circuit
from pcc.frontends import templates
from pcc.ir.core import Op
from pcc.models.decoder import Decoder
from pcc.models.load import load_model
from pcc.models.step import Steps
from pcc.passes import pieces as mk
from pcc.tensor import ops as t

ROWS = 12
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "hidden_act": "silu",
}


def decoders(folder: Path, split: bool) -> tuple[Decoder, Any]:
    """Return a decoder and its law by plain torch, each pass over the whole text."""
    state = decoder_state(CONFIG, seed=1)
    state = {k: v * 2 if "proj" in k else v for k, v in state.items()}  # contexts matter more
    model = load_model(write_folder(folder, CONFIG, state), max_rows=ROWS)
    assert isinstance(model, Decoder)
    if split:
        other = replace(model.layers[-1], down=model.layers[0].down, out=model.layers[0].out)
        model = replace(model, draft=(other,))

    def law(tokens: list[int]) -> np.ndarray:
        _, logits = decoder(CONFIG, state, torch.tensor([tokens]))
        z = logits[0, -1].numpy().astype(np.float64)
        p = np.exp(z - z.max())
        return p / p.sum()

    return model, law


def small(kind: str, n: int) -> Circuit:
    return getattr(templates, kind)(n, 2, 2, context=8, seed=2)


@pytest.mark.parametrize(
    ("kind", "split", "proposal"),
    [("cp", True, "full"), ("btree", False, "latent-first")],
)
def test_exact(kind: str, split: bool, proposal: str, tmp_path: Path) -> None:
    model, law = decoders(tmp_path / "m", split)
    spread = [law([a, b, c])[0] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    assert np.std(spread) > 0.02
    assert len(model.states(ROWS)) == (6 if split else 4)
    found = worst(model, small(kind, 3), 3, options(proposal), CASES[:2], ROWS, law)
    assert found < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["full", "latent-first"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_exact_longer(kind: str, split: bool, proposal: str, tmp_path: Path) -> None:
    model, law = decoders(tmp_path / "m", split)
    assert worst(model, small(kind, 3), 4, options(proposal), CASES[:2], ROWS, law) < 1e-6


@pytest.mark.parametrize("off", [-1, 1])
def test_a_length_off_by_one_is_caught(
    off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Steps._round

    def wrong(self: Steps, *args: Any) -> dict[str, Op]:
        outs = true(self, *args)
        outs["next_length"] = t.Add(outs["next_length"], mk.const(np.int64(off)))
        return outs

    monkeypatch.setattr(Steps, "_round", wrong)
    model, law = decoders(tmp_path / "m", True)
    assert worst(model, small("cp", 2), 3, options("full"), CASES[:1], ROWS, law) > 1e-4
