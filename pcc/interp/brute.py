"""Enumeration: every query of a small circuit from the table of its joint, p(x) for all x.

Each state is evaluated with every variable observed; marginals are sums over that table, so nothing
here relies on what the circuit does with variables that are not observed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.interp.run import log_value
from pcc.ir.core import Values
from pcc.knobs import MAX_STATES

NAMES = ("x", "observed", "target", "carry", "u")


def states(cards: tuple[int, ...]) -> Values:
    """Return all states `[S, n]`, the last variable changing fastest."""
    if not all(cards):
        raise PccError("E132", "a continuous variable cannot be enumerated")
    if math.prod(cards) > MAX_STATES:
        raise PccError(
            "E151",
            f"{math.prod(cards)} states are too many to list (limit {MAX_STATES})",
            hint="use pcc.interp.reference",
        )
    return np.array(list(itertools.product(*map(range, cards))), np.int64).reshape(-1, len(cards))


class Joint:
    """The listed joint: `p [Bc, S]` linear, and `best [Bc, S]` with maxima for sums, over `x`."""

    def __init__(self, circuit: Circuit, inputs: Mapping[str, Values] | None = None) -> None:
        params = {k: np.asarray(v) for k, v in (inputs or {}).items() if k not in NAMES}
        self.x, self.cards = states(circuit.cards), circuit.cards
        rows = max((len(v) for v in params.values()), default=1)
        table: dict[bool, list[Values]] = {False: [], True: []}
        for r, maximise in itertools.product(range(rows), (False, True)):
            env = {k: v[:1] if len(v) == 1 else v[r : r + 1] for k, v in params.items()}
            y = log_value(circuit.root, self.x, None, env, maximise=maximise)
            table[maximise].append(np.exp(y[:, 0, 0]))
        self.p, self.best = np.array(table[False]), np.array(table[True])

    def match(self, x: Values, seen: Values) -> Values:
        """Return which states agree with each row of evidence, `[B, S]`."""
        seen = np.broadcast_to(seen, x.shape)
        return np.asarray((~seen[:, None] | (self.x == x[:, None])).all(axis=-1))

    def marginal(self, x: Values, seen: Values) -> Values:
        """p(x[seen]) `[B]`."""
        return np.asarray((self.match(x, seen) * self.p).sum(axis=1))

    def open(self, x: Values, seen: Values, i: int) -> Values:
        """p(X_i = v, x[seen without i]) `[B, V]`."""
        free = np.broadcast_to(seen, x.shape) & (np.arange(len(self.cards)) != i)
        mass = self.match(x, free) * self.p
        out = [(mass * (self.x[:, i] == v)).sum(axis=1) for v in range(max(self.cards))]
        return np.stack(out, axis=1)


def _log(p: Values) -> Values:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(p))


def _share(a: Values, b: Values) -> Values:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)


def brute(circuit: Circuit, query: str, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Return the outputs of a deterministic query by name; `mode` gives its `log_value` only."""
    j, x = Joint(circuit, inputs), np.asarray(inputs["x"])
    seen = np.asarray(inputs["observed"]) if "observed" in inputs else np.ones(x.shape, bool)
    order = np.arange(circuit.n)
    match query:
        case "loglik":
            return {"log_prob": _log(j.marginal(x, np.ones(x.shape, bool)))}
        case "marginal":
            return {"log_prob": _log(j.marginal(x, seen))}
        case "conditional":
            both = j.marginal(x, seen | np.asarray(inputs["target"]))
            return {"log_prob": _log(_share(both, j.marginal(x, seen)))}
        case "prefix":
            p = [j.marginal(x, order < i) for i in range(circuit.n + 1)]
            steps = [_share(b, a) for a, b in itertools.pairwise(p)]
            return {"log_cond": _log(np.stack(steps, axis=1))}
        case "conditionals":
            rows = [j.open(x, order < i, i) for i in range(circuit.n)]
            return {"log_cond": _log(np.stack([_share(r, _total(r)) for r in rows], axis=1))}
        case "univariate":
            return {"log_marg": _log(_univariate(j, x, seen))}
        case "mode":
            return {"log_value": _log((j.match(x, seen) * j.best).max(axis=1))}
        case _:
            raise PccError("E150", f"'{query}' has no single value to enumerate")


def _total(rows: Values) -> Values:
    return np.asarray(rows.sum(axis=1, keepdims=True))


def _univariate(j: Joint, x: Values, seen: Values) -> Values:
    """p(X_i = v | x[seen]) by counting the states that agree with all the evidence, i included."""
    mass = j.match(x, seen) * j.p
    out = np.zeros((len(x), len(j.cards), max(j.cards)))
    for i, card in enumerate(j.cards):
        for v in range(card):
            out[:, i, v] = (mass * (j.x[:, i] == v)).sum(axis=1)
    return _share(out, mass.sum(axis=1)[:, None, None])
