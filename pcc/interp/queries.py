"""Naive meaning of query ops, for validation: masked upward evaluations in logarithms.

Values of all v at once use that a smooth and decomposable circuit is linear in the input units of
one variable i: p(X_i = v, e) = sum_u p_u(v) C_u, with C_u the circuit's value where unit u of
variable i is one and the others are zero. That takes one evaluation per unit instead of per value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from pcc.circuit.ops import Categorical, CircuitOp, InputOp
from pcc.circuit.queries import QUERIES, Query, QueryOp, Rows, Value
from pcc.errors import PccError
from pcc.interp.logs import LogRun, log_sum, run_logs
from pcc.ir.core import Op, Values, postorder, tensor, units
from pcc.ir.module import Module

CELLS = 1 << 17  # input units that one evaluation may hold
Unit: TypeAlias = tuple[InputOp, int, int]  # layer, fold, unit
Ask: TypeAlias = tuple[int, Values]  # variable, what is observed
NAMES = ("x", "observed", "target", "carry", "u")


Models: TypeAlias = dict[Op, "Evaluations"]
KEPT = 8  # circuits with parameters whose evaluations are kept for the next pass or query
_KEPT: dict[tuple[Op, bytes], Evaluations] = {}


def evaluations(root: Op, env: Mapping[str, Values]) -> Evaluations:
    """Return the evaluations of a circuit on these parameters, maybe made before."""
    digest = hashlib.blake2b()
    for k in sorted(set(env) - set(NAMES)):
        a = np.ascontiguousarray(env[k])
        digest.update(f"{k} {a.dtype} {a.shape}".encode() + a.tobytes())
    key = (root, digest.digest())
    found = _KEPT.get(key) or Evaluations(root, env)
    _KEPT.pop(key, None)
    _KEPT[key] = found  # the newest last
    while len(_KEPT) > KEPT:
        _KEPT.pop(next(iter(_KEPT)), None)
    return found


def evaluate(m: Module, env: Mapping[str, Values], models: Models | None = None) -> list[Values]:
    """Return the outputs of a module which may hold query ops, circuit units in logs.

    `models` keeps what was evaluated of each circuit on these inputs, for other modules.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what a wrong pass made may be infinite
        return _evaluate(m, env, {} if models is None else models)


