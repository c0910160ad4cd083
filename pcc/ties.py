"""Draws that another one would have replaced, had one uniform been a little different.

A uniform u picks the cell of a law in which it lies; rounding the law moves the edges of its cells.
So two implementations may draw otherwise where u lies near an edge, and both are right. That is
shown, not presumed: the reference itself gives the other answer when one uniform is moved by no
more than a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
UNIT = 2.0**-24  # uniforms are its multiples below 1
NARROW = 512  # cells narrower than this part of a bound are passed over


@dataclass(frozen=True)
class Shift:
    """Add `by` to the uniform of `slot` of one row in calls at a length."""

    row: int
    length: int
    slot: int
    by: float

    def move(self, u: np.ndarray[Any, Any]) -> None:
        """Move it in the uniforms `[B, K]` of a call, within their range, if it is there."""
        if self.row < u.shape[0] and self.slot < u.shape[1]:
            moved = np.float32(u[self.row, self.slot] + self.by)
            u[self.row, self.slot] = np.clip(moved, 0, np.float32(1 - UNIT))


def shifts(row: int, lengths: Sequence[int], slots: Iterable[int], bound: float) -> list[Shift]:
    """Return the shifts by a bound, up and down, of slots of a row in calls at these lengths."""
    return [
        Shift(row, length, slot, sign * bound)
        for length in lengths
        for slot in slots
        for sign in (1, -1)
    ]


@dataclass(frozen=True)
class Search(Generic[T]):
    """What was found: a shift and the reference's answer, or none after `tried` of them.

    `whole`: nothing was left out for want of tries.
    """

    tried: int
    whole: bool
    shift: Shift | None = None
    answer: T | None = None


def explained(
    far: Iterable[Shift],
    own: T,
    again: Callable[[Shift], T],
    agrees: Callable[[T], bool],
    same: Callable[[T, T], bool],
    *,
    halvings: int = 0,
    most: int | None = None,
) -> Search[T]:
    """Look for a shift with which the reference gives the other answer.

    `own` is the reference's answer, `again` asks for one with a shift, `agrees` says whether that
    is the other answer, `same` whether two are equal. Each of `far` is tried, halved `halvings`
    times first, then ever fewer. As a draw goes up with its uniform, what lies between two shifts
    with different answers is found by bisection, and between two with the same answer nothing is
    looked for. At most `most` are tried, if that is said.
    """
    tried = 0
    for first in far:
        steps = _steps(first, own, same, halvings)
        shift = next(steps, None)
        while shift is not None:
            if tried == most:
                return Search(tried, whole=False)
            answer, tried = again(shift), tried + 1
            if agrees(answer):
                return Search(tried, True, shift, answer)
            try:
                shift = steps.send(answer)
            except StopIteration:
                shift = None
    return Search(tried, whole=True)


def _steps(
    first: Shift, own: T, same: Callable[[T, T], bool], halvings: int
) -> Generator[Shift, T, None]:
    """Yield shifts of one uniform in one direction; each is sent its answer."""
    points: list[tuple[float, T]] = [(0.0, own)]
    for k in reversed(range(halvings + 1)):
        by = first.by / 2**k
        points.append((by, (yield replace(first, by=by))))
    for (x, a), (y, b) in pairwise(points):
        yield from _between(first, x, a, y, b, same)


def _between(
    first: Shift, x: float, a: T, y: float, b: T, same: Callable[[T, T], bool]
) -> Generator[Shift, T, None]:
    if same(a, b) or abs(x - y) < max(2 * UNIT, abs(first.by) / NARROW):
        return
    middle = (x + y) / 2
    c = yield replace(first, by=middle)
    yield from _between(first, x, a, middle, c, same)
    yield from _between(first, middle, c, y, b, same)
