"""Whole decoders against plain torch: every architecture, in one pass, in chunks, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import Runner, close, in_passes, next_state, state_of, write_folder
from torch_reference import decoder, decoder_state

from pcc.models.base import Model
from pcc.models.decoder import Decoder
from pcc.models.load import load_model

Values = np.ndarray[Any, Any]
ROWS, V = 24, 37
BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-scaled": {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 10},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-one-key-head": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral-whole": {"model_type": "mistral", "sliding_window": None},
}
FORMS = {
    "float64": (None, False),
    "opset24": (24, False),
    "opset24-fused": (24, True),
    "opset17": (17, False),
}


def made(folder: Path, name: str) -> tuple[Model, dict[str, Any], dict[str, torch.Tensor]]:
    config = BASE | CONFIGS[name]
    state = decoder_state(config, seed=len(name))
    return load_model(write_folder(folder / name, config, state), max_rows=ROWS), config, state


def ids_of(batch: int, count: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).integers(0, V, (batch, count))


def reference(config: Any, state: Any, ids: Values) -> tuple[Values, Values]:
    hidden, logits = decoder(config, state, torch.tensor(ids))
    return hidden.numpy(), logits.numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_is_the_torch_model(name: str, form: str, tmp_path: Path) -> None:
    model, config, state = made(tmp_path, name)
    ids, opset = ids_of(2, 14), FORMS[form]
    hidden, logits = reference(config, state, ids)
    run = Runner(model, ROWS, opset[0], fused=opset[1])
    out = run(ids, np.zeros(2, np.int64), state_of(model, ROWS, 2, fill=5.0))
    close(out["hidden"], hidden)
    close(out["logits"], logits)
    np.testing.assert_array_equal(out["hidden"], out["draft_hidden"])


@pytest.mark.parametrize("form", ["float64", "opset24", "opset17"])
@pytest.mark.parametrize("name", ["llama-scaled", "qwen3", "mistral", "qwen2-window"])
def test_chunks_and_steps_are_one_pass(name: str, form: str, tmp_path: Path) -> None:
    model, config, state = made(tmp_path, name)
    ids, opset = ids_of(2, 13, seed=1), FORMS[form]
    _, logits = reference(config, state, ids)
    run = Runner(model, ROWS, opset[0], fused=opset[1])
    got = in_passes(run, ids, [6, 1, 1, 4, 1], state_of(model, ROWS, 2, fill=5.0))
    close(got["logits"], logits)


@pytest.mark.parametrize("opset", [24, 17])
def test_rollback_is_the_length(opset: int, tmp_path: Path) -> None:
    """Rejected tokens stay in the cache beyond the length; what follows does not see them."""
    model, config, state = made(tmp_path, "llama")
    kept, wrong, after = ids_of(1, 7), ids_of(1, 4, seed=2), ids_of(1, 4, seed=3)
    run = Runner(model, ROWS, opset)
    out = run(kept, np.array([0]), state_of(model, ROWS, 1))
    caches = next_state(run(wrong, np.array([7]), next_state(out)))
    out = run(after, np.array([7]), caches)
    _, logits = reference(config, state, np.concatenate([kept, after], 1))
    close(out["logits"], logits[:, 7:])
    out = run(after, np.array([5]), next_state(out))  # back into what was committed
    _, logits = reference(config, state, np.concatenate([kept[:, :5], after], 1))
    close(out["logits"], logits[:, 5:])


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_of_a_batch_have_their_own_length(name: str, opset: int, tmp_path: Path) -> None:
    model, config, state = made(tmp_path, name)
    run, lengths = Runner(model, ROWS, opset), [3, 9, 0]
    prompts = [ids_of(1, 9, seed=10 + i) for i in range(3)]
    after = ids_of(3, 4, seed=20)
    caches = state_of(model, ROWS, 3, fill=9.0)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if length:
            part = {k: v[row : row + 1] for k, v in caches.items()}
            part = next_state(run(prompt[:, :length], np.array([0]), part))
            for k, v in part.items():
                caches[k][row] = v[0]
    out = run(after, np.array(lengths), caches)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        whole = np.concatenate([prompt[:, :length], after[row : row + 1]], 1)
        _, logits = reference(config, state, whole)
        close(out["logits"][row : row + 1], logits[:, length:])


@pytest.mark.parametrize("opset", [24, 17])
def test_one_graph_serves_every_size_of_buffer(opset: int, tmp_path: Path) -> None:
    model, _, _ = made(tmp_path, "mistral")
    run, ids = Runner(model, ROWS, opset), ids_of(2, 6)
    start, found = np.zeros(2, np.int64), []
    for rows in (ROWS, 11, 6):
        out = run(ids, start, state_of(model, rows, 2))
        assert out["present.key.0"].shape == (2, 2, rows, 6)
        found.append(out["logits"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_the_last_rows_of_the_buffer_can_be_used(tmp_path: Path) -> None:
    model, config, state = made(tmp_path, "llama")
    ids = ids_of(1, ROWS, seed=4)
    got = in_passes(Runner(model, ROWS, 24), ids, [20, 4], state_of(model, ROWS, 1))
    close(got["logits"], reference(config, state, ids)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-scaled", "qwen3", "mistral"])
def test_far_positions(name: str, tmp_path: Path) -> None:
    config, count = BASE | CONFIGS[name], 2000
    state = decoder_state(config, seed=5)
    model = load_model(write_folder(tmp_path, config, state), max_rows=count)
    ids = ids_of(1, count)
    _, logits = reference(config, state, ids)
    got = in_passes(Runner(model, count, 24), ids, [1500, 500], state_of(model, count, 1))
    close(got["logits"], logits)


def test_split_layers_give_the_draft_its_own_features(tmp_path: Path) -> None:
    """Adapted copies of the last layers run on the shared part, with states of their own."""
    from dataclasses import replace

    config = BASE | CONFIGS["llama"]
    state = decoder_state(config, seed=1)
    other = dict(state)
    adapted = decoder_state(config, seed=2)
    other |= {k: v for k, v in adapted.items() if ".layers.1." in k or ".layers.2." in k}
    plain = load_model(write_folder(tmp_path / "a", config, state), max_rows=ROWS)
    second = load_model(write_folder(tmp_path / "b", config, other), max_rows=ROWS)
    assert isinstance(plain, Decoder)
    assert isinstance(second, Decoder)
    both = replace(plain, draft=second.layers[1:])
    assert [s.name for s in both.states(9)][-2:] == ["key.4", "value.4"]
    ids = ids_of(2, 9)
    for opset in (None, 24):
        run = Runner(both, ROWS, opset)
        out = run(ids[:, :5], np.zeros(2, np.int64), state_of(both, ROWS, 2, fill=5.0))
        out = run(ids[:, 5:], np.full(2, 5), next_state(out))
        hidden, logits = reference(config, state, ids)
        close(out["hidden"], hidden[:, 5:])
        close(out["logits"], logits[:, 5:])
        close(out["draft_hidden"], reference(config, other, ids)[0][:, 5:])


@pytest.mark.parametrize("fault", ["positions", "window", "head norm", "scale", "groups"])
def test_a_fault_in_the_model_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above notices what is easily done wrong."""
    from pcc.models import decoder as module
    from pcc.tensor import nn
    from pcc.tensor import ops as t

    name = {"window": "mistral", "head norm": "qwen3"}.get(fault, "llama")
    model, config, state = made(tmp_path, name)
    attention, rms = nn.CachedAttention, nn.RmsNorm

    def attend(q: Any, k: Any, v: Any, start: Any, scale: float, window: int) -> Any:
        if fault == "groups":
            heads = tuple(range(q.type.shape[0]))
            q = t.Take(q, 0, (*heads[::2], *heads[1::2]))
        change = {"scale": (scale * 1.01, window), "window": (scale, window + 1)}
        return attention(q, k, v, start, *change.get(fault, (scale, window)))

    def norm(x: Any, w: Any, eps: float) -> Any:
        return x if len(x.type.shape) == 3 and fault == "head norm" else rms(x, w, eps)

    def positions(start: Any, count: int) -> Any:
        steps = np.zeros(count, np.int64) if fault == "positions" else np.arange(count)
        return t.Add(t.Reshape(start, (1,)), t.Const(steps))

    monkeypatch.setattr(module.nn, "CachedAttention", attend)
    monkeypatch.setattr(module.nn, "RmsNorm", norm)
    monkeypatch.setattr(module, "positions_of", positions)
    ids = ids_of(1, 12)
    out = Runner(model, ROWS)(ids, np.zeros(1, np.int64), state_of(model, ROWS, 1))
    with pytest.raises(AssertionError):
        close(out["logits"], reference(config, state, ids)[1])


