"""Model folders: formats that give the same weights, and folders that must be refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import Runner, close, module_of, state_of, write_folder
from safetensors.torch import load_file, save_file
from torch_reference import decoder, decoder_state

from pcc.backends.onnx.lower import lower
from pcc.backends.onnx.weights import save_models
from pcc.errors import PccError
from pcc.frontends.coded import encode
from pcc.models import tensors
from pcc.models.base import Model
from pcc.models.config import read_config, tables
from pcc.models.load import load_model
from pcc.models.matrix import Matrix

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
CODED = 5


def folder_of(path: Path, shards: int = 1, **changes: Any) -> Path:
    return write_folder(path / "model", CONFIG | changes, decoder_state(CONFIG, 0), shards)


def agrees(model: Model, state: dict[str, torch.Tensor]) -> None:
    """Compare the logits with those of plain torch on these weights."""
    ids = np.random.default_rng(0).integers(0, 300, (1, 6))
    out = Runner(model, 9, 24)(ids, np.zeros(1, np.int64), state_of(model, 9, 1))
    close(out["logits"], decoder(CONFIG, state, torch.tensor(ids))[1].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_format_gives_its_numbers(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    state = {k: v.to(dtype) for k, v in decoder_state(CONFIG, 0).items()}
    model = load_model(write_folder(tmp_path / "m", CONFIG, state, shards), max_rows=9)
    agrees(model, {k: v.float() for k, v in state.items()})


def rows_of(bits: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a state with matrices as integers of `bits`, and what it stands for.

    Those of 7, 6, 4 and 2 bits are packed, those of 5 are coded.

    Packing here is arithmetic on one big number per row, unlike the code under test.
    """
    stored, wide = {}, {}
    rng = np.random.default_rng(bits)
    for key, value in decoder_state(CONFIG, 0).items():
        if value.ndim < 2:
            stored[key] = wide[key] = value
            continue
        top = 2 ** (bits - 1)
        q = rng.integers(1 - top, top, value.shape)
        scale = torch.tensor(rng.uniform(0.01, 0.02, len(q)) / top, dtype=torch.float16)
        wide[key] = torch.tensor(q) * scale.float()[:, None]
        stored[key + ".scale"] = scale
        stored[key] = torch.tensor(q.astype(np.int8))
        if bits == CODED:
            coded, streams = encode(q.astype(np.int8))
            stored[key], stored[key + ".streams"] = torch.tensor(coded), torch.tensor(streams)
        elif bits < 8:
            size = q.shape[1] * bits // 8
            numbers = [sum((int(v) + top) << bits * i for i, v in enumerate(r[::-1])) for r in q]
            raw = np.array([list(v.to_bytes(size, "big")) for v in numbers], np.uint8)
            stored[key] = torch.from_numpy(raw)
            stored[key + ".bits"] = torch.tensor(bits, dtype=torch.uint8)
    return stored, wide


@pytest.mark.parametrize("bits", [8, 7, 6, CODED, 4, 2])
def test_rows_of_integers(bits: int, tmp_path: Path) -> None:
    stored, wide = rows_of(bits)
    model = load_model(write_folder(tmp_path / "m", CONFIG, stored, 2), max_rows=9)
    agrees(model, wide)


BITS, SCALE, STREAMS = UP + ".bits", UP + ".scale", UP + ".streams"


