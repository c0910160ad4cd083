"""The uniforms of drafting and verifying: Philox4x32-10, counter-based, so streams can be resumed.

key = (seed low, seed high), counter = (slot, role, length, stream), u = (word0 >> 8) 2^-24: a
multiple of 2^-24 in [0, 1), exact in float32 (Salmon et al. 2011; docs/generation.md, Randomness).
`length` is the input of the call that reads the uniform. Lengths grow with every call, so no
uniform is used twice, and a row's uniforms do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pcc.errors import PccError

ROLES = {"accept": 0, "carry": 1, "latent": 2, "token": 3}
AHEAD = 64  # lengths filled in one go for one row: many rounds' worth for the price of one

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
Words = np.ndarray[Any, np.dtype[np.uint64]]


def philox(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return the four 32-bit words of Philox4x32-10 for counters that broadcast together."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) & _LOW for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(
    seed: int, roles: Any, slots: Any, length: Any, stream: Any
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return u for broadcasting arrays of role numbers, slots, lengths and streams."""
    word, _, _, _ = philox((slots, roles, length, stream), split_seed(seed))
    return ((word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32)


def split_seed(seed: int) -> tuple[int, int]:
    """Return the key (low, high) of a seed in 0 .. 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise PccError("S101", f"seed {seed!r}", hint="an integer in 0 .. 2^64 - 1")
    return int(seed) & 0xFFFFFFFF, int(seed) >> 32


class Uniforms:
    """The uniforms of one graph's slots for every row, some lengths ahead of their use."""

    def __init__(self, seed: int, slots: Sequence[tuple[str, int]], streams: Sequence[int]) -> None:
        self.seed = seed
        self.roles = np.array([ROLES[role] for role, _ in slots], np.uint64)
        self.slots = np.array([slot for _, slot in slots], np.uint64)
        self.streams = np.array(streams, np.uint64)
        rows = len(self.streams)
        self.ahead = max(1, AHEAD // max(1, rows))  # large batches fill one call, all rows at once
        self.first = np.full(rows, -self.ahead, np.int64)
        self.tables = np.empty((rows, self.ahead, len(slots)), np.float32)
        self.rows = np.arange(rows)

    def fill(self, lengths: Any, out: np.ndarray[Any, Any]) -> None:
        """Write the uniforms of a call with these `length` inputs `[B]` into `out [B, K]`."""
        at = np.asarray(lengths) - self.first
        stale = (at < 0) | (at >= self.ahead)
        if stale.any():
            self._refill(np.flatnonzero(stale), np.asarray(lengths)[stale])
            at = np.where(stale, 0, at)
        out[:] = self.tables[self.rows, at]

    def _refill(self, rows: Any, lengths: Any) -> None:
        ahead = (
            lengths.astype(np.uint64)[:, None, None]
            + np.arange(self.ahead, dtype=np.uint64)[:, None]
        )
        streams = self.streams[rows][:, None, None]
        self.tables[rows] = uniforms(self.seed, self.roles, self.slots, ahead, streams)
        self.first[rows] = lengths
