"""Lowering of the longest suffix: one perfect hash table asked for every length at once.

The ids of a suffix of length l are packed into W integers (digits in base V + 1, 0 for "none"), so
that comparing them with the table's is exact. Hash and displace: the slot of packed words w is
(h2(w) + d[h1(w) mod B]) mod T, with displacements d chosen so that no two keys share a slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Graph
from pcc.backends.onnx.rules import lowers
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import tensor
from pcc.tensor.ngram import LongestSuffix

Ints = np.ndarray[Any, np.dtype[np.int64]]
PRIME = 2**31 - 1
HALF = 2**31
LENGTH = 1 << 32  # a hit is coded as length * LENGTH + value, so that the longest is the largest
SEEDS = 64  # a random choice fails in about half of the cases


@dataclass(frozen=True)
class Table:
    """A perfect hash table: `words [T,W]` (-1: empty), `values [T]`, `shift [B]`."""

    base: int
    digits: int  # ids in one word
    factors: Ints  # [2,2W], for the low and high halves of the words
    shift: Ints
    words: Ints
    values: Ints

    def hashes(self, words: Ints) -> tuple[Ints, Ints]:
        """Return h1 and h2 of packed words [..,W]; halves, since words reach beyond the prime."""
        halves = np.concatenate([words % HALF, words // HALF], axis=-1)
        h = [(halves * f % PRIME).sum(axis=-1) for f in self.factors]
        return h[0], h[1]


def packed(keys: Ints, base: int, digits: int) -> Ints:
    """Return keys [T,L] as words [T,W]: sum_i (id_i + 1) base^i over each group of digits."""
    count, longest = keys.shape
    width = -(-longest // digits) * digits
    padded = np.zeros((count, width), np.int64)
    padded[:, :longest] = keys + 1
    power = np.array([base**i for i in range(digits)], np.int64)
    return np.asarray((padded.reshape(count, -1, digits) * power).sum(axis=-1))


@lru_cache(maxsize=4)
def table_of(keys: Array, values: Array) -> Table:
    """Return a perfect hash table of distinct keys."""
    base = int(keys.value.max()) + 2
    digits = int(62 / math.log2(base))
    words = packed(keys.value, base, digits)
    for seed in range(SEEDS):
        factors = np.random.default_rng(seed).integers(1, PRIME, (2, 2 * words.shape[1]))
        found = _place(words, values.value, base, digits, factors)
        if found is not None:
            return found
    what = f"no perfect hash of {len(words)} words was found"
    raise PccError("E412", what, hint="a word may occur twice in the dictionary")


def _place(words: Ints, values: Ints, base: int, digits: int, factors: Ints) -> Table | None:
    count = len(words)
    size, buckets = count + count // 4 + 1, count // 2 + 1
    shift = np.zeros(buckets, np.int64)
    table = np.full((size, words.shape[1]), -1, np.int64)
    out = Table(base, digits, factors, shift, table, np.zeros(size, np.int64))
    h1, h2 = out.hashes(words)
    bucket, spot = h1 % buckets, h2 % size
    if len(np.unique(bucket * size + spot)) < count:
        return None  # two keys of a bucket would move together
    order = np.argsort(bucket, kind="stable")
    groups = np.split(order, np.unique(bucket[order], return_index=True)[1][1:])
    empty = np.ones(size, np.bool_)
    for group in sorted((x for x in groups if len(x) > 1), key=len, reverse=True):
        move = _free(empty, spot[group])
        if move is None:
            return None
        slots = (spot[group] + move) % size
        empty[slots], shift[bucket[group[0]]] = False, move
        table[slots], out.values[slots] = words[group], values[group]
    # A key alone in its bucket goes to any empty slot.
    single = np.array([group[0] for group in groups if len(group) == 1], np.int64)
    slots = np.flatnonzero(empty)[: len(single)]
    shift[bucket[single]] = (slots - spot[single]) % size
    table[slots], out.values[slots] = words[single], values[single]
    return out


def _free(empty: np.ndarray[Any, np.dtype[np.bool_]], spots: Ints) -> int | None:
    """Return the least shift that puts all of `spots` on empty places."""
    size, step = len(empty), 64
    for first in range(0, size, step):
        moves = np.arange(first, min(first + step, size))
        good = empty[(spots[:, None] + moves) % size].all(axis=0)
        if good.any():
            return int(moves[good.argmax()])
    return None


@lowers(LongestSuffix)
def _(g: Graph, n: LongestSuffix) -> ir.Value:
    table = table_of(n.keys, n.values)
    count, longest = tensor(n).shape[0], n.keys.shape[1]
    back = longest - 1 + np.arange(count)[:, None] - np.arange(longest)
    ids = g("Add", g.values[n.x], g.const(np.int64(1)))
    recent = g("Gather", ids, g.const(back), axis=-1)  # [..,N,L], newest first
    words = _suffix_words(g, table, recent, longest)
    slot = _slot(g, table, words)
    same = g("Equal", g("Gather", g.const(table.words), slot, axis=0), words)
    hit = g.reduce("ReduceMin", g("Cast", same, to=ir.DataType.INT32), [-1])
    code = g("Gather", g.const(table.values), slot, axis=0)
    code = g("Add", code, g.const(np.arange(1, longest + 1) * LENGTH))
    code = g("Mul", code, g("Cast", hit, to=ir.DataType.INT64))
    if n.alone.shape[0] and longest > 1:
        code = g("Mul", code, _lengths(g, n, recent, table.base))
    best = g.reduce("ReduceMax", code, [-1])
    known = g("Greater", best, g.const(np.int64(0)))
    value = g("Mod", best, g.const(np.int64(LENGTH)))
    return g("Where", known, value, g.const(np.int64(n.other)))  # type: ignore[no-any-return]


def _suffix_words(g: Graph, table: Table, recent: ir.Value, longest: int) -> ir.Value:
    """Return the packed words [..,N,L,W] of the suffixes of lengths 1..L."""
    power = np.array([table.base ** (i % table.digits) for i in range(longest)], np.int64)
    value = g("Mul", recent, g.const(power))
    count = -(-longest // table.digits)
    ends = [min((w + 1) * table.digits, longest) for w in range(count)]
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    parts = g("Split", value, g.ints(*sizes), outputs=count, axis=-1) if count > 1 else [value]
    sums = [g("CumSum", part, g.const(np.int64(-1))) for part in parts]
    zero = g("Mul", g("Slice", value, g.ints(0), g.ints(1), g.ints(-1)), g.const(np.int64(0)))
    joined = g("Concat", zero, *sums, axis=-1)  # column i: the partial sum that ends with digit i
    index = [
        [0 if n <= w * table.digits else min(n, ends[w]) for w in range(count)]
        for n in range(1, longest + 1)
    ]
    return g("Gather", joined, g.const(np.array(index)), axis=-1)  # type: ignore[no-any-return]


def _slot(g: Graph, table: Table, words: ir.Value) -> ir.Value:
    prime, half = g.const(np.int64(PRIME)), g.const(np.int64(HALF))
    halves = g("Concat", g("Mod", words, half), g("Div", words, half), axis=-1)
    h1, h2 = (
        g.reduce("ReduceSum", g("Mod", g("Mul", halves, g.const(f)), prime), [-1])
        for f in table.factors
    )
    bucket = g("Mod", h1, g.const(np.int64(len(table.shift))))
    shifted = g("Add", h2, g("Gather", g.const(table.shift), bucket, axis=0))
    return g("Mod", shifted, g.const(np.int64(len(table.words))))  # type: ignore[no-any-return]


def _lengths(g: Graph, n: LongestSuffix, recent: ir.Value, base: int) -> ir.Value:
    """Return 1 for the lengths that may count, 0 for those above 1 at an id that stands alone."""
    longest = n.keys.shape[1]
    top = max(base, int(n.alone.value.max()) + 2)
    allowed = np.ones((top, longest), np.int64)
    allowed[n.alone.value + 1, 1:] = 0
    newest = g("Slice", recent, g.ints(0), g.ints(1), g.ints(-1))
    newest = g("Min", newest, g.const(np.int64(top - 1)))
    rows = g("Gather", g.const(allowed), g("Squeeze", newest, g.ints(-1)), axis=0)
    return rows  # type: ignore[no-any-return]
