"""From circuits and queries to tensors: no `c.*` or `q.*` op is left.

Values stay linear (products and sums); `numerics` then chooses logarithms or proves that linear
arithmetic is safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.queries import Query, QueryOp, Rows, Value
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, tensor, units
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.draw import Draw, Slot, plan_slots, values
from pcc.passes.evidence import Evidence, carried
from pcc.passes.manager import Exact, Notes, Pass
from pcc.passes.messages import (
    Down,
    Free,
    MaxUp,
    NotOrderedError,
    Up,
    expand_fused,
    rows,
    single_folds,
)
from pcc.passes.stepwise import Prefix, choices, cut_laws, inside, ordered_laws
from pcc.passes.unfold import paths, unfold
from pcc.passes.upward import known_from, rowwise, value
from pcc.tensor import ops as t

CUT_LIMIT = 60_000  # nodes x variables that prefixes of an unordered circuit may visit


@dataclass(frozen=True)
class ToTensor(Pass):
    """c.* and q.* => t.*: upward, downward and top-down passes (pcc.passes.messages, draw).

    up(v) = the units of v given the evidence, down(v) = d p / d v; p(X_i = v, evidence) is the sum
    over i's input units of down times table. Pays: all variables are answered by two sweeps.
    Declines (an error that names the query) where variables are continuous (E132) or prefixes of an
    unordered circuit would visit more than `CUT_LIMIT` nodes (E133).
    """

    name: ClassVar[str] = "to-tensor"
    exact: ClassVar[Exact] = Exact.ROUNDING
    removes: ClassVar[tuple[type[Op], ...]] = (c.CircuitOp, QueryOp)
    stage: ClassVar[str] = "tensor"
    scale: bool = True

    def run(self, module: Module, notes: Notes) -> Module:
        """Lower every query of the module."""
        memo: dict[Op, Op] = {}

        def rule(n: Op, _: object) -> Op | None:
            match n:
                case Value():
                    return value(n, scale=self.scale)
                case Rows():
                    return all_rows(n, notes)
                case Query(query="prefix"):
                    return prefix(n, notes)
                case Query():
                    if n not in memo:
                        outs = TOP_DOWN[n.query](n, notes)
                        for name, out in outs.items():
                            sibling = Query(n.root, n.inputs, n.query, name, n.card)
                            memo[sibling] = out
                    return memo[n]
                case _:
                    return None

        return module.rewrite(rule)


def all_rows(q: Rows, notes: Notes) -> Op:
    """Unnormalised p(X_i = v, evidence) for all i and v: one upward and one downward pass."""
    root = expand_fused(q.root)
    known, mask = known_from(q.observed, q.variables)

    def entry(n: c.InputOp, d: Op) -> Op:
        if not isinstance(n, c.Categorical):
            raise PccError("E132", "all values of a continuous variable cannot be listed")
        return t.Contract(d, n.p, "fk,fkv->fv")

    if not q.prefix:
        # Each variable's own evidence stays out of its downward message.
        up = Up(Evidence(q.x, known, mask))
        return rowwise(rows(root, Down(root, up, prefix=False), entry, q.card), q.x)
    try:
        up = Up(Evidence(q.x, [True] * q.variables))
        return rowwise(rows(root, Down(root, up, prefix=True), entry, q.card), q.x)
    except NotOrderedError:
        flat = _cut(root, notes, "conditionals")
        return rowwise(_cut_rows(flat, Evidence(q.x, [True] * q.variables), entry, q.card), q.x)


def _cut(root: Op, notes: Notes, query: str) -> Op:
    """Return the unfolded circuit whose cut nodes prefixes visit, within `CUT_LIMIT`."""
    flat = unfold(root)
    size = sum(isinstance(n, c.CircuitOp) for n in postorder(flat))
    n = units(root).scopes[0].bit_count()
    notes.did(root, f"'{query}': scopes are not intervals; {size} nodes cut by {n} prefixes")
    if size * n > CUT_LIMIT:
        raise PccError(
            "E133",
            f"'{query}' would visit {size} nodes for each of {n} prefixes (limit {CUT_LIMIT})",
            hint="order the variables so that every product splits an interval of them",
        )
    return flat


def _cut_rows(flat: Op, ev: Evidence, entry: Callable[[c.InputOp, Op], Op], width: int) -> Op:
    """Rows when products do not split intervals: per variable, the path from its leaf upward.

    Row i has the evidence of the variables before i. Subcircuits whose evidence does not change
    between prefixes are the same nodes, once.
    """
    parts, free = list[Op](), Free()
    for i, above in enumerate(paths(flat, len(ev.known))):
        known = [k if j < i else False for j, k in enumerate(ev.known)]
        up = Up(Evidence(ev.x, known, ev.mask, trusted=ev.trusted), free)
        down = Down(flat, up, prefix=False, only=above)
        parts.append(mk.take(rows(flat, down, entry, width), [i]))
    return mk.concat(parts)


def prefix(q: Query, notes: Notes) -> Op:
    """Log q(x_i given x_<i) for all i."""
    root, (x,), n = expand_fused(q.root), q.inputs, q.variables
    free = Free()
    try:
        up = Up(Evidence(x, [True] * n), free)
        down = Down(root, up, prefix=True)
        seen = rows(root, down, lambda m, d: _dot(d, up(m)), 1)
        every = rows(root, down, lambda m, d: _dot(d, free(m)), 1)
        answer = t.Sub(t.Log(seen), t.Log(every))
        return rowwise(mk.reshape(answer, (n,)), x)
    except NotOrderedError:
        flat = _cut(root, notes, "prefix")
        logs: list[Op] = [mk.reshape(t.Log(free.known(flat)), (1,))]
        for i in range(n):
            up = Up(Evidence(x, [j <= i for j in range(n)]), free)
            logs.append(mk.reshape(t.Log(up(flat)), (1,)))
        steps = [t.Sub(b, a) for a, b in pairwise(logs)]
        return rowwise(mk.concat(steps), x)


def _dot(d: Op, value: Op | None) -> Op:
    f = tensor(d).shape[0]
    return mk.reshape(t.ReduceSum(d if value is None else t.Mul(d, value), 1), (f, 1))


# ---------------------------------------------------------------- top-down queries


def slots_of(root: Op, query: str) -> list[Slot]:
    """Return the uniforms that a query of this circuit reads, in order."""
    n = units(root).scopes[0].bit_count()
    tokens = list(range(n)) if query == "sample" else list(range(1, n))
    return plan_slots(expand_fused(root), tokens)[0] if query in ("sample", "draft") else []


class Ancestral:
    """Posterior draws given `up` (falling back to the prior where the evidence is impossible)."""

    def __init__(self, root: Op, up: Up, ok: Op, u: Op, tokens: list[int]) -> None:
        self.up, self.ok, self.u = up, ok, u
        self.slots, self.of = plan_slots(root, tokens)
        self.first = len(self.slots) - len(tokens)
        self.token = {v: self.first + i for i, v in enumerate(tokens)}
        self.draw = Draw(root, self.pick)
        self.draw.run()

    def below(self, x: Op) -> Op | None:
        """Return log up(x), or its prior where the evidence is impossible; None for zeros."""
        prior = self.up.free(x)
        if self.up.unseen(x):
            return None if prior is None else t.Log(prior)
        zero = mk.full((1, 1), 0.0)
        return t.Where(self.ok, t.Log(self.up(x)), zero if prior is None else t.Log(prior))

    def pick(self, n: Op, row: Op, below: Op | tuple[Op, ...]) -> Op:
        """Draw an input of a sum by the inverse CDF."""
        if isinstance(below, tuple):
            f, k = units(n).folds, units(n).k
            parts = [self.up.free.known(x) for x in below]
            logs = [self.below(x) or t.Log(p) for x, p in zip(below, parts, strict=True)]
            wide = [t.Add(mk.full((f, k), 0.0), x) for x in logs]
            stacked = mk.concat([mk.reshape(x, (f, k, 1)) for x in wide], 2)
            score: Op | None = self.draw_row(n, stacked)
        else:
            score = self.below(below)
        u = mk.take(self.u, self.of[n])
        mass = row if score is None else t.Softmax(t.Add(t.Log(row), score))
        return t.InverseCdf(mass, u)

    def draw_row(self, n: Op, stacked: Op) -> Op:
        """Return the rows of `[F,K,H]` that the choices at `n` select."""
        return self.draw.row(n, stacked)

    def leaf(self, n: c.InputOp, unit: Op) -> Op:
        """Draw the value of each fold's variable from its chosen unit."""
        if not isinstance(n, c.Categorical):
            raise PccError("E132", "a continuous variable cannot be drawn from a uniform number")
        mass = self.draw.row(n, n.p)
        slots = [self.token.get(v, self.first) for v in n.vars]  # observed ones are overwritten
        return t.InverseCdf(mass, mk.take(self.u, slots))


