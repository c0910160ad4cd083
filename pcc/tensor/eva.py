"""Tensor ops of EVA attention: a ring of recent keys, and one summary for each older chunk.

Positions are split into windows of W and chunks of c (c divides W). A ring of R rows keeps position
p in row p mod R. N positions start..start+N-1 are written and read by one call; what was written
beyond them before is stale. A ring of R >= W + N rows, or one that never wraps, loses nothing that
a query may read.
"""

from __future__ import annotations

import numpy as np

from pcc.ir.core import Op, Values
from pcc.ir.semiring import Semiring
from pcc.ir.types import HALVES, Type
from pcc.tensor.core import stored_as
from pcc.tensor.nn import NetworkOp, RowWrite


def _rows(lead: tuple[int, ...], *values: tuple[Values, int]) -> list[Values]:
    """Repeat values of the given per-row ranks over the batch axes `lead`."""
    return [np.broadcast_to(x, (*lead, *x.shape[x.ndim - rank :])) for x, rank in values]


def _lead(*values: tuple[Values, int]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(x.shape[: x.ndim - rank] for x, rank in values))


class RingWrite(RowWrite, name="t.ring_write"):
    """Row (start + i) mod R of `cache [H,R,hd]` becomes row i of `update [H,N,hd]`; start >= 0."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        cache, update, start = args[0], stored_as(args[1], self.cache, s), args[2]
        lead = _lead((cache, 3), (update, 3), (start, 0))
        out, update, at = _rows(lead, (cache, 3), (update, 3), (start, 0))
        out = out.copy()
        steps = np.arange(update.shape[-2])
        for row in np.ndindex(*lead):
            out[row][:, (at[row] + steps) % out.shape[-2]] = update[row]
        return out


class RingChunks(NetworkOp, name="t.ring_chunks"):
    """y[h,k,m] = ring[h, p mod R] at position p = (start // chunk + k) * chunk + m, k < count.

    The `count` chunks from the one that holds `start` on. `ring [H,R,hd]`, y [H,count,chunk,hd];
    rows of a half ring are widened.
    """

    ring: Op
    start: Op
    chunk: int
    count: int
    stored = ("ring",)

    def infer(self) -> Type:
        ring = self.rank(self.ring, 3, "ring", "f32", *HALVES)
        self.rank(self.start, 0, "start", "i64")
        ok = 0 < self.chunk <= ring.shape[1] and self.count > 0
        self.require(ok, "E111", f"{self.count} chunks of {self.chunk} from {ring}")
        return self.like((ring.shape[0], self.count, self.chunk, ring.shape[2]))

    def eval(self, s: Semiring, *args: Values) -> Values:
        ring, start = args
        lead = _lead((ring, 3), (start, 0))
        ring, at = _rows(lead, (ring, 3), (start, 0))
        first = at // self.chunk * self.chunk
        position = first[..., None] + np.arange(self.count * self.chunk)
        index = (position % ring.shape[-2])[..., None, :, None]
        out = np.take_along_axis(ring, index, axis=-2)
        return out.reshape(*ring.shape[:-2], self.count, self.chunk, ring.shape[-1])


class EvaAttention(NetworkOp, name="t.eva_attention"):
    """y_i = softmax over (keys of i's window up to i, summaries of chunks before that window).

    Query i is at position p = start + i, its window begins at w = p // window * window. Exact part:
    rings `k`, `v [H,R,hd]`, positions w..p. Summaries `sk`, `sv [H,M,hd]`: chunks 0..w/chunk - 1.
    Scores are scale * q . key over both; the last position written is start + N - 1. If rings and
    summaries are f16 or bf16, q is rounded to that; scores, softmax and sums are wide.
    """

    q: Op
    k: Op
    v: Op
    sk: Op
    sv: Op
    start: Op
    scale: float
    window: int
    chunk: int
    stored = ("k", "v", "sk", "sv")

    def infer(self) -> Type:
        q, k = self.rank(self.q, 3, "q"), self.rank(self.k, 3, "k", "f32", *HALVES)
        v, sk, sv = (self.rank(getattr(self, x), 3, x, k.dtype) for x in ("v", "sk", "sv"))
        self.rank(self.start, 0, "start", "i64")
        same = {t.shape[::2] for t in (q, k, v, sk, sv)}
        ok = len(same) == 1 and k.shape == v.shape and sk.shape == sv.shape
        ok = ok and q.shape[1] <= k.shape[1]
        self.require(ok, "E110", f"cannot attend with {q} over {k}, {v} and {sk}, {sv}")
        whole = self.chunk > 0 and self.window > 0 and self.window % self.chunk == 0
        self.require(whole, "E111", f"windows of {self.window} in chunks of {self.chunk}")
        return self.like(q.shape)

    def eval(self, s: Semiring, *args: Values) -> Values:
        lead = _lead(*((x, 3) for x in args[:5]), (args[5], 0))
        q, k, v, sk, sv, start = _rows(lead, *((x, 3) for x in args[:5]), (args[5], 0))
        q = stored_as(q, self.k, s)
        rows = k.shape[-2]
        out = np.empty(q.shape)
        for *row, i in np.ndindex(*lead, q.shape[-2]):
            at = tuple(row)
            p = int(start[at]) + i
            w = p // self.window * self.window
            slots = np.arange(w, p + 1) % rows
            past = w // self.chunk
            self.require(past <= sk.shape[-2], "E403", f"{past} chunks leave {sk.shape[-2]} rows")
            keys = np.concatenate([k[at][:, slots], sk[at][:, :past]], axis=1)
            values = np.concatenate([v[at][:, slots], sv[at][:, :past]], axis=1)
            score = self.scale * np.einsum("hd,hsd->hs", q[at][:, i], keys)
            weight = np.exp(score - score.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            out[at][:, i] = np.einsum("hs,hsd->hd", weight, values)
        return out


def chunk_count(positions: int, chunk: int) -> int:
    """Return the most chunks that `positions` consecutive positions can touch."""
    return (positions + chunk - 2) // chunk + 1
