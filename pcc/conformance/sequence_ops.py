"""Ops of sequence models and sampling on edge inputs, in each precision that they can occur in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.conformance.cases import Case, each
from pcc.conformance.core_ops import integer_products
from pcc.conformance.edge import values
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.tensor import ops as t
from pcc.tensor.eva import EvaAttention, RingChunks, RingWrite
from pcc.tensor.ngram import NONE, LongestSuffix
from pcc.tensor.nn import (
    CachedAttention,
    CacheWrite,
    Embedding,
    Gelu,
    LayerNorm,
    Relu,
    RmsNorm,
    Rotary,
    Silu,
    SortRank,
)  # fmt: skip
from pcc.tensor.sampling import Temper, Truncate

# A product of halves is exact, so only sums round: some tens of terms of up to a hundred. An
# implementation may round the weights of an attention to half: 2^-11 of the largest value for f16,
# 2^-8 for bf16, on values of a few units.
PRODUCT = 5e-5
ATTENTION = {"": 1e-5, "f16": 4e-3, "bf16": 3e-2}


def _const(kind: str, shape: tuple[int, ...], seed: int) -> t.Const:
    return t.Const(Array.of(values(kind, 1, shape, seed)[0]))


def _norms() -> Iterator[Case]:
    for shape, eps in (((3, 5), 1e-5), ((2, 3, 5), 1e-2), ((5,), 1e-5), ((2, 64), 1e-6)):
        w, b = _const("finite", shape[-1:], 1), _const("finite", shape[-1:], 2)
        operand = (("finite", shape),)
        yield Case(RmsNorm, operand, lambda x, w=w, e=eps: RmsNorm(x, w, e), 4e-6)
        yield Case(LayerNorm, operand, lambda x, w=w, b=b, e=eps: LayerNorm(x, w, b, e), 4e-6)
    for op in (Silu, Gelu, Relu):
        yield from each(op, ("finite",), ((3, 5),), ((1,),), ((2, 1, 4),), tolerance=4e-6)


def _tables(half: str) -> Iterator[Case]:
    at = f"@{half}" if half else ""
    table = _const(f"finite{at}", (7, 3), 3)
    for ids in ((4,), (), (2, 3)):
        made = (("index:7", ids),)
        yield Case(Embedding, made, lambda i, w=table, h=half: Embedding(w, i), 2e-6)
    if not half:
        cos, sin = (_const("uniform", (11, 2), k) for k in (4, 5))
        for shape in ((3, 2, 4), (1, 2, 7), (2, 1, 4)):
            operands = (("finite", shape), ("index:11", shape[1:2]))
            yield Case(Rotary, operands, lambda x, p, c=cos, s=sin: Rotary(x, p, c, s), 4e-6)


def _products(half: str) -> Iterator[Case]:
    """Products with stored halves: of one vector, of rows, of a head, at sizes that tiles split."""
    for eq, a, b in (
        ("d,dn->n", (5,), (5, 3)), ("nd,dk->nk", (3, 5), (5, 4)), ("nd,dk->nk", (17, 48), (48, 33)),
        ("nd,dk->nk", (1, 64), (64, 1)), ("d,abcd->abc", (6,), (2, 3, 4, 6)),
        ("d,abcd->abc", (40,), (3, 2, 9, 40)),
    ):  # fmt: skip
        w = _const(f"finite@{half}", b, 6)
        operand = (("finite", a),)
        yield Case(t.Contract, operand, lambda x, w=w, eq=eq: t.Contract(x, w, eq), PRODUCT)


def _caches(half: str) -> Iterator[Case]:
    """Writes into a cache and a ring, read back whole; and what reads a ring."""
    at = f"@{half}" if half else ""
    exact = 0.0 if half else 2e-6  # what is written is rounded once, and read as it is
    for cache, count in (((2, 9, 3), 4), ((1, 2, 3), 2), ((2, 5, 4), 1)):
        rows = cache[1] - count + 1
        new = (cache[0], count, cache[2])
        operands = ((f"finite{at}", cache), ("finite", new), (f"index:{rows}", ()))
        yield Case(CacheWrite, operands, lambda *x: _wide(CacheWrite(*x)), exact, "b")
        operands = (*operands[:2], ("count", ()))
        yield Case(RingWrite, operands, lambda *x: _wide(RingWrite(*x)), exact, "b")
    for ring, chunk, count in (((2, 10, 3), 2, 3), ((1, 8, 4), 4, 1), ((2, 12, 3), 4, 2)):
        pair = ((f"finite{at}", ring), ("count", ()))
        yield Case(
            RingChunks, pair, lambda r, s, c=chunk, k=count: RingChunks(r, s, c, k), exact, "kb"
        )


def _wide(cache: Op) -> Op:
    """Return a cache as f32: one chunk of all its rows."""
    start = t.Const(Array.of(np.int64(0)))
    return RingChunks(cache, start, tensor(cache).shape[1], 1)


def _attention(half: str) -> Iterator[Case]:
    at = f"@{half}" if half else ""
    for heads, shared, count, rows, window in (
        (2, 2, 3, 9, 0), (4, 2, 3, 9, 0), (6, 2, 1, 5, 0), (3, 1, 4, 4, 0),
        (4, 2, 3, 9, 2), (1, 1, 3, 8, 1), (2, 1, 2, 9, 30),
    ):  # fmt: skip
        operands = (
            ("finite", (heads, count, 4)), (f"finite{at}", (shared, rows, 4)),
            (f"finite{at}", (shared, rows, 3)), (f"index:{rows - count + 1}", ()),
        )  # fmt: skip
        yield Case(
            CachedAttention, operands,
            lambda q, k, v, s, w=window: CachedAttention(q, k, v, s, 0.4, w), ATTENTION[half], "b",
        )  # fmt: skip
    for heads, count, ring in ((2, 3, 24), (1, 1, 24), (3, 5, 12)):
        # Positions inside the first window, at both sides of an edge, and past several windows.
        starts = "sizes:0:5:6:7:8:15:16:21" if ring == 24 else "sizes:0:3:4:7:11"
        six = (
            ("finite", (heads, count, 4)), (f"finite{at}", (heads, ring, 4)),
            (f"finite{at}", (heads, ring, 4)), (f"finite{at}", (heads, 7, 4)),
            (f"finite{at}", (heads, 7, 4)), (starts, ()),
        )  # fmt: skip
        yield Case(
            EvaAttention,
            six,
            lambda q, k, v, a, b, s: EvaAttention(q, k, v, a, b, s, 0.5, 8, 4),
            ATTENTION[half],
            "b",
        )


def _sampling() -> Iterator[Case]:
    for shape in ((5,), (3, 6), (2, 1)):
        pair = (("logits", shape), ("setting", ()))
        yield Case(Temper, pair, Temper, 4e-6)
        three = (("law", shape), ("index:4", ()), ("setting", ()))
        yield Case(Truncate, three, Truncate, 4e-6)
    for kind in ("finite", "mass", "log"):
        yield from each(SortRank, (kind,), ((3, 6),), ((2, 9),), ((1,),))


def _words() -> Iterator[Case]:
    table = [[1, NONE, NONE], [2, 1, NONE], [1, 2, NONE], [2, 1, 0], [3, 3, 3], [0, NONE, NONE]]
    keys, rows = Array.of(np.array(table)), Array.of(np.arange(6) + 3)
    alone = Array.of(np.array([3]))
    for count in (1, 4, 9):
        operand = (("index:4", (count + 2,)),)
        yield Case(LongestSuffix, operand, lambda x: LongestSuffix(x, keys, rows, alone, 1))


def cases(halves: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """Return the cases in f32 and in each of the given half precisions."""
    out = [*_norms(), *_tables(""), *_caches(""), *_attention(""), *_sampling(), *_words()]
    for half in halves:
        out += [*_tables(half), *_products(half), *_caches(half), *_attention(half)]
        out += integer_products(half)
    return tuple(out)
