"""Plain torch implementations of the decoders, written from their published equations.

No cache, no shared code with the package: a whole sequence at once, heads repeated, one mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

State = Mapping[str, torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else weight * y


def inverse_frequencies(config: Mapping[str, Any], width: int) -> torch.Tensor:
    """Per pair of coordinates, with the linear and llama3 scalings."""
    theta = config.get("rope_theta", 10000.0)
    inv = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        inv = inv / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        out = []
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        for f in inv.tolist():
            wavelength = 2 * math.pi / f
            if wavelength < old / high:
                out.append(f)
            elif wavelength > old / low:
                out.append(f / scaling["factor"])
            else:
                s = (old / wavelength - low) / (high - low)
                out.append((1 - s) * f / scaling["factor"] + s * f)
        inv = torch.tensor(out, dtype=torch.float64)
    return inv.float()


def turn(x: torch.Tensor, inv: torch.Tensor) -> torch.Tensor:
    """Rotate [B,H,T,hd] by position: halves are paired."""
    angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * inv[None]
    cos = torch.cat([angle.cos()] * 2, -1).to(x.dtype)
    sin = torch.cat([angle.sin()] * 2, -1).to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def visible(count: int, window: int) -> torch.Tensor:
    i, j = torch.arange(count)[:, None], torch.arange(count)[None]
    seen = j <= i
    return seen & (j > i - window) if window else seen


def decoder(
    config: Mapping[str, Any], state: State, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return final features [B,T,D] and logits [B,T,V] of a Llama, Qwen2, Qwen3 or Mistral."""
    kind = config["model_type"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    shared = config.get("num_key_value_heads", heads)
    width = config.get("head_dim") or config["hidden_size"] // heads
    eps, inv = config["rms_norm_eps"], inverse_frequencies(config, width)
    batch, count = ids.shape

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["model.embed_tokens.weight"][ids]
    for i in range(layers):
        at = f"model.layers.{i}"
        h = rms(x, state[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(h, f"{at}.self_attn.{c}_proj").view(batch, count, -1, width) for c in "qkv"
        )
        if kind == "qwen3":
            q = rms(q, state[f"{at}.self_attn.q_norm.weight"], eps)
            k = rms(k, state[f"{at}.self_attn.k_norm.weight"], eps)
        q, k, v = turn(q.transpose(1, 2), inv), turn(k.transpose(1, 2), inv), v.transpose(1, 2)
        k, v = (y.repeat_interleave(heads // shared, 1) for y in (k, v))
        window = 0
        if kind == "mistral":
            window = config.get("sliding_window") or 0
        elif config.get("use_sliding_window") and i >= config["max_window_layers"]:
            window = config["sliding_window"]
        score = q @ k.transpose(2, 3) / math.sqrt(width)
        score = score.masked_fill(~visible(count, window), -math.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, heads * width)
        x = x + linear(y, f"{at}.self_attn.o_proj")
        h = rms(x, state[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, f"{at}.mlp.gate_proj"), linear(h, f"{at}.mlp.up_proj")
        x = x + linear(functional.silu(gate) * up, f"{at}.mlp.down_proj")
    hidden = rms(x, state["model.norm.weight"], eps)
    tied = config.get("tie_word_embeddings", False)
    head = state["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return hidden, hidden @ head.T


def decoder_state(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return random weights under the published names."""
    make = torch.Generator().manual_seed(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    shared = config.get("num_key_value_heads", heads)
    width = config.get("head_dim") or d // heads
    kind = config["model_type"]
    sizes = {
        "self_attn.q_proj": (heads * width, d),
        "self_attn.k_proj": (shared * width, d),
        "self_attn.v_proj": (shared * width, d),
        "self_attn.o_proj": (d, heads * width),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    biased = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    if config.get("attention_bias"):
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if config.get("mlp_bias"):
        biased |= {"gate_proj", "up_proj", "down_proj"}

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=make) * scale

    out = {"model.embed_tokens.weight": normal(v, d), "model.norm.weight": 1 + normal(d, scale=0.1)}
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = normal(v, d, scale=d**-0.5)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, (rows, columns) in sizes.items():
            out[f"{at}.{name}.weight"] = normal(rows, columns, scale=columns**-0.5)
            if name.split(".")[1] in biased:
                out[f"{at}.{name}.bias"] = normal(rows, scale=0.3)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{norm}.weight"] = 1 + normal(d, scale=0.1)
        if kind == "qwen3":
            for norm in ("q_norm", "k_norm"):
                out[f"{at}.self_attn.{norm}.weight"] = 1 + normal(width, scale=0.3)
    return out
