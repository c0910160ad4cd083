"""The weight file of an engine: each array once, in the order of the kernels that read it."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcc.backends.cuda.piece import Weight
from pcc.backends.cuda.plan import ITEM, aligned
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.recipe import named

WORKERS = 8
AHEAD = (
    512 << 20
)  # bytes of arrays that are packed or wait to be written: each needs thrice as much
LARGE = 256 << 20  # bytes of an array that is not held as a whole


def plain(array: Array) -> Weight:
    """Return an array as it is, in row-major order."""
    identity = array.ref if array.recipe is None else array.recipe.identity
    return Weight(named("array", identity), array.dtype, array.size, array.parts)


class WeightFile:
    """Arrays that the graphs of one bundle read, each at its offset; written part by part."""

    def __init__(self) -> None:
        self.size = 0
        self._offsets: dict[str, int] = {}
        self._weights: list[Weight] = []

    def offset(self, weight: Weight) -> int:
        """Return where an array lies; a new one goes to the end."""
        if weight.key not in self._offsets:
            self._offsets[weight.key] = self.size
            self._weights.append(weight)
            self.size += aligned(max(1, weight.size * ITEM[weight.dtype]))
        return self._offsets[weight.key]

    def write(self, path: Path, say: Callable[[str], None] = lambda _: None) -> str:
        """Write the file, few arrays at a time in memory; return its SHA-256. Errors: E181."""
        digest, done, told = hashlib.sha256(), 0, 0
        with path.open("xb") as out:
            for w, parts in self._made():
                begin = done
                for part in parts:
                    data = part.reshape(-1).view("u1").data
                    out.write(data)
                    digest.update(data)
                    done += data.nbytes
                if done - begin != w.size * ITEM[w.dtype]:
                    raise PccError("E181", f"a weight of {w.size} numbers came out differently")
                gap = bytes(aligned(max(1, done - begin)) - (done - begin))
                out.write(gap)
                digest.update(gap)
                done += len(gap)
                if done - told > 1 << 30:
                    told = done
                    say(f"weights: {done / 2**30:.1f} of {self.size / 2**30:.1f} GiB")
        return digest.hexdigest()

    def _made(self) -> Iterator[tuple[Weight, Iterable[NDArray[np.generic]]]]:
        """Yield arrays in order; the next ones are packed meanwhile, very large ones as they come.

        NumPy lets other threads run while it copies.
        """
        ahead: deque[tuple[Weight, Future[list[NDArray[np.generic]]]]] = deque()
        held = 0
        with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
            for w in self._weights:
                size = w.size * ITEM[w.dtype]
                while ahead and (held + size > AHEAD or size > LARGE):
                    first, made = ahead.popleft()
                    held -= first.size * ITEM[first.dtype]
                    yield first, made.result()
                if size > LARGE:
                    yield w, w.parts()
                else:
                    ahead.append((w, pool.submit(_listed, w)))
                    held += size
            while ahead:
                first, made = ahead.popleft()
                yield first, made.result()


def _listed(w: Weight) -> list[NDArray[np.generic]]:
    return list(w.parts())
