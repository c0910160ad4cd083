"""Which loop computes which stored value: for each a job, tried in the cheaper form first."""

from __future__ import annotations

from dataclasses import dataclass

import pcc.backends.cuda.codegen.elementwise
import pcc.backends.cuda.codegen.views
import pcc.backends.cuda.codegen.words  # noqa: F401
from pcc.backends.cuda.codegen import sequence
from pcc.backends.cuda.codegen.body import alive
from pcc.backends.cuda.codegen.contractions import by_warps
from pcc.backends.cuda.codegen.program import Program, Storage
from pcc.backends.cuda.codegen.tables import (
    INLINE,
    JOBS,
    ROWS,
    SCALARS,
    SERIAL,
    UnreadableError,
)
from pcc.backends.cuda.codegen.work import LANES, Work
from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.tensor import eva, nn
from pcc.tensor import ops as t
from pcc.tensor.ngram import LongestSuffix

WARP = 256  # cost of a warp's reductions, whose steps wait for each other, beside its elements
SHORT = 12  # elements that one thread reduces at least as fast as a warp


@dataclass
class Job:
    """A loop over `units` threads, or warps if `lanes`: its text, what it reads, what it costs."""

    node: Op
    lanes: bool
    units: int
    lines: list[str]
    reads: set[Op]
    cost: int

    @property
    def warps(self) -> int:
        """How many warps have something to do."""
        return self.units if self.lanes else -(-self.units // LANES)


def job_of(n: Op, program: Program, target: Storage | None = None) -> Job:
    """Return the job of a value; with `target` a copy of it goes there. Raises UnreadableError."""
    kind = type(n)
    if target is not None and (n in program.stored or kind not in INLINE):
        return _copy(n, program, target)
    if kind in JOBS:
        return _done(n, program, lanes=_by_warps(n, program), target=target)
    if kind in SERIAL:
        return _sum(n, program, target)
    if kind in ROWS:
        return _row(n, program, target)
    if kind in SCALARS:
        return _scalar(n, program, target)
    if kind not in INLINE:
        raise PccError("E184", f"'{n.name}' has no CUDA form", at=n.loc)
    try:
        return _map(n, program, target)
    except UnreadableError as e:
        if type(e.node) not in ROWS and type(e.node) not in SCALARS:
            raise
        try:
            return _map_rows(n, program, target)
        except UnreadableError:
            raise e from None


def _by_warps(n: Op, program: Program) -> bool:
    if isinstance(n, t.Cumsum):
        shape = tensor(n).shape
        return n.axis == len(shape) - 1 and shape[-1] > sequence.SHORT
    return isinstance(n, t.Trajectory | nn.CachedAttention | eva.EvaAttention | LongestSuffix)


def _finish(w: Work, n: Op) -> Job:
    each = max(w.cost, 1 + w.body.size // 8) + (WARP if w.lanes else 0)
    return Job(n, w.lanes, w.units, alive(w.body.stack[0].lines), w.reads, w.units * each)


def _done(n: Op, program: Program, *, lanes: bool, target: Storage | None) -> Job:
    w = Work(program, lanes=lanes)
    w.target = target
    JOBS[type(n)](w, n)
    return _finish(w, n)


def _sum(n: Op, program: Program, target: Storage | None) -> Job:
    w = Work(program, lanes=by_warps(n, program))
    w.target = target
    with w.over(program.shape(n)) as ix:
        w.put(n, ix, SERIAL[type(n)](w, n, ix))
    return _finish(w, n)


def _copy(n: Op, program: Program, target: Storage) -> Job:
    w = Work(program, lanes=False)
    w.target = target
    with w.over(program.shape(n)) as ix:
        w.put(n, ix, w.read(n, ix))
    return _finish(w, n)


def _map(n: Op, program: Program, target: Storage | None) -> Job:
    w = Work(program, lanes=False)
    w.target = target
    with w.over(program.shape(n)) as ix:
        w.put(n, ix, INLINE[type(n)](w, n, ix))
    return _finish(w, n)


def _map_rows(n: Op, program: Program, target: Storage | None) -> Job:
    """A value element by element, one row to a warp: it reads rows that a warp computes."""
    shape = program.shape(n)
    if not tensor(n).shape:
        raise UnreadableError(n)
    w = Work(program, lanes=True)
    w.target = target
    with w.over(shape[:-1]) as ix:
        r = w.registers(
            shape[-1], lambda j: INLINE[type(n)](w, n, (*ix, j)), ctype=_ctype(n), fill="0"
        )
        w.put_row(n, ix, r)
    return _finish(w, n)


def _ctype(n: Op) -> str:
    return {"f32": "float", "i64": "long long", "bool": "bool"}[tensor(n).dtype]


def _row(n: Op, program: Program, target: Storage | None) -> Job:
    w = Work(program, lanes=True)
    w.target = target
    shape = program.shape(n)
    with w.over(shape[:-1]) as ix:
        w.put_row(n, ix, w.row(n, ix))
    return _finish(w, n)


def _scalar(n: Op, program: Program, target: Storage | None) -> Job:
    length = program.size(n.args[0]) // max(program.size(n), 1)
    if length <= SHORT and isinstance(n, t.ReduceSum | t.ReduceProd | t.ReduceMax):
        return _serial(n, program, target)
    w = Work(program, lanes=True)
    w.target = target
    with w.over(program.shape(n)) as ix:
        value = w.body.let(_ctype(n), SCALARS[type(n)](w, n, ix))
        with w.body.block("branch", "if (lane == 0) {"):
            w.put(n, ix, value)
    return _finish(w, n)


def _serial(n: t.Reduction, program: Program, target: Storage | None) -> Job:
    step = {t.ReduceSum: "{} + {}", t.ReduceProd: "{} * {}", t.ReduceMax: "({0} > {1} ? {0} : {1})"}
    w = Work(program, lanes=False)
    w.target = target
    k = n.axis + (1 if tensor(n).batch else 0)
    with w.over(program.shape(n)) as ix:
        first = w.read(n.x, (*ix[:k], 0, *ix[k:]))
        size = tensor(n.x).shape[n.axis]
        shown = step[type(n)]
        y = w.fold(
            _ctype(n), first, [size - 1],
            lambda so_far, at: shown.format(
                so_far, w.read(n.x, (*ix[:k], w.step(at[0]), *ix[k:]))
            ),
        ) if size > 1 else first  # fmt: skip
        w.put(n, ix, y)
    return _finish(w, n)
