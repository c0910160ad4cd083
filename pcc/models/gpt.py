"""The small GPT of the published smoke test, whose weights lie inside the MTPC checkpoint.

x = norm(table[id]); x <- x + Attention(norm(x)); x <- x + W_proj relu(W_fc norm(x))^2; norm(x) at
the end. norm(x) = x / sqrt(mean(x^2) + 2^-23) has no weights; queries and keys are normed per head,
then turned backwards; the rotary tables are rounded to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends.state import State, lookup, read_config, read_state
from pcc.ir.core import Op, tensor
from pcc.knobs import MAX_MODEL_SIZE
from pcc.models.base import (
    Pass,
    StateSpec,
    Values,
    Vocabulary,
    bytes_at,
    constant,
    dense,
    heads_first,
    merge_heads,
    pieces,
    positions_of,
    split_heads,
    transposed,
)
from pcc.passes.pieces import place
from pcc.tensor import nn
from pcc.tensor import ops as t

EPS = 2.0**-23
THETA = 10000.0
BODY = "lm._lm.encoder.transformer"
HEAD = "lm._lm.head.lm_head.weight"


@dataclass(frozen=True)
class Block:
    """The trained values of one layer, inputs first."""

    qkv: Op
    out: Op
    up: Op
    down: Op


@dataclass(frozen=True)
class Gpt:
    """The GPT over `layers`."""

    vocab: int
    width: int
    heads: int
    vocabulary: Vocabulary
    embedding: Op
    layers: tuple[Block, ...]
    head: Op
    cos: Op
    sin: Op
    dtype: str = "f32"  # of the caches

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Keys and values of every layer."""
        shape = (self.heads, rows, self.width // self.heads)
        names = [f"{kind}.{i}" for i in range(len(self.layers)) for kind in ("key", "value")]
        return tuple(StateSpec(name, self.dtype, shape, 1) for name in names)

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Process `ids i64[N]` at positions `start` + 0..N-1."""
        at = positions_of(start, tensor(ids).shape[0])
        caches: dict[str, Op] = {}
        x = place(norm(nn.Embedding(self.embedding, ids)), "embedding")
        for i, block in enumerate(self.layers):
            q, k, v = self.project(block, norm(x), at)
            for kind, new in (("key", k), ("value", v)):
                caches[f"{kind}.{i}"] = nn.CacheWrite(past[f"{kind}.{i}"], new, start)
            scale = 1.0 / math.sqrt(self.width // self.heads)
            y = nn.CachedAttention(q, caches[f"key.{i}"], caches[f"value.{i}"], start, scale, 0)
            x = place(t.Add(x, dense(merge_heads(y), block.out)), f"layers.{i}.attention")
            inner = nn.Relu(dense(norm(x), block.up))
            x = place(t.Add(x, dense(t.Mul(inner, inner), block.down)), f"layers.{i}.mlp")
        hidden = place(norm(x), "norm")
        logits = place(dense(hidden, self.head), "lm_head")
        return Pass(hidden, hidden, logits, lambda done: dict(caches))

    def project(self, block: Block, h: Op, at: Op) -> tuple[Op, Op, Op]:
        """Return turned queries and keys, and values, `[H,N,hd]` each."""
        cut = pieces(dense(h, block.qkv), [self.width] * 3)
        q, k, v = (split_heads(y, self.heads) for y in cut)
        q, k = (nn.Rotary(heads_first(norm(y)), at, self.cos, self.sin) for y in (q, k))
        return q, k, heads_first(v)


def norm(x: Op) -> Op:
    """Return x / sqrt(mean(x^2) + eps)."""
    return nn.RmsNorm(x, constant(np.ones(tensor(x).shape[-1], np.float32)), EPS)


# ---------------------------------------------------------------- reading


def is_gpt(folder: Path) -> bool:
    """Whether the folder is a checkpoint that holds this model's weights."""
    path = folder / "config.yaml"
    return path.is_file() and lookup(read_config(path), "lm.name") == "nanogpt"


def read_gpt(folder: Path, *, max_rows: int) -> Gpt:
    """Read the model from a published checkpoint. Errors: M104, M105, M107, M108, F1xx, X101."""
    config = read_config(folder / "config.yaml")
    sizes = ("lm.n_embd", "lm.n_head", "lm.num_layers", "data.vocab_size")
    width, heads, layers, vocab = (_size(config, key, folder) for key in sizes)
    if width % heads or width // heads % 2:
        what = f"lm.n_embd: {width} does not divide into {heads} heads of even width"
        raise PccError("M108", what, at=str(folder))
    shapes = _shapes(width, layers, vocab)
    _, state, path = read_state(folder, keep=tuple(shapes))
    _check(state, shapes, path)

    def take(name: str) -> Values:
        return np.array(state[name], np.float32)  # a copy: the file may be mapped into memory

    blocks = []
    for i in range(layers):
        at = f"{BODY}.h.{i}"
        qkv = transposed(*(take(f"{at}.attn.c_{c}.weight") for c in "qkv"))
        rest = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        blocks.append(Block(qkv, *(transposed(take(f"{at}.{name}.weight")) for name in rest)))
    cos, sin = _tables(width // heads, max_rows)
    return Gpt(
        vocab, width, heads, Vocabulary(bytes_at(vocab)), constant(take(f"{BODY}.wte.weight")),
        tuple(blocks), transposed(take(HEAD)), constant(cos), constant(-sin),
    )  # fmt: skip


def _size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = lookup(config, key)
    if type(value) is not int or not 0 < value <= MAX_MODEL_SIZE:
        what = f"{key}: {value!r} is not an integer within 1..{MAX_MODEL_SIZE}"
        raise PccError("M108", what, at=str(folder / "config.yaml"))
    return value


def _shapes(width: int, layers: int, vocab: int) -> dict[str, tuple[int, int]]:
    """Return the tensors of the model, by name."""
    square = dict.fromkeys((f"attn.c_{c}" for c in ("q", "k", "v", "proj")), (width, width))
    parts = square | {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    out = {f"{BODY}.h.{i}.{k}.weight": v for i in range(layers) for k, v in parts.items()}
    return out | {f"{BODY}.wte.weight": (vocab, width), HEAD: (vocab, width)}


def _check(state: State, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    for name, shape in shapes.items():
        value = state.get(name)
        if value is None:
            raise PccError("M104", f"the tensor {name!r} is missing", at=str(path))
        if value.shape != shape or value.dtype.kind != "f":
            what = f"{name!r} is {value.dtype}{list(value.shape)}, expected f32{list(shape)}"
            raise PccError("M105", what, at=str(path))
        if not np.isfinite(value).all():
            raise PccError("M107", f"{name!r} holds NaN or infinity", at=str(path))
    body = [k for k in state if k.startswith("lm._lm.") and not k.endswith("rotary.inv_freq")]
    if extra := [k for k in body if k not in shapes]:
        what = f"{len(extra)} tensors are not part of this architecture: {', '.join(extra[:4])}"
        raise PccError("M106", what, at=str(path))


def _tables(head_width: int, rows: int) -> tuple[Values, Values]:
    """Return cos and sin of position * frequency, f32[rows, hd/2], rounded to bf16."""
    frequency = (1.0 / THETA ** (np.arange(0, head_width, 2) / head_width)).astype(np.float32)
    angle = (np.arange(rows, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return _bf16(np.cos(angle)), _bf16(np.sin(angle))


def _bf16(x: Values) -> Values:
    """Round to the nearest number with 8 significant bits, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
