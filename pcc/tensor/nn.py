"""Tensor ops of neural sequence models: norms, activations, rotations, caches, attention, ranks.

Shapes are per row. N positions are processed at once; a cache has S rows, of which the first
`start` are committed. What lies beyond is never read.
"""

from __future__ import annotations

import math

import numpy as np

from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.ir.types import HALVES, INT8, Tensor, Type
from pcc.tensor.core import stored_as
from pcc.tensor.ops import TensorOp, Unary


class NetworkOp(TensorOp):
    """An op whose lowering wants the batch axis first."""

    opaque = True

    def rank(self, x: Op, rank: int, what: str, *dtypes: str) -> Tensor:
        """Return the type of `x`, which must have a rank and one of these dtypes (or f32)."""
        t, known = tensor(x), dtypes or ("f32",)
        ok = len(t.shape) == rank and t.dtype in known
        self.require(ok, "E110", f"{what} is {t}, expected {' or '.join(known)} of rank {rank}")
        return t


def _lead(x: Values, rank: int) -> tuple[int, ...]:
    """Return the batch axes of a value whose per-row rank is `rank`."""
    return tuple(x.shape[: x.ndim - rank])


def _aligned(x: Values, rank: int, lead: tuple[int, ...]) -> Values:
    """Repeat `x` over the batch axes `lead`."""
    return np.broadcast_to(x, (*lead, *x.shape[x.ndim - rank :]))


# ---------------------------------------------------------------- norms and activations


class RmsNorm(NetworkOp, name="t.rms_norm"):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis."""

    x: Op
    w: Op
    eps: float

    def infer(self) -> Type:
        x, w = tensor(self.x), tensor(self.w)
        ok = bool(x.shape) and w.shape == x.shape[-1:] and not w.batch
        self.require(ok, "E110", f"weights {w} on {x}")
        self.require(self.eps >= 0, "E111", f"eps {self.eps} is negative")
        return x

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, w = args
        return np.asarray(w * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps))


class LayerNorm(NetworkOp, name="t.layer_norm"):
    """y = w * (x - mean x) / sqrt(var x + eps) + b over the last axis; the variance is biased."""

    x: Op
    w: Op
    b: Op
    eps: float

    def infer(self) -> Type:
        x, w, b = tensor(self.x), tensor(self.w), tensor(self.b)
        ok = bool(x.shape) and w.shape == b.shape == x.shape[-1:] and not (w.batch or b.batch)
        self.require(ok, "E110", f"weights {w} and {b} on {x}")
        self.require(self.eps >= 0, "E111", f"eps {self.eps} is negative")
        return x

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, w, b = args
        centred = x - x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + self.eps)
        return np.asarray(w * centred / spread + b)


class Activation(Unary, NetworkOp):
    """An element-wise function of f32 values."""

    def infer(self) -> Type:
        self.require(tensor(self.x).dtype == "f32", "E112", f"operand is {tensor(self.x)}")
        return tensor(self.x)


class Silu(Activation, name="t.silu"):
    """x / (1 + e^-x)."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        x = args[0]
        small = np.exp(-np.abs(x))  # never overflows
        return np.asarray(x * np.where(x >= 0, 1.0, small) / (1.0 + small))


class Gelu(Activation, name="t.gelu"):
    """x * (1 + erf(x / sqrt 2)) / 2."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        erf = np.vectorize(math.erf, otypes=[np.float64])
        return np.asarray(0.5 * args[0] * (1.0 + erf(args[0] / math.sqrt(2.0))))


class Relu(Activation, name="t.relu"):
    """max(x, 0)."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        return np.asarray(np.maximum(args[0], 0.0))


# ---------------------------------------------------------------- tables


class Embedding(NetworkOp, name="t.embedding"):
    """y[..] = table[ids[..]], the row of each id; 0 <= ids < V must hold. A half row is widened."""

    table: Op
    ids: Op
    stored = ("table",)

    def infer(self) -> Type:
        table, ids = tensor(self.table), tensor(self.ids)
        ok = len(table.shape) == 2 and not table.batch and ids.dtype == "i64"
        ok = ok and table.dtype != INT8
        self.require(ok, "E110", f"cannot look up {ids} in {table}")
        dtype = "f32" if table.dtype in HALVES else table.dtype
        return self.like((*ids.shape, table.shape[1]), dtype)

    def eval(self, s: Semiring, *args: Values) -> Values:
        table, ids = args
        inside = ids.size == 0 or (ids.min() >= 0 and ids.max() < len(table))
        self.require(bool(inside), "E403", f"an id is not within 0..{len(table) - 1}")
        return np.asarray(table[ids])


