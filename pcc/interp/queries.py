"""Naive float64 meaning of query ops, for validation: masked evaluations, one per question."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pcc.circuit.queries import Query, QueryOp, Rows, Value
from pcc.interp.run import log_value, run
from pcc.ir.core import Op, Values
from pcc.ir.module import Module
from pcc.ir.semiring import Real


def runner(module: Module) -> Callable[[dict[str, Values]], list[Values]]:
    """Return a function that evaluates a module which may hold query ops."""
    queries = [n for n in module.nodes() if isinstance(n, QueryOp)]

    def evaluate(env: dict[str, Values]) -> list[Values]:
        leaves: dict[Op, Values] = {}
        for q in queries:
            operands = run(q.args[1:], env, Real(), leaves)
            leaves[q] = _value(q, operands, env)
        return run(module.roots, env, Real(), leaves)

    return evaluate


def _value(q: QueryOp, operands: list[Values], env: dict[str, Values]) -> Values:
    params = {k: v for k, v in env.items() if k not in ("x", "observed", "u", "carry", "target")}
    rows = max(a.shape[0] for a in env.values())
    if isinstance(q, Value):
        x = np.broadcast_to(operands[0], (rows, q.variables))
        seen = np.broadcast_to(operands[1], x.shape)
        return np.asarray(np.exp(log_value(q.root, x, seen, params)[:, 0, 0]))
    if isinstance(q, Rows):
        x = np.broadcast_to(operands[0], (rows, q.variables))
        seen = np.broadcast_to(operands[1], x.shape)
        return _rows(q, x, seen, params)
    assert isinstance(q, Query)
    raise NotImplementedError(q.query)


def _rows(q: Rows, x: Values, seen: Values, params: dict[str, Values]) -> Values:
    out = np.empty((len(x), q.variables, q.card))
    for i in range(q.variables):
        mask = np.broadcast_to(np.arange(q.variables) < i, x.shape) if q.prefix else seen.copy()
        mask = mask.copy()
        mask[:, i] = True
        for v in range(q.card):
            y = x.copy()
            y[:, i] = v
            out[:, i, v] = np.exp(log_value(q.root, y, mask, params)[:, 0, 0])
    return out