@pytest.mark.parametrize(
    ("bits", "key", "value", "code"),
    [
        (8, SCALE, None, "M105"),
        (8, SCALE, torch.ones(23), "F113"),
        (8, SCALE, torch.ones(24, dtype=torch.int32), "F113"),
        (8, SCALE, torch.full((24,), float("nan")), "M107"),
        (7, BITS, None, "M105"),
        (7, BITS, torch.tensor(0, dtype=torch.uint8), "M105"),
        (7, BITS, torch.tensor(8, dtype=torch.uint8), "M105"),
        (7, BITS, torch.tensor([7, 7], dtype=torch.uint8), "M105"),
        (7, BITS, torch.tensor(7.0), "M105"),
        (7, STREAMS, torch.ones(4, dtype=torch.int32), "F113"),
        (8, STREAMS, torch.ones(4, dtype=torch.int32), "M106"),
        (8, BITS, torch.tensor(7, dtype=torch.uint8), "M106"),
        (CODED, BITS, torch.tensor(7, dtype=torch.uint8), "M106"),
        (CODED, SCALE, None, "M105"),
        (CODED, SCALE, torch.ones(23), "M105"),
        (CODED, SCALE, torch.ones(24, dtype=torch.int32), "F113"),
        (CODED, STREAMS, None, "M105"),
        (CODED, STREAMS, torch.ones(4), "F113"),
        (CODED, STREAMS, torch.tensor([16, 1, 4096, 9], dtype=torch.int32), "F113"),
        (CODED, UP, torch.zeros(300, dtype=torch.uint8), "F113"),
    ],
)
def test_broken_rows_are_refused(
    bits: int, key: str, value: torch.Tensor | None, code: str, tmp_path: Path
) -> None:
    stored, _ = rows_of(bits)
    stored.pop(key, None)
    if value is not None:
        stored[key] = value
    folder = write_folder(tmp_path / "m", CONFIG, stored)
    with pytest.raises(PccError) as caught:
        load_model(folder, max_rows=9)
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize("lazy", [False, True])
def test_a_damaged_stream_is_refused(
    lazy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "LAZY_ELEMENTS", 0 if lazy else 1 << 18)
    stored, wide = rows_of(CODED)

    def read() -> np.ndarray[Any, Any]:
        found = tensors.Tensors(write_folder(tmp_path / "m", CONFIG, stored)).matrix(UP, 24, 16)
        assert isinstance(found, Matrix) is lazy
        return found.rows(3, 20) if isinstance(found, Matrix) else found[3:20]

    np.testing.assert_array_equal(read(), wide[UP].numpy()[3:20])
    stored[UP][len(stored[UP]) // 2] ^= 1
    with pytest.raises(PccError, match=r"F104"):
        read()


def test_equal_weights_are_one_array(tmp_path: Path) -> None:
    """Two loads, and graphs over 1 and 4 tokens, hold each matrix once."""
    one, two = (load_model(folder_of(tmp_path), max_rows=9) for _ in range(2))
    assert one.layers[0].qkv is two.layers[0].qkv  # type: ignore[attr-defined]
    models = {}
    for count in (1, 4):
        module, inputs = module_of(one, count, 9)
        models[f"n{count}"] = lower(module, inputs=inputs)
    arrays: dict[str, set[int]] = {"n1": set(), "n4": set()}
    for name, made in models.items():
        for value in made.graph.initializers.values():
            array = value.const_value.numpy()  # type: ignore[union-attr]
            if array.nbytes >= 1024:
                arrays[name].add(array.__array_interface__["data"][0])
    assert arrays["n1"] == arrays["n4"]
    assert len(arrays["n1"]) == 2 + 4 * CONFIG["num_hidden_layers"]
    save_models(models, tmp_path)
    trained = sum(v.numel() for v in decoder_state(CONFIG, 0).values()) * 4
    assert trained <= (tmp_path / "weights.bin").stat().st_size + 4096 <= trained + 8192


def test_special_ids(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, bos_token_id=256, eos_token_id=[257, 999], byte_offset=None)
    vocabulary = load_model(folder, max_rows=4).vocabulary
    assert (vocabulary.byte_offset, vocabulary.bos, vocabulary.eos) == (0, 256, (257,))
    assert vocabulary.special == tuple(range(256, 300))
    (folder / "generation_config.json").write_text('{"eos_token_id": 258, "pad_token_id": 3}')
    vocabulary = load_model(folder, max_rows=4).vocabulary
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (256, (258,), 3)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"byte_offset": 40}))
    vocabulary = load_model(folder, max_rows=4).vocabulary
    assert vocabulary.byte_offset == 40
    assert vocabulary.special == (*range(40), *range(296, 300))


def test_a_vocabulary_of_words_has_no_bytes(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 700}
    folder = write_folder(tmp_path, config, decoder_state(config, 0))
    added = {"698": {}, "x": 1, "9" * 5000: 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    vocabulary = load_model(folder, max_rows=4).vocabulary
    assert (vocabulary.byte_offset, vocabulary.special) == (None, (698,))


SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model type": ({"model_type": "mamba"}, "M108"),
    "no model type": ({"model_type": None}, "M108"),
    "wrong hidden size": ({"hidden_size": 24}, "M105"),
    "wrong inner size": ({"intermediate_size": 25}, "M105"),
    "wrong vocabulary": ({"vocab_size": 301}, "M105"),
    "too many layers": ({"num_hidden_layers": 3}, "M104"),
    "too few layers": ({"num_hidden_layers": 1}, "M106"),
    "bias missing": ({"attention_bias": True}, "M104"),
    "own head where tied": ({"tie_word_embeddings": True}, "M109"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "M108"),
    "width that does not divide": ({"hidden_size": 18}, "M108"),
    "no heads": ({"num_attention_heads": 0}, "M108"),
    "negative size": ({"intermediate_size": -4}, "M108"),
    "boolean size": ({"num_hidden_layers": True}, "M108"),
    "size as text": ({"hidden_size": "16"}, "M108"),
    "absurd size": ({"hidden_size": 10**12}, "M108"),
    "eps not finite": ({"rms_norm_eps": float("nan")}, "M108"),
    "unknown activation": ({"hidden_act": "quick_gelu"}, "M108"),
    "flag as number": ({"mlp_bias": 1}, "M108"),
    "dynamic scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "M110"),
    "yarn scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "M110"),
    "scaling of no kind": ({"rope_scaling": [2]}, "M108"),
    "scaling without factor": ({"rope_scaling": {"rope_type": "linear"}}, "M108"),
    "scaling by zero": ({"rope_scaling": SCALED | {"factor": 0}}, "M108"),
    "linear scaling by zero": ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "M108"),
    "theta zero": ({"rope_theta": 0}, "M108"),
    "absurd head width": ({"head_dim": 1 << 24}, "M105"),
    "empty band": ({"rope_scaling": SCALED | {"high_freq_factor": 1.0}}, "M108"),
    "one coordinate turned": ({"partial_rotary_factor": 0.3}, "M108"),
    "id as text": ({"eos_token_id": "</s>"}, "M108"),
    "bytes beyond the ids": ({"byte_offset": 60}, "M108"),
    "window as text": ({"model_type": "mistral", "sliding_window": "4k"}, "M108"),
    "layer kinds": (
        {"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"]},
        "M108",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    changes, code = REFUSED[name]
    with pytest.raises(PccError) as caught:
        load_model(folder_of(tmp_path, **changes), max_rows=4)
    assert caught.value.code == code, caught.value
    assert str(tmp_path) in str(caught.value)


