"""Where scratch arrays lie: one arena, whose bytes are used again once nobody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pcc.backends.cuda.plan import aligned


@dataclass(frozen=True)
class Span:
    """An array of `size` bytes that is alive from launch `first` to launch `last`, inclusive."""

    size: int
    first: int
    last: int


def place(spans: Sequence[Span]) -> tuple[list[int], int]:
    """Return an offset for each span, and the size of the arena.

    Arrays whose lives overlap do not overlap in memory: off_i + size_i <= off_j or the reverse
    whenever first_i <= last_j and first_j <= last_i. Large ones are placed first, each at the
    lowest address that is free during its whole life.
    """
    offsets, total = [0] * len(spans), 0
    placed: list[tuple[int, int, Span]] = []  # (begin, end, span), in order of begin
    for i in sorted(range(len(spans)), key=lambda i: (-spans[i].size, i)):
        span, at = spans[i], 0
        size = aligned(max(span.size, 1))
        for begin, end, other in placed:
            if other.first > span.last or span.first > other.last:
                continue
            if begin >= at + size:
                break
            at = max(at, end)
        offsets[i], total = at, max(total, at + size)
        placed.append((at, at + size, span))
        placed.sort(key=lambda p: p[0])
    return offsets, total
