"""Naive float64 meaning of query ops, for validation: masked evaluations, one per question."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import QUERIES, Query, QueryOp, Rows, Value
from pcc.interp.reference import check, gap, reference
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
    x = np.broadcast_to(operands[0], (rows, q.variables))
    named = {**params, **dict(zip(QUERIES[q.query].inputs, operands, strict=True)), "x": x}
    return reference(_circuit(q), q.query, named)[q.output]


def _circuit(q: QueryOp) -> Circuit:
    card = q.card if isinstance(q, Query | Rows) else 2
    return Circuit(q.root, (card,) * q.variables)


def deviations(before: Module, answers: list[Values], env: dict[str, Values]) -> dict[str, float]:
    """Return how far the lowered outputs of a module of `q.query` ops are from their meaning."""
    q = before.roots[0]
    assert isinstance(q, Query)
    names = [name for name, _ in before.outputs]
    outputs = {k: np.asarray(v) for k, v in zip(names, answers, strict=True)}
    if q.query in ("sample", "mode", "draft"):
        return check(_circuit(q), q.query, env, outputs)
    want = reference(_circuit(q), q.query, env)
    return {k: gap(np.asarray(want[k]), v) for k, v in outputs.items()}


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
