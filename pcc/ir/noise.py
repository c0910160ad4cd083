"""Random arrays of any size that are never held: runs of one block of normal numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pcc.ir.array import dtype_of
from pcc.ir.recipe import Recipe, named

Values = np.ndarray[Any, Any]
PERIOD = 4_194_301  # numbers of the block: a prime, so that no two rows of a matrix are equal


@dataclass(frozen=True)
class Noise:
    """Normal numbers of standard deviation `scale`, in the order in which they are asked for.

    Numbers of one seed are one block, begun elsewhere for each name: made at the speed of memory.
    """

    seed: int
    name: str
    scale: float

    def read(self, dtype: str, start: int, stop: int) -> Values:
        """Return numbers `start..stop-1`."""
        block = _block(self.seed, self.scale, dtype)
        out, done = np.empty(stop - start, block.dtype), 0
        at = (self.first + start) % PERIOD
        while done < out.size:
            run = min(PERIOD - at, out.size - done)
            out[done : done + run] = block[at : at + run]
            done, at = done + run, 0
        return out

    @property
    def first(self) -> int:
        """Where in the block the numbers begin."""
        return int(named(self.seed, self.name), 16) % PERIOD

    @property
    def step(self) -> np.float32:
        """What one of the integers of dtype "i8" stands for: of the block, the largest is 127."""
        return np.float32(np.abs(_block(self.seed, self.scale, "f32")).max() / np.float32(127))

    def recipe(self, dtype: str) -> Recipe:
        """Return the recipe of an array of any shape; "i8": of integers of `step` each."""
        identity = named("noise", self.seed, self.name, self.scale, dtype)
        again = (self.seed, self.name, self.scale)
        return Recipe(identity, lambda i, j: self.read(dtype, i, j), cast=self.recipe, noise=again)


@lru_cache(maxsize=8)
def _block(seed: int, scale: float, dtype: str) -> Values:
    if dtype == "i8":
        return np.rint(_block(seed, scale, "f32") / Noise(seed, "", scale).step).astype(np.int8)
    numbers = np.random.default_rng([seed, 61]).standard_normal(PERIOD, np.float32)
    return (numbers * np.float32(scale)).astype(dtype_of(dtype))
