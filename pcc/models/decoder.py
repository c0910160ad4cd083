"""Llama-style decoders: RMSNorm, rotary positions, grouped-query attention, gated MLP.

x <- x + Attention(RMSNorm(x)); x <- x + W_down (act(W_gate h) * W_up h), h = RMSNorm(x).
Qwen2 adds a bias to q, k and v; Qwen3 an RMSNorm over each head of q and k; Mistral a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.models.base import (
    Pass,
    StateSpec,
    Vocabulary,
    Weight,
    constant,
    dense,
    heads_first,
    merge_heads,
    pieces,
    positions_of,
    split_heads,
    transposed,
)
from pcc.models.config import Config, tables
from pcc.models.matrix import Matrix, equal
from pcc.models.tensors import Source, Values
from pcc.passes.pieces import place
from pcc.tensor import nn
from pcc.tensor import ops as t

ACTIVATIONS: dict[str, Callable[[Op], Op]] = {"silu": nn.Silu, "swish": nn.Silu, "gelu": nn.Gelu}


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a decoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    eps: float
    activation: str
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norm: bool
    tied: bool
    windows: tuple[int, ...]  # of each layer, 0: none


@dataclass(frozen=True)
class Layer:
    """The trained values of one layer; products are stored inputs first."""

    norm: Op
    qkv: Weight
    qkv_bias: Op | None
    q_norm: Op | None
    k_norm: Op | None
    out: Weight
    out_bias: Op | None
    mlp_norm: Op
    gate_up: Weight
    gate_up_bias: Op | None
    down: Weight
    down_bias: Op | None
    window: int


@dataclass(frozen=True)
class Positions:
    """Where the N tokens of a pass are, and the angles of every position."""

    start: Op
    at: Op
    cos: Op
    sin: Op


@dataclass(frozen=True)
class Decoder:
    """A decoder over `layers`; `draft` holds adapted copies of the last layers, if any."""

    shape: Shape
    vocabulary: Vocabulary
    embedding: Op
    layers: tuple[Layer, ...]
    norm: Op
    head: Op
    cos: Op
    sin: Op
    draft: tuple[Layer, ...] = ()
    dtype: str = "f32"  # of the caches

    @property
    def vocab(self) -> int:
        """Number of token ids V."""
        return self.shape.vocab

    @property
    def width(self) -> int:
        """Length D of a feature vector."""
        return self.shape.width

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Keys and values of every layer, then of the adapted ones."""
        shape = (self.shape.key_heads, rows, self.shape.head_width)
        count = len(self.layers) + len(self.draft)
        names = [f"{kind}.{i}" for i in range(count) for kind in ("key", "value")]
        return tuple(StateSpec(name, self.dtype, shape, 1) for name in names)

    def embed(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Op:
        """Return the input of the first layer, f32[N,D]."""
        return nn.Embedding(self.embedding, ids)

    def present(self, ids: Op, past: Mapping[str, Op], count: Op) -> dict[str, Op]:
        """Return the states besides keys and values, once `count` tokens are committed."""
        return {}

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Process `ids i64[N]` at positions `start` + 0..N-1."""
        count = tensor(ids).shape[0]
        where = Positions(start, positions_of(start, count), self.cos, self.sin)
        caches: dict[str, Op] = {}
        x, split, total = self.embed(ids, start, past), len(self.layers) - len(self.draft), 0
        place(x, "embedding")
        shared = x
        for layer in self.layers:
            shared = x if total == split else shared
            x = self.step(layer, total, x, where, past, caches)
            total += 1
        hidden = place(self.finish(x), "norm")
        draft_hidden = hidden
        if self.draft:
            for layer in self.draft:
                shared = self.step(layer, total, shared, where, past, caches)
                total += 1
            draft_hidden = place(self.finish(shared), "draft_norm")
        logits = place(dense(hidden, self.head), "lm_head")
        return Pass(
            hidden, draft_hidden, logits, lambda done: caches | self.present(ids, past, done)
        )

    def finish(self, x: Op) -> Op:
        """Return the features after the final norm."""
        return nn.RmsNorm(x, self.norm, self.shape.eps)

    def step(
        self,
        layer: Layer,
        index: int,
        x: Op,
        where: Positions,
        past: Mapping[str, Op],
        caches: dict[str, Op],
    ) -> Op:
        """Apply one layer to `x f32[N,D]`; its new keys and values go into `caches`."""
        h = nn.RmsNorm(x, layer.norm, self.shape.eps)
        q, k, v = self.project(layer, h, where)
        for kind, new in (("key", k), ("value", v)):
            name = f"{kind}.{index}"
            caches[name] = nn.CacheWrite(past[name], new, where.start)
        keys, values = caches[f"key.{index}"], caches[f"value.{index}"]
        scale = 1.0 / math.sqrt(self.shape.head_width)
        y = nn.CachedAttention(q, keys, values, where.start, scale, layer.window)
        return self.mixed(layer, index, x, y)

    def mixed(self, layer: Layer, index: int, x: Op, y: Op) -> Op:
        """Add what attention found, and then what the MLP makes of it, to `x`."""
        x = t.Add(x, dense(merge_heads(y), layer.out, layer.out_bias))
        place(x, f"layers.{index}.attention")
        x = t.Add(x, self.mlp(layer, nn.RmsNorm(x, layer.mlp_norm, self.shape.eps)))
        return place(x, f"layers.{index}.mlp")

    def project(self, layer: Layer, h: Op, where: Positions) -> tuple[Op, Op, Op]:
        """Return turned queries `[H,N,hd]`, turned keys and values `[Hk,N,hd]`."""
        s = self.shape
        sizes = [s.heads * s.head_width, *[s.key_heads * s.head_width] * 2]
        q, k, v = pieces(dense(h, layer.qkv, layer.qkv_bias), sizes)
        q, k, v = split_heads(q, s.heads), split_heads(k, s.key_heads), split_heads(v, s.key_heads)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = nn.RmsNorm(q, layer.q_norm, s.eps), nn.RmsNorm(k, layer.k_norm, s.eps)
        q, k = (nn.Rotary(heads_first(y), where.at, where.cos, where.sin) for y in (q, k))
        return q, k, heads_first(v)

    def mlp(self, layer: Layer, h: Op) -> Op:
        """Return W_down (act(W_gate h) * W_up h)."""
        inner = self.shape.inner
        gate, up = pieces(dense(h, layer.gate_up, layer.gate_up_bias), [inner, inner])
        gated = t.Mul(ACTIVATIONS[self.shape.activation](gate), up)
        return dense(gated, layer.down, layer.down_bias)


# ---------------------------------------------------------------- reading

Take = Callable[..., Values]  # name, *shape -> array
TakeMatrix = Callable[..., Values | Matrix]  # name, K, D -> matrix, large ones unread


def read_decoder(config: Config, tensors: Source, *, max_rows: int) -> Decoder:
    """Build a decoder of any of the supported kinds."""
    s = shape_of(config)
    table = tensors.matrix("model.embed_tokens.weight", s.vocab, s.width)
    head = read_head(s, tensors, table)
    layers = tuple(read_layer(s, i, tensors.take, tensors.matrix) for i in range(s.layers))
    tensors.skip(*(k for k in tuple(tensors.left) if k.endswith("rotary_emb.inv_freq")))
    norm = constant(tensors.take("model.norm.weight", s.width))
    # Only now: the weights have shown that the head width is what config.json says.
    cos, sin = (constant(angles) for angles in tables(config, s.head_width, max_rows))
    vocabulary = config.vocabulary(s.vocab)
    return Decoder(s, vocabulary, constant(table), layers, norm, head, cos, sin)


def read_head(s: Shape, tensors: Source, table: Values | Matrix) -> Op:
    """Return the output matrix [D,V]: its own, or the embedding table's where they are tied."""
    name = "lm_head.weight"
    if not s.tied:
        return transposed(tensors.matrix(name, s.vocab, s.width))
    if name in tensors and not equal(tensors.matrix(name, s.vocab, s.width), table):
        what = f"{name!r} differs from the embedding table, but tie_word_embeddings is true"
        hint = "set tie_word_embeddings to false if the model has its own output matrix"
        raise PccError("M109", what, at=str(tensors.folder), hint=hint)
    return transposed(table)


def read_layer(s: Shape, index: int, take: Take, matrix: TakeMatrix) -> Layer:
    """Read layer `index`; `take` may return adapted weights."""
    at, attn, mlp = (f"model.layers.{index}.{part}" for part in ("", "self_attn.", "mlp."))
    q, k = s.heads * s.head_width, s.key_heads * s.head_width
    rows = {"q": q, "k": k, "v": k}

    def bias(use: bool, *names: tuple[str, int]) -> Op | None:
        if not use:
            return None
        return constant(np.concatenate([take(f"{n}.bias", size) for n, size in names])[None])

    def head_norm(name: str) -> Op | None:
        return constant(take(f"{attn}{name}.weight", s.head_width)) if s.head_norm else None

    return Layer(
        norm=constant(take(f"{at}input_layernorm.weight", s.width)),
        qkv=transposed(*(matrix(f"{attn}{c}_proj.weight", n, s.width) for c, n in rows.items())),
        qkv_bias=bias(s.qkv_bias, *((f"{attn}{c}_proj", n) for c, n in rows.items())),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        out=transposed(matrix(f"{attn}o_proj.weight", s.width, q)),
        out_bias=bias(s.out_bias, (f"{attn}o_proj", s.width)),
        mlp_norm=constant(take(f"{at}post_attention_layernorm.weight", s.width)),
        gate_up=transposed(
            *(matrix(f"{mlp}{c}_proj.weight", s.inner, s.width) for c in ("gate", "up"))
        ),
        gate_up_bias=bias(s.mlp_bias, (f"{mlp}gate_proj", s.inner), (f"{mlp}up_proj", s.inner)),
        down=transposed(matrix(f"{mlp}down_proj.weight", s.width, s.inner)),
        down_bias=bias(s.mlp_bias, (f"{mlp}down_proj", s.width)),
        window=s.windows[index],
    )


# ---------------------------------------------------------------- configuration


def shape_of(config: Config) -> Shape:
    """Read the sizes; what the model type implies beside what config.json says."""
    kind, heads = config.kind, config.size("num_attention_heads")
    width, layers = config.size("hidden_size"), config.size("num_hidden_layers")
    key_heads = config.size("num_key_value_heads", heads)
    if heads % key_heads:
        config.refuse("num_key_value_heads", f"{heads} heads cannot share {key_heads} key heads")
    if config.optional("head_dim") is None and width % heads:
        config.refuse("hidden_size", f"{width} does not divide into {heads} heads")
    bias = config.flag("attention_bias", False)
    return Shape(
        vocab=config.size("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head_width=config.size("head_dim", width // heads),
        inner=config.size("intermediate_size"),
        eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", tuple(ACTIVATIONS), "silu"),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        head_norm=kind == "qwen3",
        tied=config.flag("tie_word_embeddings", False),
        windows=windows_of(config, layers),
    )


def windows_of(config: Config, layers: int) -> tuple[int, ...]:
    """Return how many positions each layer looks back, itself included; 0 for all."""
    window = config.optional("sliding_window")
    used = config.kind == "mistral" or config.flag("use_sliding_window", False)
    if window is None or not used:
        return (0,) * layers
    size = config.size("sliding_window")
    kinds = config.optional("layer_types")
    if kinds is not None:
        return _listed(config, kinds, layers, size)
    first = 0 if config.kind == "mistral" else config.count("max_window_layers", layers)
    return tuple(size if i >= first else 0 for i in range(layers))


def _listed(config: Config, kinds: Any, layers: int, size: int) -> tuple[int, ...]:
    known: Mapping[str, int] = {"full_attention": 0, "sliding_attention": size}
    if not isinstance(kinds, Sequence) or len(kinds) != layers:
        config.refuse("layer_types", f"does not list {layers} layers")
    for kind in kinds:
        if kind not in known:
            config.refuse("layer_types", f"{kind!r} is not one of {sorted(known)}")
    return tuple(known[kind] for kind in kinds)
