"""Accept, reject, carry: the decisions of one round as tensor expressions.

d_1 is the carry, d_2..d_n the drafts, p_i the verifier's law after d_i, q_i the law that d_i was
drawn from given d_<i. Draft d_i stays if u_i q_i(d_i) < p_{i-1}(d_i); s counts d_1 and the drafts
before the first rejection; the new carry follows max(0, p_s - q_{s+1}), or p_s where that is zero
and where no draft was rejected (q_{n+1} = 0). Then x_{t+2..} follows the verifier whatever q is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcc.ir.core import Op, tensor
from pcc.passes import pieces as mk
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate


@dataclass(frozen=True)
class Verdict:
    """What a round decided: `committed` s i64[], `carry` i64[], and `margin` f32[n].

    `margin` is the distance of each decision to its threshold, the carry's at its end: for a draw
    p_{i-1}(d_i) - u_i q_i(d_i) (accepted if positive) and |cumsum - u total|, for a maximum the
    lead over the second.
    """

    committed: Op
    carry: Op
    margin: Op


def verifier_law(logits: Op, temperature: Op, top_k: Op, top_p: Op) -> Op:
    """Law p [N,V]: softmax(logits / T), truncated."""
    return Truncate(t.Softmax(Temper(logits, temperature)), top_k, top_p)


def at_tokens(table: Op, tokens: Op) -> Op:
    """y[i] = table[i, tokens[i]] for `table [N,V]`, `tokens i64[N]`."""
    n, width = tensor(table).shape
    return mk.reshape(t.Lookup(mk.reshape(table, (n, 1, width)), tokens), (n,))


def row_at(table: Op, index: Op) -> Op:
    """table[index] as `[1,K]`, for `table [N,K]`, `index i64[]`."""
    return t.SelectRow(mk.reshape(table, (1, *tensor(table).shape)), mk.reshape(index, (1,)))


def before(count: Op) -> Op:
    """Return count - 1: the row of the last committed token."""
    return t.Sub(count, mk.const(np.int64(1)))


def accepted(p: Op, q: Op, u: Op) -> Op:
    """Test u q < p, per draft: no division, and p = 0 is never accepted."""
    return t.Less(t.Mul(u, q), p)


def leading(flags: Op) -> Op:
    """Return 1 + the number of flags before the first False, i64[]."""
    (n,) = tensor(flags).shape
    falls = t.Cumsum(t.Cast(t.Not(flags), "i64"), 0, False)
    upright = t.Cast(t.Equal(falls, mk.const(np.zeros(n, np.int64))), "i64")
    return t.Add(t.ReduceSum(upright, 0), mk.const(np.int64(1)))


def residual(p: Op, q: Op, committed: Op) -> Op:
    """max(0, p_s - q_{s+1}) `[1,V]`, unnormalised; p_s where it is zero everywhere."""
    width = tensor(p).shape[1]
    target = row_at(p, before(committed))
    proposed = row_at(mk.concat([q, mk.full((1, width), 0.0)]), before(committed))
    zero = mk.full((1, 1), 0.0)
    gap = t.Sub(target, proposed)
    rest = t.Where(t.Less(zero, gap), gap, mk.full((1, width), 0.0))
    total = mk.reshape(t.ReduceSum(rest, 1), (1, 1))
    return t.Where(t.Less(zero, total), rest, target)


def sampled(p: Op, q: Op, window: Op, u: Op) -> Verdict:
    """The round's decisions for uniforms `u [n]`: n - 1 tests, then the carry's."""
    n = tensor(p).shape[0]
    drafts = mk.take(window, range(1, n))
    p_of, q_of = at_tokens(mk.take(p, range(n - 1)), drafts), at_tokens(q, drafts)
    tests, last = mk.take(u, range(n - 1)), mk.take(u, [n - 1])
    committed = leading(accepted(p_of, q_of, tests))
    mass = residual(p, q, committed)
    carry = mk.reshape(t.InverseCdf(mass, last), ())
    margin = mk.concat([t.Sub(p_of, t.Mul(tests, q_of)), edge(mass, last)])
    return Verdict(committed, carry, margin)


def edge(mass: Op, u: Op) -> Op:
    """Distance of u total to the nearest step of the cumulative mass `[1,V]`, `[1]`."""
    width = tensor(mass).shape[1]
    cum = t.Cumsum(mass, 1, False)
    total = mk.take(cum, [width - 1], 1)
    off = t.Sub(cum, t.Mul(mk.reshape(u, (1, 1)), total))
    far = mk.full((1, 1), -3.4e38)
    minus = t.Sub(mk.full((1, width), 0.0), off)
    near = t.Where(t.Less(minus, off), minus, off)  # -|off|; the last step is no threshold
    inner = mk.take(near, range(width - 1), 1) if width > 1 else far
    return t.Sub(mk.full((1,), 0.0), t.ReduceMax(inner, 1))


def greedy(logits: Op, window: Op) -> Verdict:
    """Accept d_i while it is argmax p_{i-1}; the carry is argmax p_s."""
    n = tensor(logits).shape[0]
    best = t.ArgMax(logits)
    same = t.Equal(mk.take(window, range(1, n)), mk.take(best, range(n - 1)))
    committed = leading(same)
    carry = row_at(mk.reshape(best, (n, 1)), before(committed))
    return Verdict(committed, mk.reshape(carry, ()), lead(logits, best))


def lead(logits: Op, best: Op) -> Op:
    """Largest minus second largest logit, per row."""
    n, width = tensor(logits).shape
    hit = t.Equal(mk.reshape(best, (n, 1)), mk.const(np.arange(width).reshape(1, width)))
    others = t.Where(hit, mk.full((1, 1), -3.4e38), logits)
    return t.Sub(t.ReduceMax(logits, 1), t.ReduceMax(others, 1))


def emitted(window: Op, verdict: Verdict) -> Op:
    """d_2..d_s, the carry, then -1: i64[n]."""
    (n,) = tensor(window).shape
    index = mk.const(np.arange(n))
    last = mk.reshape(before(verdict.committed), (1,))
    none = mk.const(np.full(n, -1))
    shifted = mk.concat([mk.take(window, range(1, n)), mk.const(np.full(1, -1))])
    carry = t.Where(t.Equal(index, last), mk.reshape(verdict.carry, (1,)), none)
    return t.Where(t.Less(index, last), shifted, carry)
