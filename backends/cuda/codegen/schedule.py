"""Which values are stored, in which phase each is computed, and where it lies.

Jobs of a phase do not depend on each other. Cheap phases run in block 0, separated by barriers of
the block; a phase with much work runs in all blocks, between two barriers of the grid. What only
one run of cheap phases uses lies in shared memory.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pcc.backends.cuda.codegen.jobs import Job, job_of
from pcc.backends.cuda.codegen.program import Memory, Program, Storage
from pcc.backends.cuda.codegen.tables import UnreadableError
from pcc.backends.cuda.memory import Span, place
from pcc.backends.cuda.plan import ITEM
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, tensor
from pcc.tensor import ops as t

WIDE = 1 << 16  # cost from which all blocks are faster than one, with the two barriers it takes
SHARED = 32 * 1024  # bytes of values in shared memory: leaves room for two blocks
INLINE_PARTS = 3  # of a join that is read by cases; longer ones are put together in memory
Key = tuple[Op, int]  # a value, and 0; copies of it have other numbers


@dataclass
class Schedule:
    """Jobs by phase. `wide[p]`: phase p runs in all blocks."""

    program: Program
    phases: list[list[Job]] = field(default_factory=list)
    wide: list[bool] = field(default_factory=list)
    scratch: int = 0
    shared: int = 0
    used: set[str] = field(default_factory=set)  # pointers of what is computed here

    @property
    def barriers(self) -> int:
        """How often all blocks wait for each other."""
        pairs = zip(self.wide, self.wide[1:], strict=False)
        return sum(a or b for a, b in pairs)


class Scheduler:
    """Decides what is stored, by trying: what cannot be computed where it is read is stored."""

    def __init__(self, program: Program, inputs: Sequence[Op]) -> None:
        self.program, self.inputs = program, set(inputs)
        self.joined: dict[Op, list[Key]] = {}
        self.copies: dict[Key, Storage] = {}
        self.jobs: dict[Key, Job] = {}

    def run(self, outputs: Sequence[Op], copies: Sequence[tuple[Op, Storage]]) -> Schedule:
        """Return the schedule that computes stored outputs, and copies of values."""
        ends = [*outputs, *(n for n, _ in copies)]
        between = postorder(*ends, leaf=self.inputs.__contains__)
        self.place_of = {n: i for i, n in enumerate(between)}
        self.wanted = {n: s.memory for n, s in reversed(copies) if n not in self.program.stored}
        self.program.uses = Counter([*(a for n in self.place_of for a in n.args), *ends])
        for n in self.place_of:
            self._join(n)
        roots: list[Key] = [(n, 0) for n in outputs if n not in self.inputs]
        for n, storage in copies:
            roots.append(self._copy(n, storage))
        while self._grows(roots):
            pass
        out = Schedule(self.program)
        self._arrange(out)
        _locate(out, self.lives)
        return out

    def _copy(self, n: Op, storage: Storage) -> Key:
        key = (n, 1 + len(self.copies))
        self.copies[key] = storage
        return key

    # ------------------------------------------------------------ joins

    def _join(self, n: Op) -> None:
        """Put the parts of a long join where they belong as they are computed."""
        if not isinstance(n, t.Concat) or n in self.inputs:
            return
        if len(n.xs) <= INLINE_PARTS or any(s != 1 for s in tensor(n).shape[: n.axis]):
            return
        whole = self.program.stored.get(n) or self._store(n)
        lead = 1 if tensor(n).batch else 0
        step = whole.strides[lead + n.axis]
        keys, start = [], 0
        for x in n.xs:
            base = whole.base + start * step
            keys.append(self._part(n, x, whole, base))
            start += tensor(x).shape[n.axis]
        self.joined[n] = keys

    def _part(self, n: Op, x: Op, whole: Storage, base: int) -> Key:
        made = x
        while isinstance(made, t.Reshape) and made not in self.program.stored:
            made = made.x
        same = bool(tensor(x).batch) == bool(tensor(n).batch)
        free = made not in self.program.stored and made not in self.inputs
        if same and free and not isinstance(made, t.Const | t.Input | t.Concat):
            self.program.stored[made] = self._slice(made, whole, base)
            return (made, 0)
        if not same:  # one array for all rows: each row gets it
            x = t.Expand(x, next(y for y in n.args if tensor(y).batch), tensor(x).shape)
        return self._copy(x, self._slice(x, whole, base))

    def _slice(self, x: Op, whole: Storage, base: int) -> Storage:
        strides, step = [], 1
        for size in reversed(tensor(x).shape):
            strides.append(step)
            step *= size
        if tensor(x).batch:
            strides.append(whole.strides[0])
        return Storage(whole.memory, tuple(reversed(strides)), base)

    # ------------------------------------------------------------ what is stored

    def _grows(self, roots: list[Key]) -> bool:
        """Make a job for every stored value that is read; whether more had to be stored."""
        self.jobs, grown = {}, False
        heap = [(-self.place_of.get(k[0], 0), i, self._settled(k)) for i, k in enumerate(roots)]
        heapq.heapify(heap)
        count = len(heap)
        while heap:
            key = heapq.heappop(heap)[2]
            if key in self.jobs:
                continue
            more: list[Key] = []
            if key[0] in self.joined and not key[1]:
                more = self.joined[key[0]]
                self.jobs[key] = Job(key[0], False, 0, [], set(), 0)
            else:
                grown |= self._try(key)
                more = [(r, 0) for r in self.jobs[key].reads if r not in self.inputs]
            for k in more:
                count += 1
                heapq.heappush(heap, (-self.place_of.get(k[0], 0), count, k))
        return grown

    def _settled(self, key: Key) -> Key:
        """Return the value itself in the place of a copy to where it is stored already."""
        own, copy = self.program.stored.get(key[0]), self.copies.get(key)
        return (key[0], 0) if own and copy and own.memory is copy.memory else key

    def _try(self, key: Key) -> bool:
        grown = False
        while True:
            try:
                self.jobs[key] = job_of(key[0], self.program, self.copies.get(key))
                return grown
            except UnreadableError as e:
                if isinstance(e.node, t.Input) or e.node in self.program.stored:
                    what = f"{e.node.type} is read, but is no input of '{self.program.name}'"
                    raise PccError("E185", what, at=e.node.loc) from None
                self._store(e.node)
                grown = True

    def _store(self, n: Op) -> Storage:
        """Store a value: where it is wanted, if it is."""
        return self.program.store(n, self.wanted.get(n))

    # ------------------------------------------------------------ phases

    def _arrange(self, out: Schedule) -> None:
        when: dict[Key, int] = {}
        self.lives: dict[int, tuple[Memory, int, int]] = {}
        for key in sorted(self.jobs, key=lambda k: (self.place_of.get(k[0], -1), k[1])):
            self._when(key, when)
        for key, phase in when.items():
            if key[0] in self.joined and not key[1]:
                continue
            while len(out.phases) <= phase:
                out.phases.append([])
            out.phases[phase].append(self.jobs[key])
            self._lives(key, phase)
        for jobs in out.phases:
            jobs.sort(key=lambda j: -j.cost)
            out.wide.append(sum(j.cost for j in jobs) > WIDE)

    def _when(self, key: Key, when: dict[Key, int]) -> int:
        """Return the phase after which a value is there."""
        if key in when:
            return when[key]
        if key[0] in self.joined and not key[1]:
            when[key] = max(self._when(k, when) for k in self.joined[key[0]])
        else:
            reads = [(r, 0) for r in self.jobs[key].reads if r not in self.inputs]
            when[key] = 1 + max((self._when(k, when) for k in reads), default=-1)
        return when[key]

    def _lives(self, key: Key, phase: int) -> None:
        own = self.copies.get(key) or self.program.stored[key[0]]
        for s in (own, *(self.program.stored[r] for r in self.jobs[key].reads)):
            if s.memory.place == "arg":
                continue
            _, first, last = self.lives.get(id(s.memory), (s.memory, phase, phase))
            self.lives[id(s.memory)] = (s.memory, min(first, phase), max(last, phase))


def _locate(out: Schedule, lives: dict[int, tuple[Memory, int, int]]) -> None:
    """Place values in shared memory where one run of cheap phases is all that uses them."""
    near: list[tuple[Memory, Span]] = []
    far: list[tuple[Memory, Span]] = []
    out.used = {m.pointer for m, _, _ in lives.values()}
    for memory, first, last in sorted(lives.values(), key=lambda x: x[0].size):
        quiet = not any(out.wide[first : last + 1])
        size = memory.size * ITEM[memory.dtype]
        (near if quiet and size <= SHARED else far).append((memory, Span(size, first, last)))
    while near and place([s for _, s in near])[1] > SHARED:
        far.append(near.pop())
    for where, group in (("shared", near), ("scratch", far)):
        offsets, total = place([s for _, s in group])
        for (memory, _), offset in zip(group, offsets, strict=True):
            memory.place, memory.offset = where, offset
        if where == "shared":
            out.shared = total
        else:
            out.scratch = total
