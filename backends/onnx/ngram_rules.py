"""Lowering of the longest suffix: one perfect hash table asked for every length at once.

A suffix of length l has digits d_i = id_i + 1 for i < l and zeros from there on, newest first. They
are packed into W integers, in a base with one digit more for ids that no key has, so that comparing
them with the table's is exact. Hash and displace: with h_k = sum_(i<l) (d_i f_ki mod p), which a
running sum gives for all lengths, and |a, b|_M = (a mod M_1) M_2 + b mod M_2,

    slot = (|h_3, h_4|_S + shift[|h_1, h_2|_B]) mod S_1 S_2,

with displacements such that no two keys share a slot. Four small hashes instead of two: where the
vocabulary allows, p and W are such that no number reaches 2^22. A runtime whose integers have 32
bits may divide them as floats: TensorRT 8.6 finds other remainders of numbers around 2^30. So all
divisors are powers of two, of which floats have exact reciprocals, but for the prime p, of which
d f is no multiple unless it is 0.
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
MOST = 2**22  # of 24 bits that a float has, two less: a quotient may be off by a few of its last
# So large that the constant itself tells a runtime of 32 bits that it cannot have this graph.
WIDE_PRIME = 2**31 + 11
WIDE_BITS = 62
SPARSE = 4  # a hash has so many times as many values as what it is divided by, at least
SEEDS = 64  # a random choice fails in about half of the cases


@dataclass(frozen=True)
class Table:
    """A perfect hash table: `words [T,W]` (-1: empty), `values [T]`, `shift [B]`."""

    base: int
    digits: int  # in one word
    prime: int
    factors: Ints  # [4,L]
    buckets: tuple[int, int]  # B = B_1 B_2
    slots: tuple[int, int]  # T = S_1 S_2
    shift: Ints
    words: Ints
    values: Ints

    def hashes(self, digits: Ints) -> tuple[Ints, Ints]:
        """Return buckets and undisplaced slots of digits [..,L]."""
        h = [(digits * f % self.prime).sum(axis=-1) for f in self.factors]
        (b1, b2), (s1, s2) = self.buckets, self.slots
        return h[0] % b1 * b2 + h[1] % b2, h[2] % s1 * s2 + h[3] % s2


def packed(digits: Ints, base: int, size: int) -> Ints:
    """Return digits [T,L] as words [T,W]: sum_i d_i base^i over each group of `size` digits."""
    count, longest = digits.shape
    padded = np.zeros((count, -(-longest // size) * size), np.int64)
    padded[:, :longest] = digits
    power = np.array([base**i for i in range(size)], np.int64)
    return np.asarray((padded.reshape(count, -1, size) * power).sum(axis=-1))


@lru_cache(maxsize=4)
def table_of(keys: Array, values: Array) -> Table:
    """Return a perfect hash table of distinct keys."""
    digits: Ints = keys.value + 1
    (count, longest), base = digits.shape, int(digits.max()) + 2
    buckets, slots = _factored(count // 2 + 1), _factored(count + count // 8 + 1)
    # Digits that differ do so modulo p.
    prime = _prime(MOST // max(base, longest), max(base, SPARSE * slots[0]))
    narrow = prime < MOST and 2 * math.prod(slots) < MOST
    size, most = 1, MOST if narrow else 2**WIDE_BITS
    prime = prime if narrow else WIDE_PRIME
    while base ** (size + 1) <= most:
        size += 1
    for seed in range(SEEDS):
        factors = np.random.default_rng(seed).integers(1, prime, (4, longest))
        held = math.prod(slots)
        words = np.full((held, -(-longest // size)), -1, np.int64)
        shift = np.zeros(math.prod(buckets), np.int64)
        empty = np.zeros(held, np.int64)
        table = Table(base, size, prime, factors, buckets, slots, shift, words, empty)
        if _place(table, digits, values.value):
            return table
    what = f"no perfect hash of {count} words was found"
    raise PccError("E412", what, hint="a word may occur twice in the dictionary")


def _factored(least: int) -> tuple[int, int]:
    """Return two powers of two, the second the first or half of it, of product `least` or more."""
    bits = max(least - 1, 0).bit_length()
    return 1 << (bits + 1) // 2, 1 << bits // 2


def _prime(most: int, least: int) -> int:
    """Return the largest prime up to `most`, or the wide one where there is none from `least`."""
    for p in range(most, max(least, 3) - 1, -1):
        if p % 2 and all(p % d for d in range(3, int(p**0.5) + 1, 2)):
            return p
    return WIDE_PRIME


def _place(table: Table, digits: Ints, values: Ints) -> bool:
    """Fill a table; return whether every key has a slot of its own."""
    size = len(table.values)
    words = packed(digits, table.base, table.digits)
    bucket, spot = table.hashes(digits)
    if len(np.unique(bucket * size + spot)) < len(words):
        return False  # two keys of a bucket would move together
    order = np.argsort(bucket, kind="stable")
    groups = np.split(order, np.unique(bucket[order], return_index=True)[1][1:])
    empty = np.ones(size, np.bool_)
    for group in sorted((x for x in groups if len(x) > 1), key=len, reverse=True):
        move = _free(empty, spot[group])
        if move is None:
            return False
        slots = (spot[group] + move) % size
        empty[slots], table.shift[bucket[group[0]]] = False, move
        table.words[slots], table.values[slots] = words[group], values[group]
    # A key alone in its bucket goes to any empty slot.
    single = np.array([group[0] for group in groups if len(group) == 1], np.int64)
    slots = np.flatnonzero(empty)[: len(single)]
    table.shift[bucket[single]] = (slots - spot[single]) % size
    table.words[slots], table.values[slots] = words[single], values[single]
    return True


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
    digits = g("Add", g.values[n.x], g.const(np.int64(1)))
    digits = g("Min", digits, g.const(np.int64(table.base - 1)))
    recent = g("Gather", digits, g.const(back), axis=-1)  # [..,N,L], newest first
    slot = _slot(g, table, recent)
    hit = _hit(g, table, recent, slot, longest)
    if n.alone.shape[0] and longest > 1:
        hit = g("Mul", hit, _lengths(g, n, recent, table.base))
    length = g("Mul", hit, g.const(np.arange(1, longest + 1)))
    best = g.reduce("ReduceMax", length, [-1])
    known = g("Greater", best, g.const(np.int64(0)))
    chosen = g("Equal", length, g("Unsqueeze", g("Max", best, g.const(np.int64(1))), g.ints(-1)))
    value = g("Gather", g.const(table.values), slot, axis=0)
    value = g("Mul", value, g("Cast", chosen, to=ir.DataType.INT64))
    found = g.reduce("ReduceSum", value, [-1])
    return g("Where", known, found, g.const(np.int64(n.other)))  # type: ignore[no-any-return]


def _hit(g: Graph, table: Table, recent: ir.Value, slot: ir.Value, longest: int) -> ir.Value:
    """Return 1 where the suffix [..,N,L] of a length is what stands in its slot, else 0."""
    words = _suffix_words(g, table, recent, longest)
    same = g("Equal", g("Gather", g.const(table.words), slot, axis=0), words)
    all_same = g.reduce("ReduceMin", g("Cast", same, to=ir.DataType.INT32), [-1])
    return g("Cast", all_same, to=ir.DataType.INT64)  # type: ignore[no-any-return]


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


def _slot(g: Graph, table: Table, recent: ir.Value) -> ir.Value:
    """Return the slots [..,N,L] of the suffixes of lengths 1..L."""
    prime = g.const(np.int64(table.prime))
    h = [
        g("CumSum", g("Mod", g("Mul", recent, g.const(f)), prime), g.const(np.int64(-1)))
        for f in table.factors
    ]
    bucket, spot = _joined(g, h[0], h[1], table.buckets), _joined(g, h[2], h[3], table.slots)
    moved = g("Add", spot, g("Gather", g.const(table.shift), bucket, axis=0))
    return g("Mod", moved, g.const(np.int64(len(table.values))))  # type: ignore[no-any-return]


def _joined(g: Graph, a: ir.Value, b: ir.Value, sizes: tuple[int, int]) -> ir.Value:
    """Return |a, b|: one number of two remainders."""
    first, second = (g.const(np.int64(m)) for m in sizes)
    high = g("Mul", g("Mod", a, first), second)
    return g("Add", high, g("Mod", b, second))  # type: ignore[no-any-return]


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