def shard(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def repeat_tensor(folder: Path) -> None:
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(load_file(shard(folder)) | {k: first[k] for k in list(first)[:1]}, shard(folder))


def relist(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data)
    (folder / INDEX).write_text(json.dumps(data))


def damaged(folder: Path, name: str) -> None:
    state = load_file(folder / "model-00001-of-00002.safetensors")
    key = next(iter(state))
    match name:
        case "missing shard":
            shard(folder).unlink()
        case "missing tensor":
            del state[key]
        case "extra tensor":
            state["model.layers.0.extra"] = torch.zeros(2)
        case "NaN":
            state[key].view(-1)[3] = torch.nan
        case "infinity":
            state[key].view(-1)[3] = torch.inf
        case "beyond float32":
            state[key] = torch.full(state[key].shape, 1e300, dtype=torch.float64)
        case "integers":
            state[key] = torch.zeros(state[key].shape, dtype=torch.int8)
    if name in ("missing tensor", "extra tensor", "NaN", "infinity", "beyond float32", "integers"):
        save_file(state, folder / "model-00001-of-00002.safetensors")
    match name:
        case "tensor in two shards":
            repeat_tensor(folder)
        case "truncated shard":
            data = shard(folder).read_bytes()
            shard(folder).write_bytes(data[:-8])
        case "absurd header":
            shard(folder).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
        case "index outside":
            relist(folder, lambda d: d["weight_map"].update({UP: "../other.safetensors"}))
        case "index absolute":
            relist(folder, lambda d: d["weight_map"].update({UP: "/etc/passwd"}))
        case "index of numbers":
            relist(folder, lambda d: d["weight_map"].update({UP: 3}))
        case "index empty":
            relist(folder, lambda d: d.update(weight_map={}))
        case "index deep":
            (folder / INDEX).write_text("[" * 100_000)
        case "config is a list":
            (folder / "config.json").write_text("[]")
        case "config is cut":
            (folder / "config.json").write_text('{"model_type": "lla')
        case "no config":
            (folder / "config.json").unlink()


DAMAGES = {
    "missing shard": "M103",
    "missing tensor": "M104",
    "extra tensor": "M106",
    "NaN": "M107",
    "infinity": "M107",
    "beyond float32": "M107",
    "integers": "M105",
    "tensor in two shards": "M106",
    "truncated shard": "F104",
    "absurd header": "F104",
    "index outside": "M102",
    "index absolute": "M102",
    "index of numbers": "M102",
    "index empty": "M102",
    "index deep": "M102",
    "config is a list": "M102",
    "config is cut": "M102",
    "no config": "M101",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, shards=2)
    damaged(folder, name)
    with pytest.raises(PccError) as caught:
        load_model(folder, max_rows=4)
    assert caught.value.code == DAMAGES[name], caught.value


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PccError, match="M101"):
        load_model(tmp_path / "nothing", max_rows=4)
    with pytest.raises(PccError, match="M111"):
        load_model(folder_of(tmp_path), max_rows=0)
    (tmp_path / "model" / WEIGHTS).unlink()
    with pytest.raises(PccError, match="M103"):
        load_model(tmp_path / "model", max_rows=4)


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert load_model(folder, max_rows=4).vocab == 300


def test_tables_do_not_depend_on_the_number_of_rows(tmp_path: Path) -> None:
    config = read_config(folder_of(tmp_path, rope_scaling=SCALED))
    short, long = tables(config, 8, 5), tables(config, 8, 50)
    for a, b in zip(short, long, strict=True):
        assert a.shape == (5, 4)
        assert np.array_equal(a, b[:5])
