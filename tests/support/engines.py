"""Tiny verifiers whose greedy text does not repeat, and heads that are right some of the time.

Token v has a random code; the output matrix of slot i reads the code's (i+1)-th successor under a
permutation with one cycle, so an almost bare residual stream predicts v -> f(v) -> f(f(v)) ..;
layers of random weights disturb that, so that drafts are rejected at every position now and then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import pcc
from pcc.frontends import templates

WIDTH, HEADS, LAYERS, INNER = 48, 4, 2, 64
Values = np.ndarray[Any, Any]


def settings(vocab: int, **config: Any) -> dict[str, Any]:
    """config.json of a Llama; entries of `config` replace or add to it."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "intermediate_size": INNER, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 256,
        "eos_token_id": None, "hidden_act": "silu", "byte_offset": 0, **config,
    }  # fmt: skip


def decoder_tensors(vocab: int, noise: float, seed: int, shared: int = 2) -> dict[str, Values]:
    """Weights of a Llama with `shared` heads of keys; `noise` scales what its layers add."""
    rng = np.random.default_rng(seed)
    keys = WIDTH // HEADS * shared
    t = {"model.embed_tokens.weight": codes(vocab, seed), "model.norm.weight": np.ones(WIDTH)}
    t["lm_head.weight"] = outputs(vocab, seed, 1)[0]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (WIDTH, WIDTH)), ("self_attn.k_proj", (keys, WIDTH)),
            ("self_attn.v_proj", (keys, WIDTH)), ("self_attn.o_proj", (WIDTH, WIDTH)),
            ("mlp.gate_proj", (INNER, WIDTH)), ("mlp.up_proj", (INNER, WIDTH)),
            ("mlp.down_proj", (WIDTH, INNER)),
        ):  # fmt: skip
            scale = noise if name.endswith(("o_proj", "down_proj")) else 1.0
            t[f"{at}{name}.weight"] = rng.normal(size=shape) * scale / np.sqrt(shape[1]) * 2
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[f"{at}{name}.weight"] = np.ones(WIDTH)
    return t


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Values]) -> Path:
    """Write config.json and model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path / "model.safetensors")
    return path


def llama_folder(
    path: Path, *, vocab: int = 258, noise: float = 0.25, seed: int = 0, **config: Any
) -> Path:
    """Write a Llama folder (config.json, model.safetensors) and return it."""
    return write_folder(path, settings(vocab, **config), decoder_tensors(vocab, noise, seed))


def codes(vocab: int, seed: int) -> Values:
    """One code for each token, `[V, D]`."""
    return np.random.default_rng([seed, 1]).normal(size=(vocab, WIDTH))


def outputs(vocab: int, seed: int, n: int) -> Values:
    """Output matrices `[n, V, D]`: row f^i(v) of slot i reads the code of v."""
    cycle = np.random.default_rng([seed, 2]).permutation(vocab)
    code, out = codes(vocab, seed), np.empty((n, vocab, WIDTH))
    for i in range(n):
        out[i, cycle[(np.arange(vocab) + i + 1) % vocab]] = code[cycle] / np.sqrt(WIDTH)
    return out


def head(kind: str, n: int, r: int, *, vocab: int = 258, noise: float = 0.15, seed: int = 0) -> Any:
    """A contextual circuit of a template, over features of width D."""
    rng = np.random.default_rng([seed, 3])
    made = getattr(templates, kind)(
        *((n, vocab) if kind == "ff" else (n, r, vocab)), context=WIDTH, seed=seed
    )
    shapes = {name: node.type.shape for name, node, _ in made.logits}
    base = outputs(vocab, seed, n)[:, None] * 2
    wide = base + noise * rng.normal(size=(*shapes["emission_logits"], WIDTH)) / 3
    layers = sorted(int(k.split(".")[1]) for k in shapes if k.startswith("sum"))
    sums = [rng.normal(size=(*shapes[f"sum_logits.{k}"], WIDTH)) / 3 for k in layers]
    args = (n, vocab) if kind == "ff" else (n, r, vocab)
    weights = {"emissions": wide, "sums": sums}
    return getattr(templates, kind)(*args, context=WIDTH, weights=weights)


def engine(path: Path, kind: str = "hmm", n: int = 4, r: int = 3, **options: Any) -> Any:
    """Compile a tiny verifier and head below `path` and open the bundle with one thread."""
    folder = llama_folder(path / "model", **options.pop("config", {}))
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    how = {"max_seq": 256, "chunk": 8, "queries": ["draft"], **options}
    out = path / f"{kind}.pcc"
    pcc.compile(head(kind, n, r, vocab=vocab), verifier=folder, out=out, **how)
    return pcc.load(out, threads=1)
