"""How an array that is too large to keep is made, each time it is needed, part by part.

A recipe is named by what it reads and does (file, place, rule), never by the numbers: two arrays
of one recipe are one object before anything was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Values: TypeAlias = np.ndarray[Any, Any]
PART = 1 << 22  # elements that are made at once


@dataclass(frozen=True)
class Recipe:
    """Makes the elements `start..stop-1`, in row-major order, of one array.

    `identity`: equal for two recipes only if they make the same bytes of the same dtype and shape.
    `read(start, stop)` returns them flat. Where any part costs as much as all (a transpose),
    `whole()` makes all, and `read` is not called for less. `rows`: where each index of the first
    axis comes from, (identity, index) pairs, if the array is a selection of others' rows.
    `cast`: makes the recipe of the nearest numbers of another dtype, where there is a shorter way
    than to make these and round them. `noise`: seed, name and scale of random numbers
    (`pcc.ir.noise`), which need not be stored. `columns`: of a matrix [D,K] whose columns are read
    one after another: makes its recipe as 8-bit integers, and the K scales (`pcc.ir.quantise`).
    What is read from a file must be checked by the recipe: an array of one holds no NaN.
    """

    identity: str
    read: Callable[[int, int], Values]
    whole: Callable[[], Values] | None = None
    rows: tuple[tuple[str, int], ...] | None = None
    cast: Callable[[str], Recipe] | None = None
    noise: tuple[int, str, float] | None = None
    columns: Callable[[], tuple[Recipe, Values]] | None = None

    def part(self, start: int, stop: int) -> Values:
        """Return elements `start..stop-1`, flat, whatever it costs."""
        if self.whole is None:
            return self.read(start, stop)
        return self.whole().reshape(-1)[start:stop]

    def parts(self, size: int, step: int = PART) -> Iterator[Values]:
        """Yield all elements in flat pieces of up to `step`."""
        if self.whole is not None:
            flat = self.whole().reshape(-1)
            yield from (flat[i : i + step] for i in range(0, size, step))
        else:
            yield from (self.read(i, min(i + step, size)) for i in range(0, size, step))


def named(*parts: object) -> str:
    """Return an identity of bounded length from what a recipe depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def selected(
    sources: Sequence[tuple[Recipe, int]], picks: Sequence[tuple[int, int]], width: int
) -> Recipe:
    """Return the recipe of rows of others, one after another.

    `sources`: (recipe, number of rows) each; `picks`: (source, row) for each row of the result;
    rows have `width` elements.
    """
    keys = [r.rows or tuple((r.identity, i) for i in range(n)) for r, n in sources]
    rows = tuple(keys[s][i] for s, i in picks)

    def read(start: int, stop: int) -> Values:
        out: list[Values] = []
        while start < stop:
            (source, row), at = picks[start // width], start % width
            take = min(stop - start, width - at)
            # Rows that follow one another in one source are read at once.
            step = start // width + 1
            while take < stop - start and step < len(picks) and picks[step] == (
                source, row + step - start // width
            ):  # fmt: skip
                take = min(stop - start, take + width)
                step += 1
            first = row * width + at
            out.append(sources[source][0].part(first, first + take))
            start += take
        return out[0] if len(out) == 1 else np.concatenate(out)

    return Recipe(named("rows", rows, width), read, None, rows)
