"""Value types, frozen and hashable. `str` is for messages; the text form prints every fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pcc.knobs import MAX_SHOWN_FOLDS

DTYPES = ("f32", "i64", "bool")  # of results of ops
HALVES = ("f16", "bf16")  # of stored values only: trained arrays and states
STORED = (*DTYPES, *HALVES)
INT8 = "i8"  # of trained arrays only: what `t.scaled_contract` multiplies
NARROW = (*HALVES, INT8)  # of values that an op must say how it takes
TRAINED = (*STORED, INT8)
BATCHES = ("", "c", "b")


def mask_of(variables: tuple[int, ...] | list[int]) -> int:
    """Return the bit mask of a set of variable indices."""
    out = 0
    for v in variables:
        out |= 1 << v
    return out


def variables_of(mask: int) -> list[int]:
    """Return the sorted variable indices of a bit mask."""
    return [v for first, last in runs_of(mask) for v in range(first, last + 1)]


def runs_of(mask: int) -> list[tuple[int, int]]:
    """Return the maximal runs [first, last] of consecutive variables in a mask."""
    out, base = [], 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        out.append((base + skip, base + skip + length - 1))
        mask >>= length
        base += skip + length
    return out


def show_scope(mask: int) -> str:
    """Print a scope as ``{0-3,7}``."""
    body = (str(a) if a == b else f"{a}-{b}" for a, b in runs_of(mask))
    return "{" + ",".join(body) + "}"


@dataclass(frozen=True, slots=True)
class Units:
    """`k` functions per fold; fold `f` is a function of the variables in the mask `scopes[f]`."""

    k: int
    scopes: tuple[int, ...]

    @property
    def folds(self) -> int:
        """Number of folds F."""
        return len(self.scopes)

    def __str__(self) -> str:
        shown = " ".join(map(show_scope, self.scopes[:MAX_SHOWN_FOLDS]))
        more = " .." if self.folds > MAX_SHOWN_FOLDS else ""
        return f"units<{self.folds}x{self.k}>[{shown}{more}]"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense array: `shape` per row, and which leading batch axis it has.

    `batch` is "" (none: a trained value), "c" (one row, or one per request row: what depends on
    the context only) or "b" (one per request row). They broadcast in this order.
    """

    dtype: str
    shape: tuple[int, ...]
    batch: str = ""

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return f"{self.dtype}[{self.batch + '|' if self.batch else ''}{dims}]"


Type: TypeAlias = Units | Tensor


def join_batch(*batches: str) -> str:
    """Return the batch axis of a value computed from operands with these batch axes."""
    return max(batches, key=BATCHES.index, default="")