def possible(p: Op) -> Op:
    """Return whether a probability is positive, in logs, as `[1,1]`."""
    log = t.Log(mk.reshape(p, (1, 1)))
    return t.Less(mk.full((1, 1), -np.inf), log)


def sample(q: Query, notes: Notes) -> dict[str, Op]:
    """Draw unobserved variables given the observed ones."""
    root, (u, x, observed), n = expand_fused(q.root), q.inputs, q.variables
    up = Up(Evidence(x, [None] * n, observed))
    ok = possible(up(root))
    drawn = Ancestral(root, up, ok, u, list(range(n)))
    new = values(root, drawn.draw, drawn.leaf, "i64")
    out = t.Where(observed, x, new)
    every = Up(Evidence(out, [True] * n))
    log = t.Log(mk.reshape(every(root), ()))
    return {"x": rowwise(out, x), "log_prob": rowwise(log, x)}


def largest(root: Op, up: MaxUp) -> Draw:
    """Choose an input of every sum, from the root down: argmax_z log w_z + up_z, first on ties."""

    def pick(node: Op, row: Op, below: Op | tuple[Op, ...]) -> Op:
        if isinstance(below, tuple):
            f, k = units(node).folds, units(node).k
            stacked = mk.concat([mk.reshape(up(y), (f, k, 1)) for y in below], 2)
            score = draw.row(node, stacked)
        else:
            score = up(below)
        return t.ArgMax(t.Add(t.Log(row), score))

    draw = Draw(root, pick)
    draw.run()
    return draw


