"""Pareto front of time per round against bytes per round, and the best choice on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of (ms, bytes) that no other point is at least as good as in both.

    Ordered by time; of equal points the first stays. O(N log N).
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    out: list[int] = []
    for i in order:
        if not out or points[i][1] > points[out[-1]][1]:
            out.append(i)
    return out


def best(
    items: Iterable[T], rate: Callable[[T], float], time: Callable[[T], float], limit: float = 0.0
) -> T | None:
    """Return the item of the highest rate among those with time <= limit (0: no limit)."""
    allowed = [x for x in items if not limit or time(x) <= limit]
    return max(allowed, key=rate, default=None)
