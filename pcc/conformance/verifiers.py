"""A tiny verifier and head of every kind: text that does not repeat, drafts that end anywhere.

All share the plan of `pcc.conformance.models`: an almost bare residual stream walks along one long
cycle, layers disturb it, and the head knows the cycle but not what the layers add. Each function
writes a model folder below `path` and returns what is compiled with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcc.conformance import models
from pcc.conformance.models import HEADS, LAYERS, TINY, WIDTH, Size, Values

# A source of `pcc.compile` (None: the verifier's own heads), and a model folder.
Pair = tuple[Any, Path]
LORA_RANK = 3
WINDOW, CHUNK = 64, 16  # of the tiny EvaByte
SUBWORD = 3  # ids of the longest n-gram


def llama(path: Path, kind: str = "hmm", n: int = 4, r: int = 3, size: Size = TINY) -> Pair:
    """A Llama; the head is a hidden Markov model."""
    folder = models.llama_folder(path / "model", noise=size.noise, size=size)
    return models.head(kind, n, r, size=size), folder


def byte_llama(path: Path, kind: str = "btree", n: int = 8, r: int = 3) -> Pair:
    """A byte-Llama whose n-grams lie along the cycle and beside it; the head is a tree."""
    vocab, rng = 268, np.random.default_rng(7)
    cycle = np.random.default_rng([0, 2]).permutation(vocab)
    words: dict[str, int] = {}
    for at in range(0, vocab, 2):
        for length in range(1, SUBWORD + 1):
            newest_first = [int(cycle[(at - k) % vocab]) + 1 for k in range(length)]
            words[",".join(map(str, newest_first))] = len(words) + 1
    for _ in range(200):
        pair = ",".join(str(int(x) + 1) for x in rng.integers(0, vocab, 2))
        words.setdefault(pair, len(words) + 1)
    config = models.settings(
        vocab, model_type="tpu_llama", expand_input_ids=True, expand_input_ids_maxlen=SUBWORD,
        expand_input_ids_vocab_size=len(words), expand_input_ids_dict=[words, [int(cycle[0]) + 1]],
    )  # fmt: skip
    tensors = models.decoder_tensors(vocab, 0.12, 0)
    tensors["model.expand_embed_tokens.weight"] = rng.normal(size=(len(words), WIDTH)) * 0.5
    folder = models.write_folder(path / "model", config, tensors)
    return models.head(kind, n, r, vocab=vocab), folder


def evabyte(path: Path, kind: str = "", n: int = 4, r: int = 3, size: Size = TINY) -> Pair:
    """An EvaByte that drafts with its own heads, if no kind is named; texts cross its windows."""
    vocab, rng = 320, np.random.default_rng(8)
    config = models.settings(
        vocab, size, model_type="evabyte", num_key_value_heads=size.heads, window_size=WINDOW,
        chunk_size=CHUNK, num_pred_heads=4, bos_token_id=1, byte_offset=None,
    )  # fmt: skip
    tensors = models.decoder_tensors(vocab, size.noise, 0, size.heads, size)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name] - 1.0  # scales are stored without their unit
    noisy = models.outputs(vocab, 0, 4, size)
    noisy[1:] += rng.normal(size=noisy[1:].shape) * 0.05
    tensors["lm_head.weight"] = noisy.reshape(-1, size.width)
    for i in range(size.layers):
        for name in ("adaptive_mu_k", "adaptive_phi"):
            shape = (1, size.heads, 1, 1, size.width // size.heads)
            tensors[f"model.layers.{i}.self_attn.{name}"] = rng.normal(size=shape)
    folder = models.write_folder(path / "model", config, tensors)
    return (models.head(kind, n, r, vocab=vocab, size=size) if kind else None), folder


def gpt(path: Path, kind: str = "cp", n: int = 4, r: int = 3) -> Pair:
    """The GPT of the smoke test, in a checkpoint; the head is a mixture of products."""
    vocab, rng = 258, np.random.default_rng(9)
    body = "lm._lm.encoder.transformer"
    state = {f"{body}.wte.weight": models.codes(vocab, 0)}
    state["lm._lm.head.lm_head.weight"] = models.outputs(vocab, 0, 1)[0]
    for i in range(LAYERS):
        for name, rows, columns, scale in (
            ("attn.c_q", 1, 1, 1.0), ("attn.c_k", 1, 1, 1.0), ("attn.c_v", 1, 1, 1.0),
            ("attn.c_proj", 1, 1, 1.5), ("mlp.c_fc", 4, 1, 1.0), ("mlp.c_proj", 1, 4, 0.7),
        ):  # fmt: skip
            shape = (rows * WIDTH, columns * WIDTH)
            value = rng.normal(size=shape) * scale / np.sqrt(shape[1])
            state[f"{body}.h.{i}.{name}.weight"] = value
    folder = checkpoint(
        path / "model", state, f"{{name: nanogpt, n_embd: {WIDTH}, n_head: {HEADS}, "
        f"num_layers: {LAYERS}}}", vocab, ("cp", 4, 3),
    )  # fmt: skip
    return models.head(kind, n, r), folder


def lora(path: Path) -> Pair:
    """A Llama whose last layer is adapted for the draft; head and adapters are a checkpoint."""
    vocab, n, r, rng = 258, 4, 3, np.random.default_rng(10)
    folder = models.llama_folder(path / "model", noise=0.25)
    state = {
        "mt_head._categorical_log_probs_heads.0.head.proj": (
            models.outputs(vocab, 0, n)[:, None] * 2 + rng.normal(size=(n, r, vocab, WIDTH)) * 0.05
        ),
        "mt_head._sum_weights_heads.0.head.proj": rng.normal(size=(1, 1, r, WIDTH)) / 3,
        "circuit._circuit._nodes.0._scope_idx": np.arange(n)[:, None],
        "circuit._circuit._address_book._in_fold_idx_3_0": np.zeros(1),
    }
    at = f"lm._lm.base_model.model.model.layers.{LAYERS - 1}"
    for part, rows, columns in (
        ("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.o_proj", WIDTH, WIDTH),
        ("mlp.up_proj", models.INNER, WIDTH), ("mlp.down_proj", WIDTH, models.INNER),
    ):  # fmt: skip
        for half, shape in (("A", (LORA_RANK, columns)), ("B", (rows, LORA_RANK))):
            state[f"{at}.{part}.lora_{half}.default.weight"] = rng.normal(size=shape) * 0.12
    source = checkpoint(
        path / "head", state, f"{{n_embd: {WIDTH}}}", vocab, ("cp", n, r),
        f"{{hyperparameters: {{lora_alpha: {LORA_RANK}}}}}",
    )  # fmt: skip
    return source, folder


def checkpoint(
    folder: Path, state: dict[str, Values], lm: str, vocab: int, circuit: tuple[str, int, int],
    adaptor: str = "{}",
) -> Path:  # fmt: skip
    """Write a folder as the published code does: config.yaml, model@1.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    kind, n, r = circuit
    (folder / "config.yaml").write_text(
        f"circuit: {{name: {kind}, n_token: {n}, n_component: {r}, n_repetition: 1}}\n"
        f"data: {{vocab_size: {vocab}}}\nlm: {lm}\nadaptor: {adaptor}\n"
        f"mt_head: {{hyperparameters: {{n_embd: {WIDTH}, transformer_n_layer: 0}}}}\n"
    )
    tensors = {
        k: np.ascontiguousarray(v, np.int64 if "_idx" in k else np.float32)
        for k, v in state.items()
    }
    save_file(tensors, folder / "model@1.safetensors")
    return folder


KINDS: dict[str, Callable[..., Pair]] = {
    "llama": llama, "byte-llama": byte_llama, "evabyte": evabyte, "gpt": gpt, "lora": lora,
}  # fmt: skip