class Rotary(NetworkOp, name="t.rotary"):
    """(y_i, y_{i+r}) = (x_i, x_{i+r}) turned by the angle of position p and frequency i < r.

    `x [H,N,hd]`, `positions i64[N]`, tables `cos`, `sin [P,r]`, 2r <= hd: the halves of the first
    2r coordinates are paired (y_i = x_i cos - x_{i+r} sin, y_{i+r} = x_{i+r} cos + x_i sin), the
    other coordinates stay. 0 <= positions < P must hold.
    """

    x: Op
    positions: Op
    cos: Op
    sin: Op

    def infer(self) -> Type:
        x = self.rank(self.x, 3, "x")
        positions = self.rank(self.positions, 1, "positions", "i64")
        cos, sin = self.rank(self.cos, 2, "cos"), self.rank(self.sin, 2, "sin")
        ok = cos.shape == sin.shape and 0 < 2 * cos.shape[1] <= x.shape[2]
        ok = ok and not (cos.batch or sin.batch) and positions.shape == x.shape[1:2]
        self.require(ok, "E110", f"x {x}, positions {positions}, tables {cos} and {sin}")
        return self.like(x.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, positions, cos, sin = args
        inside = positions.min() >= 0 and positions.max() < len(cos)
        self.require(bool(inside), "E403", f"a position is not within 0..{len(cos) - 1}")
        c, z = cos[positions][..., None, :, :], sin[positions][..., None, :, :]
        r = cos.shape[1]
        a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
        turned = np.concatenate([a * c - b * z, b * c + a * z], axis=-1)
        lead = _lead(turned, 3)
        return np.concatenate([turned, _aligned(rest, 3, lead)], axis=-1)


# ---------------------------------------------------------------- caches and attention


class RowWrite(NetworkOp):
    """Some rows of `cache [H,S,hd]` become `update [H,N,hd]`, N <= S.

    The cache may be f16 or bf16, and is so afterwards: the f32 update is rounded as it is written.
    """

    cache: Op
    update: Op
    start: Op
    stored = ("cache",)

    def infer(self) -> Type:
        cache = self.rank(self.cache, 3, "cache", "f32", *HALVES)
        update = self.rank(self.update, 3, "update")
        start = self.rank(self.start, 0, "start", "i64")
        same = cache.shape[::2] == update.shape[::2] and update.shape[1] <= cache.shape[1]
        self.require(same, "E110", f"cannot write {update} into {cache} at {start}")
        return self.like(cache.shape, cache.dtype)


class CacheWrite(RowWrite, name="t.cache_write"):
    """Rows start..start+N-1 of `cache [H,S,hd]` become `update [H,N,hd]`; start + N <= S."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        cache, update, start = args[0], stored_as(args[1], self.cache, s), args[2]
        rows, count = cache.shape[-2], update.shape[-2]
        inside = start.min() >= 0 and start.max() + count <= rows
        self.require(bool(inside), "E403", f"{count} rows from {start.max()} leave 0..{rows - 1}")
        lead = np.broadcast_shapes(_lead(cache, 3), _lead(update, 3), _lead(start, 0))
        out, update = _aligned(cache, 3, lead).copy(), _aligned(update, 3, lead)
        at = np.broadcast_to(start, lead)
        for row in np.ndindex(*lead):
            out[row][:, at[row] : at[row] + count] = update[row]
        return out


class CachedAttention(NetworkOp, name="t.cached_attention"):
    """y_i = sum_j softmax_j(scale * q_i . k_j) v_j over j <= start + i.

    If `window` > 0, also j > start + i - window. `q [H,N,hd]`, `k [Hk,S,hd]`, `v [Hk,S,hv]`: query
    head h reads key head h // (H / Hk). Rows that no query may read are never read. If k and v are
    f16 or bf16, q is rounded to that; scores, softmax and sums are wide.
    """

    q: Op
    k: Op
    v: Op
    start: Op
    scale: float
    window: int
    stored = ("k", "v")

    def infer(self) -> Type:
        q, k = self.rank(self.q, 3, "q"), self.rank(self.k, 3, "k", "f32", *HALVES)
        v = self.rank(self.v, 3, "v", k.dtype)
        self.rank(self.start, 0, "start", "i64")
        ok = q.shape[2] == k.shape[2] and k.shape[:2] == v.shape[:2] and k.shape[0] > 0
        ok = ok and q.shape[0] % k.shape[0] == 0 and q.shape[1] <= k.shape[1]
        self.require(ok, "E110", f"cannot attend with {q} over {k} and {v}")
        self.require(self.window >= 0, "E111", f"window {self.window} is negative")
        return self.like((q.shape[0], q.shape[1], v.shape[2]))

    def eval(self, s: Semiring, *args: Values) -> Values:
        q, k, v, start = stored_as(args[0], self.k, s), *args[1:]
        lead = np.broadcast_shapes(_lead(q, 3), _lead(k, 3), _lead(v, 3), _lead(start, 0))
        q, k, v = (_aligned(x, 3, lead) for x in (q, k, v))
        group = q.shape[-3] // k.shape[-3]
        last = np.broadcast_to(start, lead)[..., None] + np.arange(q.shape[-2])
        out = np.empty((*q.shape[:-1], v.shape[-1]))
        for *row, h, i in np.ndindex(*q.shape[:-1]):
            at, end = tuple(row), int(last[(*row, i)]) + 1
            first = max(0, end - self.window) if self.window else 0
            keys = k[at][h // group, first:end]
            score = self.scale * (keys @ q[at][h, i])
            weight = np.exp(score - score.max())
            out[(*at, h, i)] = weight / weight.sum() @ v[at][h // group, first:end]
        return out


# ---------------------------------------------------------------- order


class SortRank(Activation, name="t.sort_rank"):
    """Rank of each element in its last axis, largest first: equal elements keep their order."""

    def infer(self) -> Type:
        t = tensor(self.x)
        self.require(bool(t.shape) and t.dtype == "f32", "E110", f"operand is {t}")
        return self.like(t.shape, "i64")

    def eval(self, s: Semiring, *args: Values) -> Values:
        order = np.argsort(-args[0], axis=-1, kind="stable")
        rank = np.empty(order.shape, np.int64)
        np.put_along_axis(rank, order, np.arange(order.shape[-1]), axis=-1)
        return rank
