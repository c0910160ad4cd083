"""Pearson's goodness of fit: counts against a law, cells pooled to at least five expected."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np

Values = np.ndarray[Any, Any]
LEAST = 5.0


def pooled(counts: Values, expected: Values) -> tuple[Values, Values]:
    """Join the cells of smallest expectation until each cell expects at least `LEAST`."""
    order = np.argsort(expected, kind="stable")
    counts, expected = counts[order], expected[order]
    few = int(np.searchsorted(expected, LEAST))
    while few and few < len(expected) and expected[:few].sum() < LEAST:
        few += 1
    if not few:
        return counts, expected
    return (
        np.concatenate([[counts[:few].sum()], counts[few:]]),
        np.concatenate([[expected[:few].sum()], expected[few:]]),
    )


def p_value(counts: Values, law: Values) -> float:
    """Return the probability of a larger Pearson statistic if `law` is the law of the counts."""
    counts, expected = pooled(counts.ravel().astype(float), law.ravel() * counts.sum())
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    tail = mpmath.gammainc((len(counts) - 1) / 2, chi2 / 2, mpmath.inf, regularized=True)
    return float(tail)