@pytest.mark.parametrize("opset", [24, 17])
def test_caches_are_written_in_place(opset: int, tmp_path: Path, capfd: Any) -> None:
    """Each cache output is the node that writes it; bound to one buffer, nothing is copied."""
    import onnxruntime as ort

    model, config, state = made(tmp_path, "llama")
    run, ids = Runner(model, ROWS, opset), ids_of(1, 6)
    run(ids, np.zeros(1, np.int64), state_of(model, ROWS, 1))
    _, session = run.made[6]
    writer = {24: "TensorScatter", 17: "ScatterND"}[opset]
    for node in run.graphs[6].graph:
        for out in node.outputs:
            if str(out.name).startswith("present."):
                assert node.op_type == writer
                assert str(node.inputs[0].name) == f"past.{str(out.name).removeprefix('present.')}"
    io = session.io_binding()
    io.bind_cpu_input("ids", ids)
    io.bind_cpu_input("length", np.zeros(1, np.int64))
    buffers = {}
    for name, value in state_of(model, ROWS, 1, fill=3.0).items():
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(value)
        io.bind_ortvalue_input(f"past.{name}", buffers[name])
        io.bind_ortvalue_output(f"present.{name}", buffers[name])
    io.bind_output("logits")
    before = capfd.readouterr().err  # the first run, unbound, had to copy, and said so
    session.run_with_iobinding(io)
    close(io.get_outputs()[-1].numpy(), reference(config, state, ids)[1])
    assert opset == 17 or "copying past_cache" in before
    assert "copying" not in capfd.readouterr().err
