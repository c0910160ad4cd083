"""Naive meaning of query ops, for validation: masked upward evaluations in logarithms.

Values of all v at once use that a smooth and decomposable circuit is linear in the input units of
one variable i: p(X_i = v, e) = sum_u p_u(v) C_u, with C_u the circuit's value where unit u of
variable i is one and the others are zero. That takes one evaluation per unit instead of per value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.circuit.ops import Categorical, CircuitOp, InputOp
from pcc.circuit.queries import QUERIES, Query, QueryOp, Rows, Value
from pcc.errors import PccError
from pcc.interp.logs import LogRun, log_sum, run_logs
from pcc.interp.reference import check, gap
from pcc.ir.core import Op, Values, postorder, units
from pcc.ir.module import Module

Unit: TypeAlias = tuple[InputOp, int, int]  # layer, fold, unit
NAMES = ("x", "observed", "target", "carry", "u")


def runner(module: Module) -> Callable[[dict[str, Values]], list[Values]]:
    """Return a function that evaluates a module which may hold query ops."""
    queries = [n for n in module.nodes() if isinstance(n, QueryOp)]

    def evaluate(env: dict[str, Values]) -> list[Values]:
        leaves: dict[Op, Values] = {}
        models: dict[Op, Evaluations] = {}
        for q in queries:
            model = models.setdefault(q.root, Evaluations(q.root, env))
            operands = run_logs(q.args[1:], env, leaves)
            leaves[q] = _meaning(q, model, operands, env)
        return [leaves[r] if isinstance(r, Query) else run_logs((r,), env, leaves)[0]
                for r in module.roots]  # fmt: skip

    return evaluate


class Evaluations:
    """Masked evaluations of one circuit for one set of parameters, in logarithms.

    Parameters are computed once; contexts are `[1, D]` or one for each of the rows.
    """

    def __init__(self, root: Op, env: Mapping[str, Values]) -> None:
        self.root, self.n = root, units(root).scopes[0].bit_count()
        self.params = {k: v for k, v in env.items() if k not in NAMES}
        nodes = [n for n in postorder(root) if isinstance(n, CircuitOp)]
        self.inputs = [n for n in nodes if isinstance(n, InputOp)]
        work = LogRun(self.params, {})
        self.weights = {
            a: work.solve((True, a))
            for n in nodes
            if not isinstance(n, InputOp)
            for a in n.args
            if not isinstance(a, CircuitOp)
        }
        self.tables = {
            n: work.solve((True, n.p)) for n in self.inputs if isinstance(n, Categorical)
        }

    def units_of(self, x: Values, seen: Values) -> dict[Op, Values]:
        """Return the log input units of every input layer, `[B,F,K]`."""
        env = {**self.params, "x": x, "observed": np.broadcast_to(seen, x.shape)}
        known = {n.p: self.tables[n] for n in self.inputs if isinstance(n, Categorical)}
        work = LogRun(env, known)
        return {n: work.root(n) for n in self.inputs}

    def _top(self, leaves: Mapping[Op, Values]) -> Values:
        return LogRun({}, {**self.weights, **leaves}).root(self.root)

    def value(self, x: Values, seen: Values) -> Values:
        """Return log p(x[seen]) `[B]`."""
        y = self._top(self.units_of(x, seen))
        return np.broadcast_to(y, (len(x), 1, 1))[:, 0, 0]

    def open(self, x: Values, seen: Values, i: int, card: int) -> Values:
        """Return log p(X_i = v, x[seen without i]) `[B, card]`; -inf beyond the table."""
        known = np.broadcast_to(seen, x.shape) & (np.arange(self.n) != i)
        base = self.units_of(x, known)
        picks = [(n, f, k) for n in self.inputs for f, v in enumerate(n.vars) if v == i
                 for k in range(units(n).k)]  # fmt: skip
        out = np.full((len(x), card), -np.inf)
        if not all(isinstance(n, Categorical) for n, _, _ in picks):
            raise PccError("E132", "all values of a continuous variable cannot be listed")
        c = self._units(base, picks, len(x))
        entries = [self.tables[n][..., f, k, :] for n, f, k in picks]
        width = max(e.shape[-1] for e in entries)
        table = np.full((len(picks), max(len(np.atleast_2d(e)) for e in entries), width), -np.inf)
        for u, e in enumerate(entries):
            table[u, :, : e.shape[-1]] = e
        with np.errstate(invalid="ignore"):
            rows = log_sum(c.T[..., None] + table, 0)
        out[:, : min(width, card)] = rows[:, :card]
        return out

    def _units(
        self, base: dict[Op, Values], picks: list[tuple[InputOp, int, int]], b: int
    ) -> Values:
        """Return `[B, U]`: log of the root where one unit of a variable is one, the others zero."""
        wide = {n: np.repeat(np.broadcast_to(v, (b, *v.shape[1:]))[:, None], len(picks), 1)
                for n, v in base.items()}  # fmt: skip
        for n, f, _ in picks:
            wide[n][:, :, f] = -np.inf
        for u, (n, f, k) in enumerate(picks):
            wide[n][:, u, f, k] = 0.0
        leaves = {n: v.reshape(-1, *v.shape[2:]) for n, v in wide.items()}
        weights = {w: np.repeat(v, len(picks), 0) if w.type.batch and len(v) > 1 else v  # type: ignore[union-attr]
                   for w, v in self.weights.items()}  # fmt: skip
        y = LogRun({}, {**weights, **leaves}).root(self.root)
        return np.broadcast_to(y, (b * len(picks), 1, 1)).reshape(b, len(picks))

    def rows(self, x: Values, seen: Values, card: int, *, prefix: bool) -> Values:
        """Return log p(X_i = v, evidence) for all i and v, `[B, n, card]`."""
        order = np.arange(self.n)
        masks = [order < i if prefix else seen for i in range(self.n)]
        return np.stack([self.open(x, m, i, card) for i, m in enumerate(masks)], axis=1)


def _meaning(q: QueryOp, m: Evaluations, operands: list[Values], env: dict[str, Values]) -> Values:
    """Return a primitive's logarithm, or a query's output."""
    rows = max(a.shape[0] for a in env.values())
    if isinstance(q, Query):
        given = dict(zip(QUERIES[q.query].inputs, operands, strict=True))
        return meaning(q, m, given)
    x = np.broadcast_to(operands[0], (rows, q.variables))
    seen = np.broadcast_to(operands[1], x.shape)
    if isinstance(q, Value):
        return m.value(x, seen)
    assert isinstance(q, Rows)
    return m.rows(x, seen, q.card, prefix=q.prefix)


def meaning(q: Query, m: Evaluations, given: Mapping[str, Values]) -> Values:
    """Return the output of a deterministic query, from its definition."""
    x, n = given["x"], q.variables
    every = np.ones(x.shape, bool)
    match q.query:
        case "loglik":
            return m.value(x, every)
        case "marginal":
            return m.value(x, given["observed"])
        case "conditional":
            both = m.value(x, given["observed"] | given["target"])
            return _ratio(both, m.value(x, given["observed"]))
        case "prefix":
            logs = [m.value(x, np.arange(n) < i) for i in range(n + 1)]
            return np.stack([_ratio(logs[i + 1], logs[i]) for i in range(n)], axis=1)
        case "conditionals":
            return _normalise(m.rows(x, every, q.card, prefix=True))
        case "univariate":
            return _univariate(q, m, x, given["observed"])
        case _:
            raise PccError("E150", f"'{q.query}' has no single reference value")


def _univariate(q: Query, m: Evaluations, x: Values, seen: Values) -> Values:
    free = _normalise(m.rows(x, seen, q.card, prefix=False))
    known = np.where(np.arange(q.card) == x[..., None], 0.0, -np.inf)
    row = np.where(seen[..., None], known, free)
    return np.where(np.isneginf(m.value(x, seen))[:, None, None], -np.inf, row)


def _ratio(a: Values, b: Values) -> Values:
    """A - b in logs; the ratio of two zeros is zero."""
    return np.where(np.isneginf(a), -np.inf, a - np.where(np.isneginf(b), 0.0, b))


def _normalise(rows: Values) -> Values:
    return _ratio(rows, log_sum(rows, -1)[..., None])


def deviations(before: Module, answers: list[Values], env: dict[str, Values]) -> dict[str, float]:
    """Return how far the lowered outputs of a module of `q.query` ops are from their meaning."""
    q = before.roots[0]
    assert isinstance(q, Query)
    names = [name for name, _ in before.outputs]
    outputs = {k: np.asarray(v) for k, v in zip(names, answers, strict=True)}
    if q.query == "draft":
        return _draft(q, Evaluations(q.root, env), env, outputs)
    if q.query in ("sample", "mode"):
        return check(Circuit(q.root, before.cards), q.query, env, outputs)
    given = {k: env[k] for k in QUERIES[q.query].inputs}
    want = meaning(q, Evaluations(q.root, env), given)
    return {k: gap(want, v) for k, v in outputs.items()}


def _draft(
    q: Query, m: Evaluations, env: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, float]:
    """Rows must be q(x_i | carry, drawn_<i); an impossible carry is summed out instead."""
    drawn, carry = outputs["x"], np.asarray(env["carry"])
    x = np.concatenate([carry[:, None], drawn], axis=1)
    order = np.arange(q.variables)
    possible = ~np.isneginf(m.value(x, order == 0))
    want = []
    for i in range(1, q.variables):
        seen = (order < i) & (possible[:, None] | (order > 0))
        want.append(_normalise(m.open(x, seen, i, q.card)))
    table = np.stack(want, axis=1)
    inside = (drawn >= 0) & (drawn < q.card)
    chosen = np.take_along_axis(table, np.where(inside, drawn, 0)[..., None], axis=-1)[..., 0]
    return {
        "drawn values are possible": 0.0 if (inside & ~np.isneginf(chosen)).all() else math.inf,
        "q against masked evaluations": gap(np.exp(table), outputs["q"]),
    }
