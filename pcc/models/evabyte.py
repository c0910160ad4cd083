"""EvaByte: a byte decoder with EVA attention and several output matrices.

As a Llama-style decoder, but the norms scale by weight + 1, and attention is exact inside the
window of a position only: each chunk of an earlier window is seen as one summary (k', v'),

    k' = sum_m softmax_m(mu . k_m) k_m,   v' = sum_m softmax_m(s (phi . k_m - |k_m|^2 / 2)) v_m,

s = hd^(-1/2), with trained `mu`, `phi [H,hd]`. A pass computes the summaries of all chunks that it
wrote to anew; one is first seen when its window is past, and then it was made of committed keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from pcc import knobs
from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.models.base import Pass, StateSpec, constant, transposed
from pcc.models.config import Config, tables
from pcc.models.decoder import (
    Decoder,
    Layer,
    Positions,
    Shape,
    Take,
    TakeMatrix,
    read_layer,
    shape_of,
)
from pcc.models.matrix import cut
from pcc.models.tensors import Source, Values
from pcc.tensor import eva, nn
from pcc.tensor import ops as t

BYTE_OFFSET = 64  # id of byte 0; the ids below are special
OFFSET_NORMS = ("layernorm.weight", "model.norm.weight")


@dataclass(frozen=True)
class EvaLayer(Layer):
    """A layer with its pooling vectors `mu`, `phi [H,1,1,hd]` (phi already times s)."""

    mu: Op
    phi: Op


@dataclass(frozen=True)
class EvaByte(Decoder):
    """A decoder whose caches are rings of recent keys beside summaries of older chunks.

    `span`: the widest pass that the rings allow once they wrap. `heads [K,V,D]`: the output
    matrices, of which the first is the verifier's and the k-th predicts k tokens ahead.
    """

    window: int = 0
    chunk: int = 0
    span: int = knobs.EVA_SPAN
    heads: Op | None = None

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Rings of min(rows, window + span) rows, and a summary for each chunk of all `rows`."""
        heads, width = self.shape.heads, self.shape.head_width
        ring = (heads, min(rows, self.window + self.span), width)
        older = (heads, -(-rows // self.chunk) + 1, width)
        kinds = {"": (ring, "ring_rows"), "summary_": (older, "summary_rows")}
        count = len(self.layers) + len(self.draft)
        return tuple(
            StateSpec(f"{kind}{part}.{i}", self.dtype, shape, 1, rows_name)
            for i in range(count)
            for kind, (shape, rows_name) in kinds.items()
            for part in ("key", "value")
        )

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Process `ids i64[N]` at positions `start` + 0..N-1; they may cross window edges."""
        count, rows = tensor(ids).shape[0], tensor(past["key.0"]).shape[1]
        if rows >= self.window + self.span and count > rows - self.window:
            what = f"a pass of {count} tokens over rings of {rows} rows, windows of {self.window}"
            hint = f"use passes of at most {rows - self.window} tokens"
            raise PccError("M112", what, hint=hint)
        return super().forward(ids, start, past)

    def step(
        self,
        layer: Layer,
        index: int,
        x: Op,
        where: Positions,
        past: Mapping[str, Op],
        caches: dict[str, Op],
    ) -> Op:
        """Apply one layer to `x f32[N,D]`; its new rings and summaries go into `caches`."""
        assert isinstance(layer, EvaLayer)
        q, k, v = self.project(layer, nn.RmsNorm(x, layer.norm, self.shape.eps), where)
        at, count = where.start, tensor(x).shape[0]
        keys = eva.RingWrite(past[f"key.{index}"], k, at)
        values = eva.RingWrite(past[f"value.{index}"], v, at)
        first = t.FloorDiv(at, self.chunk)
        pool_k, pool_v = self.pools(layer, keys, values, at, count)
        older_k = nn.CacheWrite(past[f"summary_key.{index}"], pool_k, first)
        older_v = nn.CacheWrite(past[f"summary_value.{index}"], pool_v, first)
        caches[f"key.{index}"], caches[f"value.{index}"] = keys, values
        caches[f"summary_key.{index}"], caches[f"summary_value.{index}"] = older_k, older_v
        scale = 1.0 / math.sqrt(self.shape.head_width)
        y = eva.EvaAttention(q, keys, values, older_k, older_v, at, scale, self.window, self.chunk)
        return self.mixed(layer, index, x, y)

    def pools(self, layer: EvaLayer, keys: Op, values: Op, start: Op, count: int) -> tuple[Op, Op]:
        """Return the summaries (k', v'), each [H,C,hd], of the C chunks that a pass may touch."""
        chunks = eva.chunk_count(count, self.chunk)
        k = eva.RingChunks(keys, start, self.chunk, chunks)
        v = eva.RingChunks(values, start, self.chunk, chunks)
        half = np.full((1, 1, 1, 1), 0.5 / math.sqrt(self.shape.head_width), np.float32)
        near = t.Mul(t.Sub(layer.phi, t.Mul(k, constant(half))), k)
        return pooled(t.Mul(layer.mu, k), k), pooled(near, v)


def pooled(score: Op, x: Op) -> Op:
    """y[h,c,d] = sum_m softmax_m(sum_e score[h,c,m,e]) x[h,c,m,d]."""
    weight = t.Softmax(t.ReduceSum(score, 3))
    return t.ReduceSum(t.Mul(t.Reshape(weight, (*tensor(weight).shape, 1)), x), 2)


# ---------------------------------------------------------------- reading


def read_evabyte(config: Config, tensors: Source, *, max_rows: int) -> EvaByte:
    """Build an EvaByte verifier. The model type decides, not `attention_class`."""
    shape = replace(shape_of(config), head_norm=False)
    window, chunk = config.size("window_size"), config.size("chunk_size")
    if shape.heads != shape.key_heads:
        config.refuse("num_key_value_heads", "EVA attention has a key head for every head")
    if window % chunk:
        config.refuse("chunk_size", f"windows of {window} do not divide into chunks of {chunk}")
    offset = 1.0 if config.flag("norm_add_unit_offset", True) else 0.0

    def take(name: str, *size: int) -> Values:
        value = tensors.take(name, *size)
        return value + np.float32(offset) if name.endswith(OFFSET_NORMS) else value

    count = config.size("num_pred_heads", 1)
    heads = tensors.matrix("lm_head.weight", count * shape.vocab, shape.width)
    cos, sin = (constant(_rounded(config, x)) for x in tables(config, shape.head_width, max_rows))
    embedding = constant(tensors.matrix("model.embed_tokens.weight", shape.vocab, shape.width))
    layers = tuple(_layer(shape, i, take, tensors.matrix) for i in range(shape.layers))
    norm = constant(take("model.norm.weight", shape.width))
    vocabulary = config.vocabulary(shape.vocab, BYTE_OFFSET)
    return EvaByte(
        shape, vocabulary, embedding, layers, norm, transposed(cut(heads, 0, shape.vocab)), cos,
        sin, window=window, chunk=chunk,
        heads=constant(heads, shape=(count, shape.vocab, shape.width)),
    )  # fmt: skip


def _layer(shape: Shape, index: int, take: Take, matrix: TakeMatrix) -> EvaLayer:
    base = read_layer(shape, index, take, matrix)
    heads, width = shape.heads, shape.head_width
    at = f"model.layers.{index}.self_attn.adaptive_"
    mu, phi = (take(f"{at}{x}", 1, heads, 1, 1, width)[0] for x in ("mu_k", "phi"))
    scaled = phi.astype(np.float32) / np.float32(math.sqrt(width))
    same = {f.name: getattr(base, f.name) for f in fields(Layer)}
    return EvaLayer(**same, mu=constant(mu), phi=constant(scaled))


def _rounded(config: Config, table: Values) -> Values:
    """Round a rotary table to the folder's dtype: the published model keeps it in that."""
    key = "torch_dtype" if config.optional("dtype") is None else "dtype"  # the newer name
    kind = config.choice(key, ("float32", "bfloat16", "float16"), "float32")
    if kind == "float16":
        return table.astype(np.float16).astype(np.float32)
    if kind == "float32":
        return table
    bits = table.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
