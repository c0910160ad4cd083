"""What lowered answers must satisfy, judged in logarithms: rows that are drawn, or largest.

Everything here, parameters too, is held as logarithms: a probability of 1e-323 has one binary digit
as a float64, and the logarithm of that is off by 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pcc.circuit.ops import Categorical, CircuitOp, Gaussian, InputOp
from pcc.circuit.queries import QUERIES, Query
from pcc.interp.draws import drawn, unfused
from pcc.interp.logs import LogRun
from pcc.interp.queries import Evaluations, evaluations, meaning, normalise
from pcc.interp.reference import gap
from pcc.ir.core import Op, Values, postorder, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import MaxPlus

TOP = 1 + 1e-6  # of a probability that was rounded
TERMS = 1 << 22  # float64 values of one layer's terms: rows are judged in parts of this size


def deviations(before: Module, answers: list[Values], env: dict[str, Values]) -> dict[str, float]:
    """Return how far the lowered outputs of a module of `q.query` ops are from their meaning."""
    with np.errstate(invalid="ignore", over="ignore"):  # a wrong answer may be infinite
        return _deviations(before, answers, env)


def _deviations(before: Module, answers: list[Values], env: dict[str, Values]) -> dict[str, float]:
    q = before.roots[0]
    assert isinstance(q, Query)
    names = [name for name, _ in before.outputs]
    out = {k: np.asarray(v) for k, v in zip(names, answers, strict=True)}
    match q.query:
        case "sample":
            return _sample(q, env, out)
        case "draft":
            return _draft(q, env, out)
        case "stepwise":
            return _stepwise(evaluations(q.root, env), env["carry"], out["x"], q.card)
        case "mode":
            return _mode(evaluations(q.root, env), env, out)
        case _:
            given = {k: env[k] for k in QUERIES[q.query].inputs}
            want = meaning(q, evaluations(q.root, env), given)
            return {k: gap(want, v) for k, v in out.items()}


def _flag(ok: object) -> float:
    return 0.0 if ok else math.inf


def _kept(x: Values, seen: Values, out: Values) -> float:
    return _flag(np.where(seen, x == out, True).all())


def _sample(q: Query, env: dict[str, Values], out: Mapping[str, Values]) -> dict[str, float]:
    m, x, seen = evaluations(unfused(q.root), env), env["x"], env["observed"]
    value = m.value(out["x"], np.ones(x.shape, bool))
    possible = ~np.isneginf(m.value(x, seen))
    want = drawn(m, x, seen, env["u"], range(q.variables))
    law = lawful(m, x)
    return {
        "evidence kept": _kept(x, seen, out["x"]),
        "drawn rows are possible": _flag(not np.isneginf(value[possible]).any()),
        "log_prob of the row": gap(value, out["log_prob"]),
        "values drawn from u": _flag(np.array_equal(want[law], out["x"][law])),
    }


def lawful(m: Evaluations, x: Values) -> Values:
    """Return the rows `[B]` with a prior: a circuit that is zero everywhere has no law to judge."""
    return ~np.isneginf(m.value(x, np.zeros(x.shape, bool)))


# ---------------------------------------------------------------- drafts


def _draft(q: Query, env: dict[str, Values], out: Mapping[str, Values]) -> dict[str, float]:
    """Rows must be q(x_i | carry, drawn_<i)."""
    m, n = evaluations(unfused(q.root), env), q.variables
    table = _laws(m, env["carry"], out["x"], q.card)
    inside, chosen = _entries(table, out["x"])
    x = np.zeros((len(env["carry"]), n), np.int64)
    x[:, 0] = env["carry"]
    want = drawn(m, x, np.arange(n) == 0, env["u"], range(1, n))[:, 1:]
    law, rows = lawful(m, x), out["q"]
    return {
        "values and laws are in range": _flag(inside.all() and ((rows >= 0) & (rows <= TOP)).all()),
        "drawn values are possible": _flag(not np.isneginf(chosen[law]).any()),
        "q against masked evaluations": gap(np.exp(table)[law], rows[law]),
        "values drawn from u": _flag(np.array_equal(want[law], out["x"][law])),
    }


def _stepwise(m: Evaluations, carry: Values, x: Values, card: int) -> dict[str, float]:
    """Each choice must have the largest conditional; which one of equal ones is not judged."""
    table = _laws(m, carry, x, card)
    inside, chosen = _entries(table, x)
    law = lawful(m, np.zeros((len(x), m.n), np.int64))
    return {
        "chosen values are possible": _flag(inside.all() and not np.isneginf(chosen[law]).any()),
        "conditional of the choice below the largest": gap(table.max(axis=-1)[law], chosen[law]),
    }


def _laws(m: Evaluations, carry: Values, drafts: Values, card: int) -> Values:
    """Log q(x_i = v | carry, drafts_<i) `[B, n-1, card]`; an impossible carry is summed out."""
    x = np.concatenate([np.asarray(carry)[:, None], drafts], axis=1)
    order = np.arange(m.n)
    possible = ~np.isneginf(m.value(x, order == 0))
    ask = [(i, (order < i) & (possible[:, None] | (order > 0))) for i in range(1, m.n)]
    return normalise(m.opened(x, ask, card))


def _entries(table: Values, index: Values) -> tuple[Values, Values]:
    """Return which indices are inside the table's last axis, and table[.., index]."""
    inside = (index >= 0) & (index < table.shape[-1])
    at = np.where(inside, index, 0)[..., None]
    return inside, np.take_along_axis(table, at, axis=-1)[..., 0]