def mode(q: Query, notes: Notes) -> dict[str, Op]:
    """Max over latents and unobserved variables jointly; ties give the first index."""
    root, (x, observed), n = expand_fused(q.root), q.inputs, q.variables
    up = MaxUp(Evidence(x, [None] * n, observed))
    best = up(root)

    draw = largest(root, up)

    def leaf(node: c.InputOp, unit: Op) -> Op:
        if isinstance(node, c.Gaussian):
            centre = mk.reshape(node.mu, (*tensor(node.mu).shape, 1))
            return mk.reshape(draw.row(node, centre), (len(node.vars),))
        assert isinstance(node, c.Categorical)
        found = t.ArgMax(draw.row(node, node.p))
        return found if tensor(x).dtype == "i64" else t.Cast(found, "f32")

    new = values(root, draw, leaf, tensor(x).dtype)
    out = t.Where(observed, x, new)
    return {"x": rowwise(out, x), "log_value": rowwise(mk.reshape(best, ()), x)}


def draft(q: Query, notes: Notes) -> dict[str, Op]:
    """Draw x_2..x_n given x_1 = carry, with q(. | x_<i) at each: protocol.md, step 1.

    Where the carry has probability zero the latents' prior stands in: its evidence is dropped.
    """
    root, (carry, u), n = expand_fused(q.root), q.inputs, q.variables
    if n < 2:
        raise PccError("E134", "'draft' needs at least two variables")
    first = mk.reshape(carry, (1,))
    up = Up(carried(carry, n))
    ok = possible(up(root))
    drawn = Ancestral(root, up, ok, u, list(range(1, n)))
    new = mk.take(values(root, drawn.draw, drawn.leaf, "i64"), range(1, n))
    flag = mk.reshape(ok, (1,))
    safe = t.Where(flag, first, mk.const(np.zeros(1, np.int64)))
    mask = mk.concat([flag, mk.const(np.ones(n - 1, bool))])
    whole = mk.concat([safe, new])
    after = Evidence(whole, [None] + [True] * (n - 1), mask, trusted=True)
    qs = _conditional_rows(root, after, q.card, notes)
    return {"x": rowwise(new, carry), "q": rowwise(mk.take(qs, range(1, n)), carry)}


def stepwise(q: Query, notes: Notes) -> dict[str, Op]:
    """x_i = argmax_v q(v | x_1 = carry, x_<i), i = 2..n; ties give the first index."""
    root, (carry,), n = expand_fused(q.root), q.inputs, q.variables
    if n < 2:
        raise PccError("E134", "a draft needs at least two variables")
    flat = unfold(root)
    ok = inside(flat, carry)
    if ok is None:
        first = Evidence(mk.reshape(carry, (1,)), [True] + [False] * (n - 1))
        ok = possible(Up(first)(root))
    prefix = Prefix(flat, carry, ok)
    try:
        laws = ordered_laws(flat, prefix, q.card)
    except NotOrderedError:
        laws = cut_laws(_cut(root, notes, "stepwise"), prefix)
    return {"x": rowwise(choices(laws, prefix), carry)}


TOP_DOWN = {"sample": sample, "mode": mode, "draft": draft, "stepwise": stepwise}


def _conditional_rows(root: Op, ev: Evidence, card: int, notes: Notes) -> Op:
    """q(x_i = v | x_<i), linear `[n,V]`, rows summing to one."""

    def entry(n: c.InputOp, d: Op) -> Op:
        assert isinstance(n, c.Categorical)
        return t.Contract(t.Softmax(t.Log(d)), n.p, "fk,fkv->fv")

    def plain(n: c.InputOp, d: Op) -> Op:
        assert isinstance(n, c.Categorical)
        return t.Contract(d, n.p, "fk,fkv->fv")

    leaves = [n for n in postorder(root) if isinstance(n, c.Categorical)]
    counts = [v for n in leaves for v in n.vars]
    single = len(counts) == len(set(counts)) and all(mk.normalised(n.p) for n in leaves)
    try:
        down = Down(root, Up(ev), prefix=True)
        if single:  # one fold per variable: normalise over its units, which are few
            return rows(root, down, entry, card)
        logs = t.Log(rows(root, down, plain, card))
    except NotOrderedError:
        logs = t.Log(_cut_rows(_cut(root, notes, "draft"), ev, plain, card))
    return t.Softmax(logs)


__all__ = ["ToTensor", "single_folds", "slots_of"]
