"""A file of trained arrays: each once, one in memory at a time, hashed while it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcc.ir.array import Array

Values = np.ndarray[Any, Any]
PAGE, LINE = 4096, 64  # alignment of large arrays (memory-mapped) and of the others
LARGE = 1 << 20  # bytes
STRIP = 1 << 25  # elements of a transpose that are made at once
LANES = 16  # rows that are turned at once: four times as fast as 256
REPORT = 1 << 30  # bytes between two lines of progress


class Spot(NamedTuple):
    """Where an array lies in the file."""

    offset: int
    length: int


class WeightFile:
    """Writes arrays one after another; equal bytes lie there once.

    `turned`: a `[.., D]` is written as `[D, ..]` over two axes, as matrix products want it.
    A lazy array is streamed, which makes its content hash known. `sha256` is the file's hash
    after `close`.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path, self.say = path, say
        self._out = path.open("wb")
        self._sha: Any = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._placed: dict[object, Spot] = {}
        self._arrays: dict[tuple[Array, bool], Spot] = {}
        self._reported = 0
        self.sha256 = ""

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the file and its hash."""
        if not self._out.closed:
            self._settle()
            self._hasher.shutdown()
            self._out.close()
            self.sha256 = self._sha.hexdigest()

    # ------------------------------------------------------------ what is written

    def put(self, values: Values) -> Spot:
        """Write an array that is in memory."""
        values = np.ascontiguousarray(values)
        key = (values.nbytes, hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest())
        if key not in self._placed:
            self._placed[key] = self._write([values.reshape(-1)], values.nbytes)
        return self._placed[key]

    def place(self, array: Array, turned: bool = False) -> Spot:
        """Write a trained array, or its transpose."""
        turned = turned and len(array.shape) > 1
        if (array, turned) not in self._arrays:
            self._arrays[array, turned] = self._placed_array(array, turned)
        return self._arrays[array, turned]

    def find(self, array: Array) -> tuple[Spot, bool] | None:
        """Return where an array lies that was placed, and whether turned."""
        for turned in (False, True):
            if (spot := self._arrays.get((array, turned))) is not None:
                return spot, turned
            if array.recipe is not None and (spot := self._placed.get(_key(array, turned))):
                return spot, turned  # in another shape
        if array.recipe is None:
            values = array.value.reshape(-1)
            key = (values.nbytes, hashlib.sha256(values.view(np.uint8).data).digest())
            if (spot := self._placed.get(key)) is not None:
                return spot, False
        return None

    def _placed_array(self, array: Array, turned: bool) -> Spot:
        if array.recipe is None:
            return self.put(_matrix(array.value).T if turned else array.value)
        key = _key(array, turned)
        if key not in self._placed:  # lazy arrays that differ in shape only share a place
            parts = _strips(array.value) if turned else array.parts()
            self._placed[key] = self._write(parts, array.nbytes)
        return self._placed[key]

    # ------------------------------------------------------------ bytes

    def _write(self, parts: Iterable[Values], length: int) -> Spot:
        step = PAGE if length >= LARGE else LINE
        self._emit(np.zeros(-self._out.tell() % step, np.uint8))
        start = self._out.tell()
        for part in parts:
            self._emit(np.ascontiguousarray(part).view(np.uint8))
        assert self._out.tell() == start + length
        self._report()
        return Spot(start, length)

    def _emit(self, raw: Values) -> None:
        """Write bytes while another thread hashes them (both release the interpreter)."""
        self._settle()
        if raw.size:
            self._hashing = self._hasher.submit(self._sha.update, raw.data)
            self._out.write(raw.data)

    def _settle(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _report(self) -> None:
        if self.say is not None and self._out.tell() - self._reported >= REPORT:
            self._reported = self._out.tell()
            self.say(f"{self.path.name}: {self._reported / 1e9:.1f} GB written")


def _key(array: Array, turned: bool) -> object:
    """Name the bytes of a lazy array: those of another shape are the same, unless turned."""
    assert array.recipe is not None
    return array.recipe.identity, array.dtype, array.shape[-1] if turned else 0


def _matrix(values: Values) -> Values:
    """Return `[.., D]` over two axes."""
    return values.reshape(-1, values.shape[-1])


def _strips(values: Values) -> Iterator[Values]:
    """Yield the transpose of `[.., D]`, some of its rows at a time."""
    matrix = _matrix(values)
    rows, columns = matrix.shape
    step = max(1, STRIP // max(rows, 1))
    for i in range(0, columns, step):
        out = np.empty((min(step, columns - i), rows), values.dtype)
        for r in range(0, rows, LANES):
            out[:, r : r + LANES] = matrix[r : r + LANES, i : i + step].T
        yield out.reshape(-1)
