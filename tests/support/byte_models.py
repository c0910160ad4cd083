"""EvaByte and byte-Llama from their equations: whole sequences in float64, without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
Extra = Callable[[str], Any]  # product name -> what adapters add to its matrix


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Values]]:
    """Return the configuration and the tensors, widened to float64."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, {k: v.double().numpy() for k, v in state.items()}


def to_bf16(x: Values) -> Values:
    """Round to bf16 and back."""
    import torch

    return torch.from_numpy(np.asarray(x)).to(torch.bfloat16).double().numpy()


def softmax(x: Values, axis: int = -1) -> Values:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def turned(x: Values, theta: float, *, rounded: bool) -> Values:
    """Rotary positions 0.. on `x [H,N,hd]`, halves paired."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * theta ** (-np.arange(half) / half)
    c, s = np.cos(angle), np.sin(angle)
    if rounded:
        c, s = to_bf16(c), to_bf16(s)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def eva_rows(
    q: Values, k: Values, v: Values, mu: Values, phi: Values, c: Mapping[str, int]
) -> Values:
    """EVA attention, query by query: keys of the own window, then one pair for each older chunk."""
    count, width = q.shape[1:]
    scale, out = width**-0.5, np.zeros_like(q)
    pairs = []
    for first in range(0, count - c["chunk_size"] + 1, c["chunk_size"]):
        ks, vs = (x[:, first : first + c["chunk_size"]] for x in (k, v))
        near = scale * (np.einsum("hmd,hd->hm", ks, phi) - 0.5 * (ks**2).sum(-1))
        key = np.einsum("hm,hmd->hd", softmax(np.einsum("hmd,hd->hm", ks, mu)), ks)
        pairs.append((key, np.einsum("hm,hmd->hd", softmax(near), vs)))
    for i in range(count):
        w = i // c["window_size"] * c["window_size"]
        older = pairs[: w // c["chunk_size"]]
        ks = np.concatenate([k[:, w : i + 1], *(a[:, None] for a, _ in older)], axis=1)
        vs = np.concatenate([v[:, w : i + 1], *(b[:, None] for _, b in older)], axis=1)
        share = softmax(scale * np.einsum("hd,hsd->hs", q[:, i], ks))
        out[:, i] = np.einsum("hs,hsd->hd", share, vs)
    return out


def causal_rows(q: Values, k: Values, v: Values) -> Values:
    """Causal attention; heads share keys in groups."""
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    score = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
    score[:, ~np.tri(q.shape[1], dtype=bool)] = -np.inf
    return softmax(score) @ v


def features(
    config: Mapping[str, Any], w: Mapping[str, Values], ids: Any, extra: Extra = lambda name: 0.0
) -> tuple[Values, Values]:
    """Return the hidden states after the final norm, and the logits of the first output matrix."""
    is_eva = config["model_type"] == "evabyte"
    offset = 1.0 if is_eva else 0.0
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]

    def norm(x: Values, name: str) -> Values:
        spread = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / spread * (offset + w[name])

    def product(x: Values, name: str) -> Values:
        return x @ (w[f"{name}.weight"] + extra(name)).T

    x = w["model.embed_tokens.weight"][ids]
    if not is_eva:
        x = x + w["model.expand_embed_tokens.weight"][longest_words(config, ids)]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, f"{at}input_layernorm.weight")
        parts = [
            (product(h, f"{at}self_attn.{c}_proj"), n)
            for c, n in zip("qkv", (heads, shared, shared), strict=True)
        ]
        q, k, v = (y.reshape(len(h), n, -1).transpose(1, 0, 2) for y, n in parts)
        q, k = (turned(y, config["rope_theta"], rounded=is_eva) for y in (q, k))
        if is_eva:
            pool = (w[f"{at}self_attn.adaptive_{n}"].reshape(heads, -1) for n in ("mu_k", "phi"))
            y = eva_rows(q, k, v, *pool, config)
        else:
            y = causal_rows(q, k, v)
        x = x + product(y.transpose(1, 0, 2).reshape(len(h), -1), f"{at}self_attn.o_proj")
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate = product(h, f"{at}mlp.gate_proj")
        x = x + product(
            gate / (1 + np.exp(-gate)) * product(h, f"{at}mlp.up_proj"), f"{at}mlp.down_proj"
        )
    hidden = norm(x, "model.norm.weight")
    return hidden, hidden @ w["lm_head.weight"][: config["vocab_size"]].T


def longest_words(config: Mapping[str, Any], ids: Any) -> Values:
    """The row of the longest dictionary word that ends at each position."""
    table, alone = config["expand_input_ids_dict"]
    words = {tuple(map(int, k.split(","))): v - 1 for k, v in table.items() if k}
    out = []
    for i in range(len(ids)):
        recent = tuple(
            int(x) + 1
            for x in reversed(ids[max(0, i + 1 - config["expand_input_ids_maxlen"]) : i + 1])
        )
        most = 1 if recent[0] in set(alone) else len(recent)
        out.append(next((words[recent[:n]] for n in range(most, 0, -1) if recent[:n] in words), 0))
    return np.array(out)
