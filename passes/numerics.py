"""Choose how numbers are represented: logarithms, or linear where a proven range allows it.

L(E), the logarithm of a linear expression E, is built from E's definition: a product becomes a sum,
a weighted sum a log-sum-exp shifted by its maximum (guarded against -inf - -inf), a softmax a
log-softmax. Where E is made of trained numbers only, bounds on its smallest positive and its
largest value follow by interval arithmetic; if both are far from float32's limits, E stays linear
and one logarithm is taken at its end. Where they are not, sums with positive weights are divided by
their largest entry on the way (`rescale`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from pcc.ir.core import Op, postorder, tensor, use_counts
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.passes.ranges import HIGH, LOW, Bounds, bounds
from pcc.passes.rescale import Spans
from pcc.tensor import ops as t
from pcc.tensor.sampling import Truncate

# Contractions that can be summed term by term in logs, and the axis of the weight to sum.
TERMWISE = {"fi,foi->fo": 2, "fo,foi->fi": 1, "fkh,fkh->fk": 2}
TERMS = 1024  # of a row up to which weights of a context are summed in logs: an exponential each
Step: TypeAlias = Generator[tuple[str, Op], Op, Op]  # asks for ("log" or "lin", node), gets it


@dataclass(frozen=True)
class Numerics(Pass):
    """t.log(E) => L(E), or t.log(E) with E linear where `low` <= E's positive values <= `high`.

    Pays: nothing underflows; where it cannot, no logarithm is taken before the end. Declines linear
    values unless their range is proven. The limits leave float32 (1.2e-38 .. 3.4e38) eight decades
    of headroom below, so that terms that underflow inside a kept sum are below its rounding error.
    `linear=False` always uses logs.
    """

    name: ClassVar[str] = "numerics"
    exact: ClassVar[Exact] = Exact.ROUNDING
    linear: bool = True
    low: float = LOW
    high: float = HIGH

    def run(self, module: Module, notes: Notes) -> Module:
        """Give every logarithm in the module a representation."""
        work = _Represent(module, self, notes)
        return module.with_roots(tuple(work.lin(r) for r in module.roots))


class _Represent:
    def __init__(self, module: Module, options: Numerics, notes: Notes) -> None:
        self.options, self.notes = options, notes
        self.bounds: dict[Op, Bounds] = bounds(module.roots) if options.linear else {}
        limits = options.low, options.high
        self.spans = Spans(module.roots if options.linear else (), self.bounds, limits)
        self.uses = use_counts(*module.roots)
        self.dense = {
            a
            for n in postorder(*module.roots)
            if isinstance(n, t.Contract | t.SelectRow | t.InverseCdf)
            for a in n.args
        }
        self.memo: dict[tuple[str, Op], Op] = {}

    def lin(self, n: Op) -> Op:
        """Return `n` with its logarithms represented."""
        return self._solve(("lin", n))

    def _solve(self, goal: tuple[str, Op]) -> Op:
        # Circuits are deep: a stack of suspended steps instead of recursion.
        stack = [(goal, self._step(goal))]
        answer: Op | None = None
        while stack:
            key, step = stack[-1]
            try:
                want = next(step) if answer is None else step.send(answer)
            except StopIteration as stop:
                answer = self.memo[key] = mk.place(stop.value, key[1].loc)
                stack.pop()
                continue
            answer = self.memo.get(want)
            if answer is None:
                stack.append((want, self._step(want)))
        assert answer is not None
        return answer

    def _step(self, goal: tuple[str, Op]) -> Step:
        kind, n = goal
        if goal in self.memo:
            return _done(self.memo[goal])
        return {"lin": self._lin, "log": self._log, "part": self._part, "scale": self._scale,
                "raw": self._raw}[kind](n)  # fmt: skip

    def _lin(self, n: Op) -> Step:
        if isinstance(n, t.Log):
            return (yield "log", n.x)
        new = []
        for a in n.args:
            new.append((yield "lin", a))
        return n.with_args(tuple(new))

    def _safe(self, n: Op) -> bool:
        b = self.bounds.get(n)
        return b is not None and self.options.low <= b[0] and b[1] <= self.options.high

    def _log(self, n: Op) -> Step:
        entry = isinstance(n, t.Lookup) and n.table in self.bounds  # its logarithms are constants
        if not isinstance(n, t.Const) and not entry and self._safe(n):
            self.notes.did(n, f"linear: values within {self.bounds[n]}")
            return t.Log((yield "lin", n))
        if self.spans.scaled(n):
            self.notes.did(n, f"linear, rescaled: values within {self.spans.of[n]}")
            part = yield "part", n
            scale = yield "scale", n
            return t.Add(t.Log(part), mk.reshape(scale, (tensor(n).shape[0], 1)))
        return (yield from self._arithmetic(n))

    def _arithmetic(self, n: Op) -> Step:
        """Return L(n) by the law of its operation."""
        match n:
            case t.Softmax(x=x):
                return t.LogSoftmax((yield "lin", x))
            case t.Exp(x=x):
                return (yield "lin", x)
            case t.Mul(a=a, b=b):
                la = yield "log", a
                return t.Add(la, (yield "log", b))
            case t.Div(a=a, b=b):
                la = yield "log", a
                return t.Sub(la, (yield "log", b))
            case t.Add(a=a, b=b):
                return (yield from self._sum(a, b))
            case t.Contract():
                return (yield from self._contract(n))
            case t.ReduceSum(x=x, axis=axis):
                return t.ReduceLse((yield "log", x), axis)
            case t.ReduceProd(x=x, axis=axis):
                return t.ReduceSum((yield "log", x), axis)
            case t.CumProd(x=x, axis=axis):
                return t.Cumsum((yield "log", x), axis, True)
            case t.Lookup(table=table, x=x):
                return (yield from self._lookup(table, x))
            case _:
                return (yield from self._moved(n))

    def _moved(self, n: Op) -> Step:
        """Return L(n) of one that only moves or picks entries: it does so to their logarithms."""
        match n:
            case t.Where(cond=cond, a=a, b=b):
                test = yield "lin", cond
                la = yield "log", a
                return t.Where(test, la, (yield "log", b))
            case t.SelectRow(w=w, sel=sel):
                rows = yield "log", w
                return t.SelectRow(rows, (yield "lin", sel))
            case t.Reshape(x=x, shape=shape):
                return mk.reshape((yield "log", x), shape)
            case t.Transpose(x=x, perm=perm):
                return t.Transpose((yield "log", x), perm)
            case t.Take(x=x, axis=axis, indices=rows):
                return mk.take((yield "log", x), rows, axis)
            case t.Concat(xs=xs, axis=axis):
                parts = []
                for x in xs:
                    parts.append((yield "log", x))
                return t.Concat(tuple(parts), axis)
            case t.Expand(x=x, like_=like, shape=shape):
                lx = yield "log", x
                return t.Expand(lx, (yield "lin", like), shape)
            case _:
                return t.Log((yield "lin", n))

    def _part(self, n: Op) -> Step:
        """Return s of n = s exp(e): linear."""
        if not self.spans.scaled(n):
            return (yield "lin", n)
        raw = yield "raw", n
        if n not in self.spans.rescaled:
            return raw
        share = t.Div(mk.full((1,), 1.0), t.ReduceMax(raw, 1))  # 1/0 is 0: a zero stays a zero
        return t.Mul(raw, mk.reshape(share, (tensor(n).shape[0], 1)))

    def _raw(self, n: Op) -> Step:
        """Return s of n before it is divided by its largest entry."""
        match n:
            case t.Contract(a=a, b=b, eq=eq):
                x = yield "part", a
                return t.Contract(x, (yield "lin", b), eq)
            case t.Mul(a=a, b=b):
                x = yield "part", a
                return t.Mul(x, (yield "part", b))
            case t.Take(x=x, axis=axis, indices=rows):
                return mk.take((yield "part", x), rows, axis)
            case _:
                raise AssertionError(n.name)

    def _scale(self, n: Op) -> Step:
        """Return e of n = s exp(e), `[F]`; -inf where n is zero."""
        terms = []
        for a in n.args:
            if self.spans.scaled(a):
                terms.append((yield "scale", a))
        if isinstance(n, t.Take):
            return mk.take(terms[0], n.indices, n.axis)
        if n in self.spans.rescaled:
            raw = yield "raw", n
            terms.append(t.Log(t.ReduceMax(raw, 1)))
        return terms[0] if len(terms) == 1 else t.Add(*terms)

    def _sum(self, a: Op, b: Op) -> Step:
        shape = tensor(t.Add(a, b)).shape
        parts = []
        for x in (a, b):
            lx = yield "log", x
            wide = lx if tensor(lx).shape == shape else t.Add(mk.full(shape, 0.0), lx)
            parts.append(mk.reshape(wide, (1, *shape)))
        return t.ReduceLse(t.Concat(tuple(parts), 0), 0)

    def _contract(self, n: t.Contract) -> Step:
        if n.eq == "foj,fj->fo" and isinstance(n.a, t.Contract):
            # Two layers and a weight: shift the first layer, and stay linear up to the second.
            inner = n.a
            la = yield "log", inner.a
            w = yield "lin", inner.b
            shape = tensor(la).shape
            top = mk.reshape(t.ReduceMax(la, 1), (shape[0], 1))
            scaled = t.Contract(t.Exp(t.Sub(la, top)), w, inner.eq)
            lb = yield "log", n.b
            return t.Add(t.LogContract(lb, scaled, "fj,foj->fo"), top)
        x = yield "log", n.a
        if n.eq == "fk,fkv->fv":
            # Table entries may be far below the smallest float: keep them in logs.
            table = yield "log", n.b
            f, k = tensor(x).shape
            return t.ReduceLse(t.Add(mk.reshape(x, (f, k, 1)), table), 1)
        if n.eq in TERMWISE and (_holds_zero(n.b) or _small_softmax(n.b)):
            # The largest x may meet a weight of zero, or of e^-100: shifted by x alone, the others
            # would underflow.
            table, axis = (yield "log", n.b), TERMWISE[n.eq]
            sizes = tensor(x).shape
            if len(sizes) < 3:
                sizes = (*sizes[: 3 - axis], 1, *sizes[3 - axis :])
            return t.ReduceLse(t.Add(mk.reshape(x, sizes), table), axis)
        return t.LogContract(x, (yield "lin", n.b), n.eq)

    def _lookup(self, table: Op, x: Op) -> Step:
        index = yield "lin", x
        base, rows = table, None
        if isinstance(table, t.Take) and table.axis == 0:
            base, rows = table.x, table.indices
        if _truncated(base):  # computed linear: log the entries that are read, not the table
            return t.Log(t.Lookup((yield "lin", table), index))
        if not isinstance(base, t.Softmax) or base not in self.dense:
            return t.Lookup((yield "log", table), index)
        # The linear softmax is computed anyway. Its largest entry is at least 1/V and cannot
        # underflow, so log-sum-exp = max(logits) - log(max(softmax)): two reductions instead of a
        # second pass of exponentials; the looked-up logit itself keeps full range. The maximum goes
        # first: beside logits of 1e8 and more the logarithm would vanish, and ties count as one.
        logits = yield "lin", base.x
        probs = yield "lin", base
        top: Op = t.ReduceMax(logits, 2)
        share: Op = t.Log(t.ReduceMax(probs, 2))
        if rows is not None:
            logits, top, share = (mk.take(v, rows) for v in (logits, top, share))
        return t.Add(t.Sub(t.Lookup(logits, index), top), share)


def _truncated(table: Op) -> bool:
    parts = table.xs if isinstance(table, t.Concat) else (table,)
    return any(isinstance(p, Truncate) for p in parts)


def _holds_zero(w: Op) -> bool:
    while isinstance(w, t.Reshape | t.Take | t.Transpose):
        w = w.x
    return isinstance(w, t.Const) and bool(w.value.recipe or (w.value.value == 0).any())


def _small_softmax(w: Op) -> bool:
    size = math.prod(tensor(w).shape)
    while isinstance(w, t.Reshape | t.Take | t.Transpose):
        w = w.x
    return isinstance(w, t.Softmax) and size <= TERMS


def _done(value: Op) -> Step:
    return value
    yield  # pragma: no cover  (makes this a generator)
