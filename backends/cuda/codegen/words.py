"""Emitter of the longest suffix: a hash table with open addressing, asked for each length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pcc.backends.cuda.codegen.body import LOOP
from pcc.backends.cuda.codegen.tables import emits
from pcc.backends.cuda.codegen.work import LANES, Work
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.tensor.ngram import NONE, LongestSuffix

MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the ids over the upper bits
WORD = 2**64 - 1
FIELD = 40  # bits of a value, below the length of its key


@dataclass(frozen=True)
class Table:
    """`slots i64[size, L + 1]`: a key's ids, newest first, then its value; a first id -1: empty."""

    slots: Array
    bits: int
    probes: int  # slots that a search looks at, at most


def hashed(ids: list[int]) -> int:
    """Return the hash of some ids: h = (h + id + 1) * multiplier mod 2^64, one after another."""
    h = 0
    for i in ids:
        h = (h + i + 1) * MULTIPLIER & WORD
        h ^= h >> 29
    return h


@lru_cache(maxsize=4)
def table_of(keys: Array, values: Array) -> Table:
    """Return the hash table of a dictionary, at most half full."""
    count, longest = keys.shape
    bits = max(int(2 * count - 1).bit_length(), 1)
    slots: np.ndarray[Any, np.dtype[np.int64]] = np.full((1 << bits, longest + 1), NONE, np.int64)
    probes = 1
    for row, value in zip(keys.value.tolist(), values.value.tolist(), strict=True):
        at = hashed([i for i in row if i != NONE]) >> (64 - bits)
        tries = 1
        while slots[at, 0] != NONE:
            at, tries = (at + 1) % (1 << bits), tries + 1
        slots[at] = [*row, value]
        probes = max(probes, tries)
    return Table(Array.of(slots), bits, probes)


@emits("job", LongestSuffix)
def _(w: Work, n: LongestSuffix) -> None:
    """One warp for each position, a lane for each length: searches do not wait for each other."""
    table, longest = table_of(n.keys, n.values), n.keys.shape[1]
    if n.values.value.size and not 0 <= n.values.value.min() <= n.values.value.max() < 1 << FIELD:
        what = f"values of a dictionary are not within 0 .. 2^{FIELD} - 1"
        raise PccError("E188", what, at=n.loc)
    slots = w.program.table(table.slots)
    with w.over(w.program.shape(n)) as ix:
        lead, (i,) = w.parts(n, ix)
        b = w.body
        most = _most(w, n, lead, i)
        found = b.declare("long long", "0")  # length and value of the longest key
        k = b.name("i")
        with b.block(LOOP, f"for (int {k} = lane; {k} < {most}; {k} += {LANES}) {{", (k,)):
            h = _hash(w, n, lead, i, k)
            _search(w, n, (slots, table, found, h), lead, i, k)
        top = b.let("long long", f"warp_all<Largest>({found})")
        with b.block("branch", "if (lane == 0) {"):
            w.put(n, ix, f"({top} ? {top} & {(1 << FIELD) - 1:#x}LL : {n.other})")
    w.cost += 8 * longest


def _most(w: Work, n: LongestSuffix, lead: tuple[int | str, ...], i: int | str) -> str:
    """Return how many ids may be looked up: 1 where the newest stands alone."""
    longest, b = n.keys.shape[1], w.body
    newest = w.read(n.x, (*lead, _shifted(w, i, longest - 1)))
    most = b.declare("int", str(longest))
    if n.alone.value.size:
        known = w.program.table(n.alone)
        a, head = b.loop(n.alone.value.size)
        with b.block(LOOP, head, (a,)):
            b.emit(f"if ({known}[{a}] == {newest}) {most} = 1;")
    return most


def _hash(w: Work, n: LongestSuffix, lead: tuple[int | str, ...], i: int | str, k: str) -> str:
    """Return the hash of the newest k + 1 ids; leave the loop over k where there are fewer."""
    longest, b = n.keys.shape[1], w.body
    h, whole, j = b.declare("unsigned long long", "0"), b.declare("bool", "true"), b.name("i")
    with b.block(LOOP, f"for (int {j} = 0; {j} <= {k}; ++{j}) {{", (j,)):
        x = w.read(n.x, (*lead, b.let("int", f"{i} + {longest - 1} - {j}")))
        b.emit(f"if ({x} < 0) {whole} = false;")
        b.emit(f"{h} = ({h} + (unsigned long long){x} + 1) * {MULTIPLIER:#x}ULL;")
        b.emit(f"{h} ^= {h} >> 29;")
    b.emit(f"if (!{whole}) break;")
    return h


def _shifted(w: Work, i: int | str, by: int) -> int | str:
    return i + by if isinstance(i, int) else w.body.let("int", f"{i} + {by}")


def _search(
    w: Work,
    n: LongestSuffix,
    state: tuple[str, Table, str, str],
    lead: tuple[int | str, ...],
    i: int | str,
    k: str,
) -> None:
    """Look for the newest k + 1 ids; if they are a key, its value is the longest so far."""
    slots, table, found, h = state
    b, longest = w.body, n.keys.shape[1]
    probe, at, same = b.name("i"), b.name("i"), b.name("i")
    with b.block(LOOP, f"for (int {probe} = 0; {probe} < {table.probes}; ++{probe}) {{", (probe,)):
        mask = (1 << table.bits) - 1
        b.emit(
            f"const int {at} = (int)((({h} >> {64 - table.bits}) + {probe}) & {mask})"
            f" * {longest + 1};"
        )
        b.level[at] = len(b.stack) - 1
        b.emit(f"if ({slots}[{at}] < 0) break;")
        b.emit(f"bool {same} = true;")
        for m in range(longest):
            with b.block("branch", f"if ({same} && {m} <= {k}) {{"):
                x = w.read(n.x, (*lead, _shifted(w, i, longest - 1 - m)))
                b.emit(f"{same} = {slots}[{at} + {m}] == {x};")
            b.emit(f"else if ({same}) {same} = {slots}[{at} + {m}] < 0;")
        packed = f"(long long)({k} + 1) << {FIELD} | {slots}[{at} + {longest}]"
        b.emit(f"if ({same}) {{ {found} = {packed}; break; }}")
