"""Tiny verifiers whose greedy text does not repeat, and heads that are right some of the time.

Token v has a random code; the output matrix of slot i reads the code's (i+1)-th successor under a
permutation with one cycle, so an almost bare residual stream predicts v -> f(v) -> f(f(v)) ..;
layers of random weights disturb that, so that drafts are rejected at every position now and then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.frontends import templates

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Size:
    """Features, heads of queries, layers, inner features, and how much the layers disturb."""

    width: int = 48
    heads: int = 4
    layers: int = 2
    inner: int = 64
    noise: float = 0.25


TINY = Size()
WIDE = Size(256, 2, 2, 320, 0.6)  # heads of 128 numbers and whole tiles: what real models have
WIDTH, HEADS, LAYERS, INNER = TINY.width, TINY.heads, TINY.layers, TINY.inner


def settings(vocab: int, size: Size = TINY, **config: Any) -> dict[str, Any]:
    """config.json of a Llama; entries of `config` replace or add to it."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": size.width,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": max(1, size.heads // 2), "intermediate_size": size.inner,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 256,
        "eos_token_id": None, "hidden_act": "silu", "byte_offset": 0, **config,
    }  # fmt: skip


def decoder_tensors(
    vocab: int, noise: float, seed: int, shared: int = 0, size: Size = TINY
) -> dict[str, Values]:
    """Weights of a Llama with `shared` heads of keys; `noise` scales what its layers add."""
    rng = np.random.default_rng(seed)
    wide, inner = size.width, size.inner
    keys = wide // size.heads * (shared or max(1, size.heads // 2))
    t = {"model.embed_tokens.weight": codes(vocab, seed, size), "model.norm.weight": np.ones(wide)}
    t["lm_head.weight"] = outputs(vocab, seed, 1, size)[0]
    for i in range(size.layers):
        at = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (wide, wide)), ("self_attn.k_proj", (keys, wide)),
            ("self_attn.v_proj", (keys, wide)), ("self_attn.o_proj", (wide, wide)),
            ("mlp.gate_proj", (inner, wide)), ("mlp.up_proj", (inner, wide)),
            ("mlp.down_proj", (wide, inner)),
        ):  # fmt: skip
            scale = noise if name.endswith(("o_proj", "down_proj")) else 1.0
            t[f"{at}{name}.weight"] = rng.normal(size=shape) * scale / np.sqrt(shape[1]) * 2
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[f"{at}{name}.weight"] = np.ones(wide)
    return t


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Values]) -> Path:
    """Write config.json and model.safetensors."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path / "model.safetensors")
    return path


def llama_folder(
    path: Path,
    *,
    vocab: int = 258,
    noise: float = 0.25,
    seed: int = 0,
    size: Size = TINY,
    **config: Any,
) -> Path:
    """Write a Llama folder (config.json, model.safetensors) and return it."""
    tensors = decoder_tensors(vocab, noise, seed, size=size)
    return write_folder(path, settings(vocab, size, **config), tensors)


def codes(vocab: int, seed: int, size: Size = TINY) -> Values:
    """One code for each token, `[V, D]`."""
    return np.random.default_rng([seed, 1]).normal(size=(vocab, size.width))


def outputs(vocab: int, seed: int, n: int, size: Size = TINY) -> Values:
    """Output matrices `[n, V, D]`: row f^i(v) of slot i reads the code of v."""
    cycle = np.random.default_rng([seed, 2]).permutation(vocab)
    code, out = codes(vocab, seed, size), np.empty((n, vocab, size.width))
    for i in range(n):
        out[i, cycle[(np.arange(vocab) + i + 1) % vocab]] = code[cycle] / np.sqrt(size.width)
    return out


def head(
    kind: str,
    n: int,
    r: int,
    *,
    vocab: int = 258,
    noise: float = 0.15,
    seed: int = 0,
    size: Size = TINY,
) -> Any:
    """A contextual circuit of a template, over features of width D."""
    rng = np.random.default_rng([seed, 3])
    made = getattr(templates, kind)(
        *((n, vocab) if kind == "ff" else (n, r, vocab)), context=size.width, seed=seed
    )
    shapes = {name: node.type.shape for name, node, _ in made.logits}
    base = outputs(vocab, seed, n, size)[:, None] * 2
    wide = base + noise * rng.normal(size=(*shapes["emission_logits"], size.width)) / 3
    layers = sorted(int(k.split(".")[1]) for k in shapes if k.startswith("sum"))
    sums = [rng.normal(size=(*shapes[f"sum_logits.{k}"], size.width)) / 3 for k in layers]
    args = (n, vocab) if kind == "ff" else (n, r, vocab)
    weights = {"emissions": wide, "sums": sums}
    return getattr(templates, kind)(*args, context=size.width, weights=weights)
