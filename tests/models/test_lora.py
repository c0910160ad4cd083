"""Adapted last layers: shared, verifier and draft layers in one pass, merged and factored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_models import features, read_folder
from model_runs import Runner, close, in_passes, next_state, state_of

from pcc.errors import PccError
from pcc.models.base import Factored
from pcc.models.decoder import Decoder
from pcc.models.load import load_model
from pcc.models.lora import Lora, read_lora, split
from pcc.tensor import ops as t

Shared = Callable[[str], Path]
EVABYTE = "oracle/checkpoints/EvaByte-tiny-backbone"
LLAMA = "oracle/checkpoints/Llama3-2-3B-IT-Byte-tiny-backbone"
ADAPTED = "oracle/checkpoints/evabyte-tiny-lora-last-1-btree-n-8-r-4"
ROWS = 160
FORMS = ("merged", "factored", "auto")
Extra = Callable[[str], Any]


def base_of(shared: Shared, name: str) -> Decoder:
    found = load_model(shared(name), max_rows=ROWS)
    assert isinstance(found, Decoder)
    return found


def random_lora(model: Decoder, layers: list[int], names: list[str]) -> tuple[Lora, Extra]:
    """Adapters of unequal ranks, and what they add to each matrix [out,in]."""
    s, rng = model.shape, np.random.default_rng(5)
    q, k = s.heads * s.head_width, s.key_heads * s.head_width
    sizes = {
        "q_proj": (s.width, q), "k_proj": (s.width, k), "v_proj": (s.width, k),
        "o_proj": (q, s.width), "gate_proj": (s.width, s.inner), "up_proj": (s.width, s.inner),
        "down_proj": (s.inner, s.width),
    }  # fmt: skip
    pairs, extra = {}, {}
    for layer in layers:
        for rank, name in enumerate(names, 1):
            a, b = (
                rng.normal(size=x) * 0.3 for x in ((sizes[name][0], rank), (rank, sizes[name][1]))
            )
            pairs[layer, name] = a.astype(np.float32), b.astype(np.float32)
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            extra[f"model.layers.{layer}.{part}.{name}"] = (a @ b).T
    return Lora(pairs, "here"), lambda name: extra.get(name, 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", [None, 24, 17], ids=["float64", "opset24", "opset17"])
def test_published_draft_and_verifier_features(
    shared: Shared, form: str, opset: int | None
) -> None:
    with np.load(shared(ADAPTED) / "expected_first_round.npz") as file:
        want = dict(file)
    lora = read_lora(shared(ADAPTED))
    assert lora is not None
    assert lora.first == 2
    model = split(base_of(shared, EVABYTE), lora, form=form)
    ids, state = want["prompt"][None].astype(np.int64), state_of(model, ROWS, 1, fill=9.0)
    got = in_passes(Runner(model, ROWS, opset), ids, [7, 13], state)
    for mine, theirs in (
        ("hidden", "base_hidden"),
        ("draft_hidden", "draft_hidden"),
        ("logits", "base_logits"),
    ):
        close(got[mine][0], want[f"{theirs}_f32"], want["base_logits_f32"])
    assert np.abs(want["draft_hidden_f32"] - want["base_hidden_f32"]).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", [EVABYTE, LLAMA])
@pytest.mark.parametrize("layers", [[2], [1, 2], [0]])
def test_split_models_are_two_models_in_one_pass(
    shared: Shared, backbone: str, form: str, layers: list[int]
) -> None:
    base = base_of(shared, backbone)
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora, extra = random_lora(base, layers, names)
    model = split(base, lora, form=form)
    config, weights = read_folder(shared(backbone))
    ids = np.random.default_rng(0).integers(0, 268, 90)
    state = state_of(model, ROWS, 1, fill=9.0)
    got = in_passes(Runner(model, ROWS, 24), ids[None], [60, 9, 21], state)
    hidden, logits = features(config, weights, ids)
    adapted, _ = features(config, weights, ids, extra)
    close(got["hidden"][0], hidden, logits)
    close(got["logits"][0], logits)
    close(got["draft_hidden"][0], adapted, logits)
    assert np.abs(adapted - hidden).max() > 0.1


def test_only_the_last_layers_have_states_of_their_own(shared: Shared) -> None:
    base = base_of(shared, LLAMA)
    lora, _ = random_lora(base, [1], ["q_proj"])
    names = [s.name for s in split(base, lora).states(ROWS)]
    assert names[:-1] == [f"{kind}.{i}" for i in range(5) for kind in ("key", "value")]
    assert names[-1] == "recent_ids"
    assert len(split(base, lora).draft) == 2


def test_greedy_text_of_the_verifier(shared: Shared) -> None:
    told = json.loads((shared(ADAPTED) / "expected.json").read_text())
    model = load_model(shared(EVABYTE), max_rows=ROWS, lora=shared(ADAPTED))
    assert isinstance(model, Decoder)
    assert len(model.draft) == 1
    text, run = told["ar_greedy_f32_tokens"], Runner(model, ROWS, 24)
    ids, length = np.array([*told["prompt"], *text]), len(told["prompt"])
    for width in (1, 8):
        at = length - 1
        state = next_state(run(ids[None, :at], np.array([0]), state_of(model, ROWS, 1)))
        found: list[int] = []
        while len(found) < len(text):
            draft = np.resize(ids[at : at + width], width)
            draft[5:] = 7  # wrong drafts, rolled back by length
            out = run(draft[None], np.array([at]), state)
            kept = min(width, 5, len(text) - len(found))
            found += out["logits"][0, :kept].argmax(axis=-1).tolist()
            state, at = next_state(out), at + kept
        assert found == text


def test_factored_products_share_the_matrices(shared: Shared) -> None:
    base = base_of(shared, LLAMA)
    lora, _ = random_lora(base, [2], ["q_proj", "up_proj"])
    factored = split(base, lora, form="factored").draft[0]
    assert isinstance(factored.qkv, Factored)
    assert factored.qkv.full is base.layers[2].qkv
    assert factored.down is base.layers[2].down
    merged = split(base, lora, form="merged").draft[0]
    assert isinstance(merged.qkv, t.Const)
    # Thin matrices of rank 1 take less room than a copy.
    assert isinstance(split(base, lora).draft[0].qkv, Factored)


def test_checkpoints_without_adapters_have_none(shared: Shared) -> None:
    plain = shared("oracle/checkpoints/llama-tiny-hmm-n-4-r-4")
    assert read_lora(plain) is None
    model = load_model(shared(LLAMA), max_rows=ROWS, lora=plain)
    assert isinstance(model, Decoder)
    assert not model.draft


def test_adapters_of_another_model_are_refused(shared: Shared) -> None:
    base = base_of(shared, LLAMA)
    lora, _ = random_lora(base, [2], ["q_proj"])
    (key, (a, b)), *_ = lora.pairs.items()
    with pytest.raises(PccError, match="M115"):
        split(base, replace(lora, pairs={(3, "q_proj"): (a, b)}))
    with pytest.raises(PccError, match="M115"):
        split(base, replace(lora, pairs={key: (a[1:], b)}))
    with pytest.raises(PccError, match="M115"):
        split(base, replace(lora, pairs={key: (a, b[:, 1:])}))
    with pytest.raises(PccError, match="M114"):
        split(base, lora, form="best")


@pytest.mark.parametrize(
    ("fault", "code"),
    [("alpha", "M114"), ("half", "M114"), ("rank", "M114"), ("name", "M114"), ("nan", "M107")],
)
def test_broken_adapters_are_refused(shared: Shared, tmp_path: Path, fault: str, code: str) -> None:
    source = shared(ADAPTED)
    text = (source / "config.yaml").read_text()
    file = torch.load(source / "model@900.pt", weights_only=True)
    state = file["model_state_dict"]
    first = next(k for k in state if ".lora_A." in k)
    if fault == "alpha":
        text = text.replace("lora_alpha: 4", "lora_alpha: many")
    elif fault == "half":
        del state[first]
    elif fault == "rank":
        state[first] = state[first][:-1]
    elif fault == "name":
        state[first.replace("q_proj", "x_proj")] = state.pop(first)
    else:
        state[first][0, 0] = float("nan")
    (tmp_path / "config.yaml").write_text(text)
    torch.save(file, tmp_path / "model@900.pt")
    with pytest.raises(PccError, match=code):
        read_lora(tmp_path)
