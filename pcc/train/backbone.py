"""A byte-level decoder of the Llama kind: RMSNorm, rotary positions, grouped attention, SwiGLU.

Attribute names make the state dict that of a Hugging Face Llama folder (`config.json`,
`model.safetensors`). Ids: a byte is its own id, BOS 256, EOS 257.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcc.errors import PccError
from pcc.train import config as cfg
from pcc.train.files import DTYPES, read_weights, write_json, write_tensors

BOS, EOS, VOCAB = 256, 257, 258
Cache = list[tuple[Tensor, Tensor]]


class Norm(nn.Module):
    """y = w x / sqrt(mean x^2 + eps)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention of `heads` queries on `kv` keys and values; positions as rotations."""

    def __init__(self, width: int, heads: int, kv: int) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, width // heads
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, kv * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor] | None, at: int
    ) -> Tensor:
        """X [B,T,D] at positions at..at+T-1; rows at.. of the cache are written."""
        b, t, _ = x.shape
        q = _rotate(self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2), turn)
        k = _rotate(self.k_proj(x).view(b, t, self.kv, self.size).transpose(1, 2), turn)
        v = self.v_proj(x).view(b, t, self.kv, self.size).transpose(1, 2)
        if cache is not None:
            cache[0][:, :, at : at + t], cache[1][:, :, at : at + t] = k, v
            k, v = cache[0][:, :, : at + t], cache[1][:, :, : at + t]
        group = self.heads // self.kv
        if t > 1 and at:
            raise PccError("N120", "a cache is filled by one prompt, then byte by byte")
        if t == 1:  # the queries of a group side by side: no copies of keys and values
            q = q.view(b, self.kv, group, self.size)
            y = functional.scaled_dot_product_attention(q, k, v).reshape(
                b, self.heads, 1, self.size
            )
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + size/2), as Llama's checkpoints have them."""
    cos, sin = turn
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Mlp(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """x + attention(norm x), then + mlp(norm x)."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn = Attention(width, c["num_attention_heads"], c["num_key_value_heads"])
        self.mlp = Mlp(width, c["intermediate_size"])
        self.input_layernorm = Norm(width, eps)
        self.post_attention_layernorm = Norm(width, eps)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor] | None = None,
        at: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, cache, at)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Stack(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class Backbone(nn.Module):
    """h_t = final norm of the last layer; p_t = softmax(lm_head h_t)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        size = config["hidden_size"] // config["num_attention_heads"]
        frequency = config["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(config["max_position_embeddings"]).float(), frequency)
        angle = torch.cat((angle, angle), -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.model.layers)

    def reset(self, seed: int) -> None:
        """Draw the weights: N(0, 0.02), layers' outputs smaller by sqrt(2 L)."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                spread = 0.02 / (2 * self.depth) ** 0.5 if last else 0.02
                p.data = spread * torch.randn(*p.shape, generator=g)

    def turn(self, at: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotations of positions at..at+count-1. Errors: N120."""
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        if at + count > len(cos):
            raise PccError("N120", f"position {at + count} is beyond the backbone's {len(cos)}")
        return cos[at : at + count].to(dtype), sin[at : at + count].to(dtype)

    def states(self, ids: Tensor, stop: int | None = None) -> Tensor:
        """Return the residual stream [B,T,D] after the first `stop` layers (default: all)."""
        x: Tensor = self.model.embed_tokens(ids)
        turn = self.turn(0, ids.shape[1], _compute_dtype(x))
        for layer in list(self.model.layers)[:stop]:
            x = layer(x, turn)
        return x

    def finish(self, x: Tensor, start: int) -> Tensor:
        """Run the layers from `start` on and the final norm."""
        turn = self.turn(0, x.shape[1], _compute_dtype(x))
        for layer in list(self.model.layers)[start:]:
            x = layer(x, turn)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        """Return hidden states [B,T,D] of ids i64[B,T]."""
        return self.finish(self.states(ids), self.depth)

    def cache(self, rows: int, length: int) -> Cache:
        """Return empty keys and values."""
        c = self.config
        size = c["hidden_size"] // c["num_attention_heads"]
        shape = (rows, int(c["num_key_value_heads"]), length, size)
        weight = self.lm_head.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.model.layers]

    def cached(self, ids: Tensor, cache: Cache, at: int) -> Tensor:
        """Return hidden states of new ids [B,T] at positions at.., extending the cache."""
        x: Tensor = self.model.embed_tokens(ids)
        turn = self.turn(at, ids.shape[1], x.dtype)
        for layer, pair in zip(self.model.layers, cache, strict=True):
            x = layer(x, turn, pair, at)
        return self.model.norm(x)  # type: ignore[no-any-return]


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def describe(sizes: cfg.Model) -> dict[str, Any]:
    """Return `config.json` of a Llama of these sizes. Errors: N121."""
    if sizes.width % (2 * sizes.heads) or sizes.heads % sizes.kv_heads:
        what = f"width {sizes.width}, {sizes.heads} heads, {sizes.kv_heads} key-value heads"
        hint = "width must be a multiple of 2 x heads, heads a multiple of kv_heads"
        raise PccError("N121", f"{what} do not fit", hint=hint)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.width // sizes.heads,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocabulary": "a byte is its own id; 256 begins and 257 ends a document",
    }


def save(model: Backbone, folder: Path, storage: str, meta: dict[str, str] | None = None) -> None:
    """Write `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    write_json(folder / "config.json", model.config | {"torch_dtype": names[storage]})
    write_tensors(folder / "model.safetensors", model.state_dict(), DTYPES[storage], meta)


def load(folder: Path) -> Backbone:
    """Read a folder that `save` wrote, in float32. Errors: N122."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        model = Backbone(config)
    except FileNotFoundError:
        hint = "train one (kind: backbone), or name a folder with config.json"
        raise PccError("N122", "there is no backbone here", at=str(folder), hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise PccError("N122", f"not a Llama configuration: {e!r}"[:160], at=str(path)) from None
    if config.get("model_type") != "llama" or config.get("rope_scaling"):
        what = "only plain Llama backbones (no rope_scaling) are trained on"
        raise PccError("N122", what, at=str(path))
    state = read_weights(folder / "model.safetensors")
    try:
        model.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as e:
        what = " ".join(str(e).split())[:200]
        raise PccError("N122", what, at=str(folder / "model.safetensors")) from None
    return model