def _evaluate(m: Module, env: Mapping[str, Values], models: Models) -> list[Values]:
    leaves: dict[Op, Values] = {}
    for q in m.nodes():
        if isinstance(q, QueryOp):
            if q.root not in models:
                models[q.root] = evaluations(q.root, env)
            leaves[q] = _meaning(q, models[q.root], run_logs(q.args[1:], env, leaves), env)
    return [leaves[r] if isinstance(r, Query) else run_logs((r,), env, leaves)[0] for r in m.roots]


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
        self._rows: dict[tuple[object, ...], Values] = {}
        self._units: dict[bytes, tuple[dict[Op, Values], dict[Op, Values]]] = {}
        self.weights = {
            a: work.solve((True, a))
            for n in nodes
            if not isinstance(n, InputOp)
            for a in n.args
            if not isinstance(a, CircuitOp)
        }
        self.tables: dict[InputOp, Values] = {}
        for n in self.inputs:
            if isinstance(n, Categorical):
                self.tables[n] = work.solve((True, n.p))

    def units_of(self, x: Values, seen: Values) -> dict[Op, Values]:
        """Return the log input units of every input layer, `[B,F,K]`."""
        seen, key = np.broadcast_to(seen, x.shape), x.tobytes()
        if key not in self._units:
            both = (self._inputs(x, observed) for observed in (True, False))
            self._units[key] = (next(both), next(both))
        (here, gone) = self._units[key]
        return {n: np.where(seen[:, list(n.vars), None], here[n], gone[n]) for n in self.inputs}

    def _inputs(self, x: Values, observed: bool) -> dict[Op, Values]:
        known = {n.p: self.tables[n] for n in self.inputs if isinstance(n, Categorical)}
        env = {**self.params, "x": x, "observed": np.full(x.shape, observed)}
        work = LogRun(env, known)
        return {n: work.root(n) for n in self.inputs}

    def _top(self, leaves: Mapping[Op, Values]) -> Values:
        return LogRun({}, {**self.weights, **leaves}).root(self.root)

    def value(self, x: Values, seen: Values) -> Values:
        """Return log p(x[seen]) `[B]`."""
        y = self._top(self.units_of(x, seen))
        return np.broadcast_to(y, (len(x), 1, 1))[:, 0, 0]

    def opened(self, x: Values, ask: Sequence[tuple[int, Values]], card: int) -> Values:
        """Return log p(X_i = v, x[seen without i]) `[B, len(ask), card]` for (i, seen) in `ask`."""
        picks = {i: self._picks(i) for i, _ in ask}
        size = len(x) * sum(units(n).folds * units(n).k for n in self.inputs)
        out: list[Values] = []
        for part in _groups(ask, lambda a: size * len(picks[a[0]])):
            c = self._coefficients(x, [(i, seen, picks[i]) for i, seen in part])
            at = 0
            for i, _ in part:
                mine, at = c[:, at : at + len(picks[i])], at + len(picks[i])
                out.append(self._values(mine, picks[i], card))
        return np.stack(out, axis=1)

    def _picks(self, i: int) -> list[Unit]:
        nodes = [(n, f) for n in self.inputs for f, v in enumerate(n.vars) if v == i]
        if not all(isinstance(n, Categorical) for n, _ in nodes):
            raise PccError("E132", "all values of a continuous variable cannot be listed")
        return [(n, f, k) for n, f in nodes for k in range(units(n).k)]

    def _coefficients(self, x: Values, ask: list[tuple[int, Values, list[Unit]]]) -> Values:
        """Return `[B, U]`: log of the root where one unit of a variable is one, the others zero."""
        b, parts = len(x), []
        for i, seen, picks in ask:
            base = self.units_of(x, np.broadcast_to(seen, x.shape) & (np.arange(self.n) != i))
            wide = {n: np.repeat(np.broadcast_to(v, (b, *v.shape[1:]))[:, None], len(picks), 1)
                    for n, v in base.items()}  # fmt: skip
            for n, f, _ in picks:
                wide[n][:, :, f] = -np.inf
            for u, (n, f, k) in enumerate(picks):
                wide[n][:, u, f, k] = 0.0
            parts.append(wide)
        joined = {n: np.concatenate([w[n] for w in parts], axis=1) for n in self.inputs}
        leaves: dict[Op, Values] = {n: v.reshape(-1, *v.shape[2:]) for n, v in joined.items()}
        count = sum(len(picks) for _, _, picks in ask)
        weights = {w: np.repeat(v, count, 0) if tensor(w).batch and len(v) > 1 else v
                   for w, v in self.weights.items()}  # fmt: skip
        y = LogRun({}, {**weights, **leaves}).root(self.root)
        return np.broadcast_to(y, (b * count, 1, 1)).reshape(b, count)

    def _values(self, c: Values, picks: list[Unit], card: int) -> Values:
        """Log sum_u p_u(v) C_u, `[B, card]`; -inf beyond the tables."""
        out = np.full((len(c), card), -np.inf)
        for width in {self.tables[n].shape[-1] for n, _, _ in picks}:
            same = [u for u, (n, _, _) in enumerate(picks) if self.tables[n].shape[-1] == width]
            p = [self.tables[n][..., f, k, :] for n, f, k in (picks[u] for u in same)]
            table = np.stack(np.broadcast_arrays(*p)).reshape(len(same), -1, width)
            short = min(width, card)
            term = log_sum(c[:, same].T[..., None] + table[..., :short], 0)
            out[:, :short] = np.logaddexp(out[:, :short], term)
        return out

    def rows(self, x: Values, seen: Values, card: int, *, prefix: bool) -> Values:
        """Return log p(X_i = v, evidence) for all i and v, `[B, n, card]`."""
        key = (x.tobytes(), np.asarray(seen).tobytes(), card, prefix)
        if key not in self._rows:
            order = np.arange(self.n)
            ask = [(i, order < i if prefix else seen) for i in range(self.n)]
            self._rows[key] = self.opened(x, ask, card)
        return self._rows[key]


def _groups(ask: Sequence[Ask], cells: Callable[[Ask], int]) -> list[list[Ask]]:
    """Cut questions up so that each evaluation holds a bounded number of input units."""
    out: list[list[Ask]] = []
    total = 0
    for a in ask:
        total += cells(a)
        if not out or total > CELLS:
            out.append([])
            total = cells(a)
        out[-1].append(a)
    return out


def _meaning(
    q: QueryOp, m: Evaluations, operands: list[Values], env: Mapping[str, Values]
) -> Values:
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
            return normalise(m.rows(x, every, q.card, prefix=True))
        case "univariate":
            return _univariate(q, m, x, given["observed"])
        case _:
            raise PccError("E150", f"'{q.query}' has no single reference value")


def _univariate(q: Query, m: Evaluations, x: Values, seen: Values) -> Values:
    free = normalise(m.rows(x, seen, q.card, prefix=False))
    known = np.where(np.arange(q.card) == x[..., None], 0.0, -np.inf)
    row = np.where(seen[..., None], known, free)
    return np.where(np.isneginf(m.value(x, seen))[:, None, None], -np.inf, row)


def _ratio(a: Values, b: Values) -> Values:
    """A - b in logs; the ratio of two zeros is zero."""
    return np.where(np.isneginf(a), -np.inf, a - np.where(np.isneginf(b), 0.0, b))


def normalise(rows: Values) -> Values:
    return _ratio(rows, log_sum(rows, -1)[..., None])
