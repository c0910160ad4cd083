"""The longest known word that ends at a position: a dictionary over the most recent ids."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op, Values
from pcc.ir.semiring import Semiring
from pcc.ir.types import Type
from pcc.tensor.nn import NetworkOp

NONE = -1  # in `x`: before the beginning of the text; in `keys`: beyond the end of the key


class LongestSuffix(NetworkOp, name="t.longest_suffix"):
    """y_i = values[j] of the longest keys[j] that x ends with at L - 1 + i, else `other`.

    `x i64[L-1+N]` (-1: before the beginning), y i64[N]. `keys [T,L]` hold their newest id first and
    -1 beyond their end. At an id in `alone` only keys of length 1 count. Keys are distinct and not
    empty, of ids below 2^31.
    """

    x: Op
    keys: Array
    values: Array
    alone: Array
    other: int

    def infer(self) -> Type:
        x = self.rank(self.x, 1, "x", "i64")
        keys, values, alone = self.keys, self.values, self.alone
        ok = len(keys.shape) == 2 and keys.shape[0] > 0 and values.shape == keys.shape[:1]
        ok = ok and len(alone.shape) == 1 and {keys.dtype, values.dtype, alone.dtype} == {"i64"}
        self.require(ok, "E110", f"keys {keys.shape}, values {values.shape}, {alone.shape}")
        enough = x.shape[0] >= keys.shape[1]
        self.require(enough, "E110", f"{x.shape[0]} ids for keys of up to {keys.shape[1]}")
        low = min(int(values.value.min()), self.other)
        self.require(0 <= low and int(values.value.max()) < 2**31, "E111", "a value below 0")
        ids = keys.value
        known = NONE <= int(ids.min()) and int(ids[:, 0].min()) >= 0 and int(ids.max()) < 2**31
        self.require(known, "E111", "a key without ids, or an id that is none")
        return self.like((x.shape[0] - keys.shape[1] + 1,), "i64")

    def eval(self, s: Semiring, *args: Values) -> Values:
        longest = self.keys.shape[1]
        words, alone = _words(self.keys, self.values), set(self.alone.value.tolist())
        out = np.empty((*args[0].shape[:-1], args[0].shape[-1] - longest + 1), np.int64)
        for *row, i in np.ndindex(*out.shape):
            recent = args[0][tuple(row)][i : i + longest][::-1].tolist()
            most = 1 if recent[0] in alone else longest
            found = (words.get(tuple(recent[:n])) for n in range(most, 0, -1))
            out[(*row, i)] = next((v for v in found if v is not None), self.other)
        return out


@lru_cache(maxsize=8)
def _words(keys: Array, values: Array) -> dict[tuple[int, ...], int]:
    rows = (tuple(i for i in row if i != NONE) for row in keys.value.tolist())
    return dict(zip(rows, values.value.tolist(), strict=True))
