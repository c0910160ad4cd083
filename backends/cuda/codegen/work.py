"""One job: a loop that computes one stored value, and all that it computes on the way."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pcc.backends.cuda.codegen.body import BRANCH, LOOP, Body, Ix, split, total
from pcc.backends.cuda.codegen.program import (
    CTYPES,
    RESULTS,
    SMALL,
    Program,
    Storage,
    dense,
    literal,
)
from pcc.backends.cuda.codegen.tables import INLINE, ROWS, SCALARS, SERIAL, UnreadableError
from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.ir.types import HALVES
from pcc.tensor import ops as t

LANES = 32
LONGEST = 65536  # of a row: a lane holds a 32nd of it
REPEATED = 1 << 16  # elements that warps may compute again instead of reading a stored number
HEAVY = 1 << 17  # of a product's operand: evaluations after which storing it first is cheaper
TEXT = 500  # statements of a job
DEEP = 60  # ops on ops that are computed where they are read
PACKED = 64  # bits of a table of indices that is one number


class Work:
    """Emits one job. `lanes`: a warp works on a row together, so that it can reduce."""

    def __init__(self, program: Program, *, lanes: bool) -> None:
        self.program, self.lanes = program, lanes
        self.body = Body()
        self.reads: set[Op] = set()
        self.lane_of: dict[str, tuple[str, int]] = {}  # index -> (register, length of its row)
        self.open: list[tuple[Op, int]] = []  # computed where it is read, and the size before it
        self.spent: Counter[Op] = Counter()  # statements of what was, with all that it read
        self.nested = 0
        self.weight = 0  # how often each element that is read now is read in all
        self.units = 0
        self.serial = False
        self.cost = 0
        self.target: Storage | None = None

    # ------------------------------------------------------------ reading

    def read(self, n: Op, ix: tuple[Ix, ...]) -> str:
        """Return the expression of element `ix` (batch axis first) of a value."""
        key = (n, ix)
        if (found := self.body.recall(key)) is not None:
            return found
        if self.body.size > TEXT:
            raise self._too_long(n)
        if n in self.program.stored:
            self.reads.add(n)
            text = self.load(self.program.stored[n], ix)
        elif isinstance(n, t.Const):
            text = self._const(n, ix)
        else:
            text = self._computed(n, ix)
        return self.body.remember(key, self.body.let(RESULTS[tensor(n).dtype], text))

    def _computed(self, n: Op, ix: tuple[Ix, ...]) -> str:
        """Return an element that is computed here, and count the statements that it takes."""
        if len(self.open) > DEEP:
            raise UnreadableError(n)
        self.open.append((n, self.body.size))
        if type(n) in INLINE:
            self._affordable(n)
            text = INLINE[type(n)](self, n, ix)
        elif type(n) in SERIAL and self._serves(n):
            self.serial = True
            text = SERIAL[type(n)](self, n, ix)
            self.serial = False
        else:
            text = self._row_value(n, ix)
        self.spent[n] += self.body.size - self.open.pop()[1]
        return text

    def _too_long(self, n: Op) -> Exception:
        """Return that a part of this job has to be stored first.

        Of the values that take at least half as many statements as the longest, that of the fewest
        elements: so what is left is shorter by a good part, and little more goes through memory.
        """
        for x, before in reversed(self.open):
            self.spent[x] += self.body.size - before
        most = max(self.spent.values(), default=0)
        if not most:
            what = f"a job of kernel '{self.program.name}' has more than {TEXT} statements"
            hint = "an op has too many operands: join some of them before"
            return PccError("E182", what, at=n.loc, hint=hint)
        long = [x for x, count in self.spent.items() if 2 * count >= most]
        return UnreadableError(min(long, key=lambda x: (self.program.size(x), self.spent[x])))

    def _affordable(self, n: Op) -> None:
        if self.weight > HEAVY // 16 and self.weight * price(n, self.program) > HEAVY:
            raise UnreadableError(n)

    def _serves(self, n: Op) -> bool:
        """Whether this job, the only reader, may compute a sum where it reads it."""
        looped = any(s.kind == LOOP for s in self.body.stack)
        alone = self.program.uses.get(n, 0) == 1 and self.units <= self.program.size(n)
        return alone and not (self.lanes or self.serial or looped)

    def load(self, s: Storage, ix: tuple[Ix, ...]) -> str:
        """Return the expression of an element in memory."""
        text = f"{s.memory.pointer}[{self.offset(s, ix)}]"
        if s.dtype in HALVES:
            return f"from_{s.dtype}({text})"
        return f"({text} != 0)" if s.dtype == "bool" else text

    def store(self, s: Storage, ix: tuple[Ix, ...], value: str) -> None:
        """Write an element."""
        value = f"to_{s.dtype}({value})" if s.dtype in HALVES else value
        self.body.emit(f"{s.memory.pointer}[{self.offset(s, ix)}] = {value};")

    def put(self, n: Op, ix: tuple[Ix, ...], value: str) -> None:
        """Write an element of the value that this job computes."""
        self.store(self.target or self.program.stored[n], ix, value)

    def put_row(self, n: Op, prefix: tuple[Ix, ...], r: str) -> None:
        """Write a row from registers."""
        j, k = self.body.name("j"), self.body.name("k")
        with self.over_lanes(j, k, self.program.shape(n)[-1]):
            self.put(n, (*prefix, j), f"{r}[{k}]")

    def offset(self, s: Storage, ix: tuple[Ix, ...]) -> str:
        """Return where an element lies."""
        return str(total(self.body, list(zip(ix, s.strides, strict=True)), s.base))

    def _const(self, n: t.Const, ix: tuple[Ix, ...]) -> str:
        shape, kind = n.value.shape, n.value.dtype
        at = total(self.body, list(zip(ix, dense(shape), strict=True)))
        if math.prod(shape) <= SMALL and kind not in HALVES:
            flat = n.value.value.reshape(-1)
            if isinstance(at, int):
                return literal(flat[at])
            if (flat == flat[0]).all():
                return literal(flat[0])
            if kind == "i64" and (flat - flat[0] == np.arange(flat.size)).all():
                return f"{literal(flat[0])} + {at}"
        text = f"{self.program.table(n.value)}[{at}]"
        if kind in HALVES:
            return f"from_{kind}({text})"
        return f"({text} != 0)" if kind == "bool" else text

    def _row_value(self, n: Op, ix: tuple[Ix, ...]) -> str:
        """Return an element of a row that this warp holds, or a number that it computes."""
        if not self.lanes or self.nested > 2 or type(n) not in (*ROWS, *SCALARS):
            raise UnreadableError(n)
        if type(n) in ROWS:
            register, length = self.lane_of.get(str(ix[-1]), ("", 0))
            if not register or length != self.program.shape(n)[-1] or self._varies(ix[:-1]):
                raise UnreadableError(n)
            return f"{self.row(n, ix[:-1])}[{register}]"
        if isinstance(n, t.ArgMax | t.InverseCdf) or self._varies(ix):
            raise UnreadableError(n)
        if self.program.size(n.args[0]) * max(1, self.units // self.program.size(n)) > REPEATED:
            raise UnreadableError(n)
        with self._outside(n, ix):
            return self.body.let(RESULTS[tensor(n).dtype], SCALARS[type(n)](self, n, ix))

    # ------------------------------------------------------------ rows

    def _varies(self, ix: tuple[Ix, ...]) -> bool:
        depth = max((self.body.depth(i) for i in ix), default=0)
        return any(s.kind == LOOP for s in self.body.stack[: depth + 1])

    @contextmanager
    def _outside(self, n: Op, ix: tuple[Ix, ...]) -> Iterator[None]:
        """Work where the whole warp is, outside of the loop over the lanes' elements."""
        at = max([self.body.floor, *(self.body.depth(i) for i in ix)])
        if any(s.kind == LOOP for s in self.body.stack[: at + 1]):
            raise UnreadableError(n)
        self.nested += 1
        try:
            with self.body.within(at):
                yield
        finally:
            self.nested -= 1

    def row(self, n: Op, prefix: tuple[Ix, ...]) -> str:
        """Return the registers that hold the row `prefix` of a value."""
        key = ("row", n, prefix)
        if (found := self.body.recall(key)) is not None:
            return found
        with self._outside(n, prefix):
            return self.body.remember(key, ROWS[type(n)](self, n, prefix))

    def registers(
        self, length: int, value: Callable[[Ix], str], *, ctype: str = "float", fill: str = "0.0f"
    ) -> str:
        """Return registers that hold value(j) for j < length, `fill` beyond."""
        b, r, j = self.body, self.body.name("r"), self.body.name("j")
        k, count = self.body.name("k"), -(-length // LANES)
        if length > LONGEST:
            what = f"a row of {length} in kernel '{self.program.name}'"
            raise PccError("E183", what, hint=f"rows of a generated kernel hold up to {LONGEST}")
        b.level[r] = len(b.stack) - 1
        b.emit(f"{ctype} {r}[{count}];")
        self.lane_of[j] = (k, length)
        with self.over_lanes(j, k, length, f"{r}[{k}] = {fill}; "):
            b.emit(f"{r}[{k}] = {value(j)};")
        self.cost += length
        return r

    @contextmanager
    def over_lanes(self, j: str, k: str, length: int, first: str = "") -> Iterator[None]:
        """Open the loop over the elements j < length of a row that a lane holds."""
        count = -(-length // LANES)
        unroll = "PCC_UNROLL " if count <= 40 else ""
        head = f"{unroll}for (int {k} = 0; {k} < {count}; ++{k}) {{ {first}"
        head += f"[[maybe_unused]] const int {j} = lane + {LANES} * {k};"
        head += f" if ({j} < {length}) {{" if length % LANES else " {"
        with self.body.block(LOOP, head, (j, k), "}}"):
            yield

    def uniform(self, ctype: str, value: str) -> str:
        """Return the name of a number that the whole warp has."""
        return self.body.let(ctype, value)

    # ------------------------------------------------------------ operands

    def lead(self, x: Op, lead: tuple[Ix, ...]) -> tuple[Ix, ...]:
        """Return the batch index for an operand: nothing if it has no batch axis."""
        return lead if tensor(x).batch else ()

    def parts(self, n: Op, ix: tuple[Ix, ...]) -> tuple[tuple[Ix, ...], tuple[Ix, ...]]:
        """Split an index into those of the batch axis and of the axes per row."""
        k = 1 if tensor(n).batch else 0
        return ix[:k], ix[k:]

    def operand(self, x: Op, n: Op, ix: tuple[Ix, ...]) -> str:
        """Return the element of an operand that broadcasts to element `ix` of `n`."""
        lead, rest = self.parts(n, ix)
        own = (0 if s == 1 else i for s, i in zip(tensor(x).shape, rest, strict=True))
        return self.read(x, (*self.lead(x, lead), *own))

    def index(self, x: Op, ix: tuple[Ix, ...], size: int) -> Ix:
        """Return an integer value as an index within 0..size-1."""
        text = self.read(x, ix)
        return self.body.let("int", f"clamp_index({text}, {size - 1})") if size > 1 else 0

    def step(self, i: Ix) -> Ix:
        """Return i + 1."""
        return total(self.body, [(i, 1)], 1)

    def pick(self, values: tuple[int, ...], i: Ix) -> Ix:
        """Return values[i], a static choice."""
        if isinstance(i, int):
            return values[i]
        steps = {b - a for a, b in itertools.pairwise(values)} or {0}
        if len(steps) == 1:
            return total(self.body, [(i, steps.pop())], values[0])
        bits = 4 if max(values) < 16 else 8
        if max(values) < 1 << bits and bits * len(values) <= PACKED:
            word = sum(v << bits * k for k, v in enumerate(values))
            return self.body.let("int", f"(int)({word:#x}ULL >> {bits} * {i} & {(1 << bits) - 1})")
        return self.body.let("int", f"{self.program.lookup(values)}[{i}]")

    # ------------------------------------------------------------ serial loops

    def fold(
        self, ctype: str, first: str, sizes: Sequence[int], step: Callable[[str, list[Ix]], str]
    ) -> str:
        """Return what `step(so far, indices)` makes of `first`, over all indices, one by one."""
        b, out = self.body, self.body.declare(ctype, first)
        self.cost += math.prod(sizes)
        self._nest(list(sizes), [], lambda at: b.emit(f"{out} = {step(out, at)};"))
        return out

    def _nest(self, sizes: list[int], at: list[Ix], inner: Callable[[list[Ix]], None]) -> None:
        if not sizes:
            inner(at)
        elif sizes[0] == 1:
            self._nest(sizes[1:], [*at, 0], inner)
        else:
            i, head = self.body.loop(sizes[0])
            with self.body.block(LOOP, f"PCC_UNROLL_8 {head}", (i,)):
                self._nest(sizes[1:], [*at, i], inner)

    # ------------------------------------------------------------ the loop of the job

    @contextmanager
    def over(self, shape: tuple[int, ...]) -> Iterator[tuple[Ix, ...]]:
        """Open the loop of the job: over elements by threads, or over rows by warps."""
        count = math.prod(shape)
        self.units = count
        flat: Ix = 0 if count == 1 else ("u0" if self.lanes else "e0")
        yield split(self.body, flat, shape)


def price(n: Op, program: Program) -> int:
    """Return what computing one element inline costs, in the price of reading it."""
    seen: set[Op] = set()
    stack, cost = [n], 0
    while stack:
        x = stack.pop()
        if x in seen or x in program.stored or isinstance(x, t.Const):
            continue
        seen.add(x)
        cost += 8 if isinstance(x, t.Exp | t.Log | t.Concat) else 1
        stack += x.args
        if cost > 64:
            break
    return cost


__all__ = ["BRANCH", "CTYPES", "LANES", "LOOP", "Work", "price"]
