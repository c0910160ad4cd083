"""Tensors of a head that are stored as rows of integers, by name (`pcc.frontends.rows`).

Names and shapes are known before a number is made, so that a reader can refuse them first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends.coded import STREAMS, Streams
from pcc.frontends.rows import (
    BITS,
    SCALE,
    bits_of,
    expect_scale,
    integers,
    packed_width,
    restore,
)
from pcc.frontends.unread import Shaped

Array = np.ndarray[Any, Any]
_STORED = (np.int8, np.uint8)


@dataclass(frozen=True)
class Scaled(Shaped):
    """A tensor s q f32[shape] whose integers q are made when it is asked for."""

    shape: tuple[int, ...]
    rows: Callable[[], Array] = field(repr=False)
    scale: Array = field(repr=False)
    at: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(restore(self.rows(), self.scale, self.at), dtype)


def scaled(named: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Replace rows of integers and what belongs to them by `Scaled`; others stay as they are.

    Errors: F113 (scales, bits or streams that do not fit the rows, or contradict each other).
    """
    whole = {k for k, v in named.items() if v.dtype in _STORED and k + SCALE in named}
    parts = {k + end for k in whole for end in (SCALE, BITS, STREAMS)}
    for key in sorted(whole & parts):
        what = "belongs to rows of integers, and has a scale of its own"
        raise PccError("F113", what, at=f"{at}:{key}", hint="store the tensor again")
    return {
        k: _scaled(named, k, f"{at}:{k}") if k in whole else v
        for k, v in named.items()
        if k not in parts
    }


def dequantise(named: Mapping[str, Array], at: str) -> dict[str, Array]:
    """Replace rows of integers, scales, bits and streams by float32. Errors: F104, F113."""
    return {k: np.asarray(v) for k, v in scaled(named, at).items()}


def _scaled(named: Mapping[str, Array], key: str, at: str) -> Scaled:
    """Return one tensor, in whichever of the three forms its rows are stored. Errors: F113."""
    stored, scale = named[key], named[key + SCALE]
    bits, fields = named.get(key + BITS), named.get(key + STREAMS)
    whole = stored.dtype == np.int8
    for end, there in ((BITS, whole or fields is not None), (STREAMS, whole)):
        if there and key + end in named:
            form = "8-bit" if whole else "coded"
            what = f"beside {form} rows, which have none"
            raise PccError("F113", what, at=f"{at}{end}", hint="store the tensor again")
    if fields is not None:
        streams = Streams.of(stored.shape, scale.shape, fields, at)
        expect_scale(streams.shape, scale, at)
        return Scaled(streams.shape, lambda: streams.rows(lambda i, j: stored[i:j]), scale, at)
    shape = stored.shape
    if not whole:
        size = bits_of(stored, bits, at)
        shape = (*shape[:-1], packed_width(shape[-1], size))
    expect_scale(shape, scale, at)
    return Scaled(shape, lambda: integers(stored, bits, at), scale, at)