# ---------------------------------------------------------------- max-product


def _mode(m: Evaluations, env: dict[str, Values], out: Mapping[str, Values]) -> dict[str, float]:
    x, seen = env["x"], np.asarray(env["observed"])
    value = best(m, out["x"], np.ones(x.shape, bool))
    return {
        "evidence kept": _kept(x, seen, out["x"]),
        "max-product value of the row": gap(value, out["log_value"]),
        "largest max-product value": gap(best(m, x, seen), value),
    }


def best(m: Evaluations, x: Values, seen: Values) -> Values:
    """Return the largest log max-product value of any completion of x[seen], `[B]`.

    A sum counts its largest term only, so that an unobserved leaf counts its largest value: an
    induced tree of a decomposable circuit reads every variable once.
    """
    tops: dict[Op, Values] = {n: _top(m, n) for n in m.inputs}
    size = max((math.prod(tensor(w).shape) for w in m.weights), default=1)
    rows = max(1, TERMS // size)
    parts = [slice(a, a + rows) for a in range(0, len(x), rows)]
    return np.concatenate([_best(m, tops, x, seen, part) for part in parts])


def _best(m: Evaluations, tops: Mapping[Op, Values], x: Values, seen: Values, at: slice) -> Values:
    here = m.units_of(x, np.ones(x.shape, bool))
    rows = len(x[at])
    value: dict[Op, Values] = {}
    for n in postorder(m.root):
        if isinstance(n, InputOp):
            mask = seen[at][:, list(n.vars), None]
            value[n] = np.where(mask, _part(here[n], at, 2), _part(tops[n], at, 2))
        elif isinstance(n, CircuitOp):
            operands = ((a, len(tensor(a).shape)) for a in n.args if not isinstance(a, CircuitOp))
            weights = {a: _part(m.weights[a], at, rank) for a, rank in operands}
            value[n] = n.eval(_MaxLogs(), *(weights.get(a, value.get(a)) for a in n.args))  # type: ignore[arg-type]
    return np.broadcast_to(value[m.root], (rows, 1, 1))[:, 0, 0]


def _part(v: Values, at: slice, rank: int) -> Values:
    return v[at] if v.ndim > rank and len(v) > 1 else v


def _top(m: Evaluations, n: Op) -> Values:
    """Return the log of the largest value of each input unit, `[F,K]` or `[B,F,K]`."""
    if isinstance(n, Categorical):
        return np.asarray(m.tables[n].max(axis=-1))
    assert isinstance(n, Gaussian)
    sigma = LogRun(m.params, {}).solve((False, n.sigma))
    return -np.log(sigma) - 0.5 * math.log(2 * math.pi)


class _MaxLogs(MaxPlus):
    """Max-product with weights in logarithms too."""

    def unit(self, p: Values) -> Values:
        return p
