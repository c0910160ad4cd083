"""The GPT of the published smoke test: its checkpoint, and plain torch on weights that matter.

The published checkpoint has output projections of zero, as at the start of training, so its numbers
say nothing about attention and MLP: those are compared on random weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import Runner, close, in_passes, next_state, state_of
from torch.nn import functional

from pcc.errors import PccError
from pcc.models.gpt import Gpt
from pcc.models.load import load_model

Values = np.ndarray[Any, Any]
FOLDER = "oracle/checkpoints/nanogpt-tiny-cp-n-4-r-4"
BODY = "lm._lm.encoder.transformer"
ROWS, WIDTH, HEADS, LAYERS, V = 30, 24, 3, 2, 41
CONFIG = f"""
lm: {{name: nanogpt, n_embd: {WIDTH}, n_head: {HEADS}, num_layers: {LAYERS}}}
data: {{vocab_size: {V}}}
"""


def torch_gpt(state: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[Values, Values]:
    """Return features and logits, from the published equations, a whole sequence at once."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:])

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        inv = 1.0 / (10000 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
        angle = torch.outer(torch.arange(x.shape[1]).float(), inv)
        cos, sin = (f.bfloat16()[None, :, None] for f in (angle.cos(), angle.sin()))
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1).float()

    batch, count = ids.shape
    x = norm(state[f"{BODY}.wte.weight"][ids])
    for i in range(LAYERS):
        w = {k.split(".", 6)[6]: v for k, v in state.items() if k.startswith(f"{BODY}.h.{i}.")}
        h = norm(x)
        q, k, v = ((h @ w[f"attn.c_{c}.weight"].T).view(batch, count, HEADS, -1) for c in "qkv")
        q, k = turn(norm(q)), turn(norm(k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(batch, count, -1) @ w["attn.c_proj.weight"].T
        x = x + functional.relu(norm(x) @ w["mlp.c_fc.weight"].T) ** 2 @ w["mlp.c_proj.weight"].T
    hidden = norm(x)
    return hidden.numpy(), (hidden @ state["lm._lm.head.lm_head.weight"].T).numpy()


def random_state() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    square = dict.fromkeys(["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj"], (WIDTH, WIDTH))
    parts = square | {"mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
    shapes = {f"{BODY}.h.{i}.{k}.weight": s for i in range(LAYERS) for k, s in parts.items()}
    shapes |= {f"{BODY}.wte.weight": (V, WIDTH), "lm._lm.head.lm_head.weight": (V, WIDTH)}
    return {k: torch.randn(s, generator=make) * s[1] ** -0.5 for k, s in shapes.items()}


def written(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    torch.save({"model_state_dict": state}, folder / "model@1.pt")
    return folder


@pytest.mark.parametrize("opset", [None, 24, 17])
def test_random_weights_through_passes_of_any_width(opset: int | None, tmp_path: Path) -> None:
    state = random_state()
    model = load_model(written(tmp_path, state), max_rows=ROWS)
    assert (model.vocab, model.width, model.vocabulary.byte_offset) == (V, WIDTH, None)
    ids = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))
    hidden, logits = torch_gpt(state, ids)
    caches = state_of(model, ROWS, 2, fill=4.0)
    out = in_passes(Runner(model, ROWS, opset), ids.numpy(), (5, 1, 4, 1), caches)
    close(out["hidden"], hidden)
    close(out["logits"], logits)


def test_the_published_checkpoint(shared: Callable[[str], Path]) -> None:
    folder = shared(FOLDER)
    model = load_model(folder, max_rows=120)
    assert isinstance(model, Gpt)
    known = np.load(folder / "expected_first_round.npz")
    prompt = known["prompt"][None].astype(np.int64)
    for opset in (None, 24):
        run = Runner(model, 120, opset)
        out = run(prompt, np.zeros(1, np.int64), state_of(model, 120, 1))
        close(out["hidden"][0], known["base_hidden_f32"])
        close(out["logits"][0], known["base_logits_f32"])


def test_the_published_greedy_text(shared: Callable[[str], Path]) -> None:
    folder = shared(FOLDER)
    model = load_model(folder, max_rows=120)
    expected = json.loads((folder / "expected.json").read_text())
    prompt, want = expected["prompt"], expected["ar_greedy_f32_tokens"]
    run = Runner(model, 120, 24)
    out = run(np.array([prompt]), np.zeros(1, np.int64), state_of(model, 120, 1))
    got, length = [int(out["logits"][0, -1].argmax())], len(prompt)
    while len(got) < len(want):
        out = run(np.array([[got[-1]]]), np.array([length]), next_state(out))
        got.append(int(out["logits"][0, -1].argmax()))
        length += 1
    assert got == want


def broken(state: dict[str, torch.Tensor], fault: str) -> None:
    name = f"{BODY}.h.1.mlp.c_fc.weight"
    match fault:
        case "M104":
            del state[name]
        case "M105":
            state[name] = state[name].T.contiguous()
        case "M106":
            state[f"{BODY}.h.2.mlp.c_fc.weight"] = state[name].clone()
        case "M107":
            state[name][0, 0] = torch.nan


@pytest.mark.parametrize("fault", ["M104", "M105", "M106", "M107"])
def test_broken_checkpoints_are_refused(fault: str, tmp_path: Path) -> None:
    state = random_state()
    broken(state, fault)
    with pytest.raises(PccError) as caught:
        load_model(written(tmp_path, state), max_rows=ROWS)
    assert caught.value.code == fault


@pytest.mark.parametrize("text", ["n_embd: 25", "n_head: 0", "n_head: many", "num_layers: -1"])
def test_impossible_sizes_are_refused(text: str, tmp_path: Path) -> None:
    folder = written(tmp_path, random_state())
    key = text.split(":")[0]
    old = {"n_embd": WIDTH, "n_head": HEADS, "num_layers": LAYERS}[key]
    (folder / "config.yaml").write_text(CONFIG.replace(f"{key}: {old}", text))
    with pytest.raises(PccError) as caught:
        load_model(folder, max_rows=ROWS)
    assert caught.value.code == "M108"


def test_a_checkpoint_of_another_kind_is_no_model_folder(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared("oracle/checkpoints/llama-tiny-hmm-n-4-r-4")
    shutil.copy(source / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(PccError) as caught:
        load_model(tmp_path, max_rows=ROWS)
    assert caught.value.code == "M101"
