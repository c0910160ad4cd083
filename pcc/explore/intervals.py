"""Figures over prompts with 95 % intervals: a bootstrap that draws whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pcc.explore.records import Interval

DRAWS = 2000
Values = np.ndarray[Any, Any]


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """sum(above) / sum(below); prompts, not rounds, are independent of each other."""
    a, b = np.asarray(above, float), np.asarray(below, float)
    index = _draws(len(a), seed)
    ends = _ends(a[index].sum(1) / b[index].sum(1)) if len(a) > 1 else (None, None)
    return {"value": float(a.sum() / b.sum()), "low": ends[0], "high": ends[1]}


def median(values: Sequence[float], seed: int = 0) -> Interval:
    """Median over prompts: one prompt that met a busy machine does not move it."""
    v = np.asarray(values, float)
    ends = _ends(np.median(v[_draws(len(v), seed)], 1)) if len(v) > 1 else (None, None)
    return {"value": float(np.median(v)), "low": ends[0], "high": ends[1]}


def _draws(count: int, seed: int) -> Values:
    return np.random.default_rng([seed, count]).integers(count, size=(DRAWS, count))


def _ends(values: Values) -> tuple[float | None, float | None]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
