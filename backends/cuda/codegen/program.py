"""Values of a group and where they are: arrays, their pointers in the source, their layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor

CTYPES = {
    "f32": "float", "i64": "long long", "bool": "unsigned char",
    "f16": "unsigned short", "bf16": "unsigned short", "i8": "signed char", "i32": "int",
}  # fmt: skip
RESULTS = {
    "f32": "float", "i64": "long long", "bool": "bool", "f16": "float", "bf16": "float",
    "i8": "float",
}  # fmt: skip
SMALL = 1024  # elements of a constant that is written into the source
MOST = 2**31 - 1  # elements of an array: indices are 32 bits wide


@dataclass
class Memory:
    """One array in memory. `place`: "arg", "shared" or "scratch"; its pointer's name."""

    pointer: str
    dtype: str
    size: int
    place: str
    offset: int = 0


@dataclass(frozen=True)
class Storage:
    """Where the elements of a value lie: element ix at base + sum ix_k strides_k."""

    memory: Memory
    strides: tuple[int, ...]
    base: int = 0

    @property
    def dtype(self) -> str:
        """The dtype of the elements."""
        return self.memory.dtype


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense array."""
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= n
    return tuple(reversed(out))


@dataclass
class Program:
    """A group of nodes and its memory."""

    name: str
    batch: int
    arrays: list[tuple[str, Array]] = field(default_factory=list)  # written into the source
    indices: dict[tuple[int, ...], str] = field(default_factory=dict)
    weights: dict[Array, Memory] = field(default_factory=dict)  # arguments
    stored: dict[Op, Storage] = field(default_factory=dict)
    in_place: frozenset[Op] = frozenset()  # writes of rows into the cache itself
    uses: dict[Op, int] = field(default_factory=dict)  # how many nodes read a value
    pointers: int = 0

    def shape(self, n: Op) -> tuple[int, ...]:
        """Return the shape of a value, its batch axis first if it has one."""
        t = tensor(n)
        return (self.batch, *t.shape) if t.batch else t.shape

    def size(self, n: Op) -> int:
        """Return the number of elements of a value. Errors: E187."""
        size = math.prod(self.shape(n))
        if size > MOST:
            what = f"'{n.name}' : {n.type} has {size} elements at batch {self.batch}"
            raise PccError("E187", what, at=n.loc, hint="arrays of a kernel have fewer than 2^31")
        return size

    def memory(self, dtype: str, size: int, place: str) -> Memory:
        """Return a new array."""
        self.pointers += 1
        return Memory(f"p{self.pointers}", dtype, size, place)

    def store(self, n: Op, memory: Memory | None = None) -> Storage:
        """Give a value a dense array, of its own unless one is given."""
        size = self.size(n)
        memory = memory or self.memory(tensor(n).dtype, size, "scratch")
        self.stored[n] = Storage(memory, dense(self.shape(n)))
        return self.stored[n]

    def table(self, a: Array) -> str:
        """Return the pointer of a constant: in the source if it is small, else an argument."""
        if a.size > SMALL:
            if a not in self.weights:
                self.weights[a] = self.memory(a.dtype, a.size, "arg")
            return self.weights[a].pointer
        for name, known in self.arrays:
            if known is a:
                return name
        self.arrays.append((f"{self.name}_c{len(self.arrays)}", a))
        return self.arrays[-1][0]

    def lookup(self, values: tuple[int, ...]) -> str:
        """Return the pointer of a table of small integers."""
        if values not in self.indices:
            self.indices[values] = f"{self.name}_t{len(self.indices)}"
        return self.indices[values]


def literal(x: Any) -> str:
    """Return a number in the source, to the last bit."""
    if isinstance(x, bool | np.bool_):
        return "true" if x else "false"
    if isinstance(x, int | np.integer):
        return str(int(x)) if abs(int(x)) < 2**31 else f"{int(x)}LL"
    y = float(np.float32(x))
    if math.isinf(y):
        return "INFINITY" if y > 0 else "-INFINITY"
    return f"{y.hex()}f"
