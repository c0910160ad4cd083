"""What every query means, by naive masked evaluation in float64: one evaluation per question.

Independent of the query compiler: only `pcc.interp.run.log_value` is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.interp.run import log_value
from pcc.ir.core import Values

CHUNK = 4096  # rows per evaluation
NAMES = ("x", "observed", "target", "carry", "u")


class _Model:
    def __init__(self, circuit: Circuit, inputs: Mapping[str, Values]) -> None:
        self.circuit, self.n = circuit, circuit.n
        self.params = {k: np.asarray(v) for k, v in inputs.items() if k not in NAMES}
        self.cards = np.array(circuit.cards)

    def value(self, x: Values, seen: Values, rows: Values, *, maximise: bool = False) -> Values:
        """Return log p(x[seen]) `[len(x)]`; `rows` says which request row each belongs to."""
        out = np.empty(len(x))
        for a in range(0, len(x), CHUNK):
            part = slice(a, a + CHUNK)
            params = {k: v if v.shape[0] == 1 else v[rows[part]] for k, v in self.params.items()}
            root = self.circuit.root
            y = log_value(root, x[part], seen[part], params, maximise=maximise)
            out[part] = y[:, 0, 0]
        return out

    def each(self, x: Values, seen: Values) -> Values:
        """Return log p(x[seen]) per request row."""
        return self.value(x, np.broadcast_to(seen, x.shape), np.arange(len(x)))

    def open_variable(self, x: Values, seen: Values, i: int) -> Values:
        """Return log p(X_i = v, x[seen]) `[B, V]` for every v; -inf beyond its values."""
        b, v = len(x), int(self.cards.max())
        wide = np.repeat(x, v, axis=0)
        wide[:, i] = np.tile(np.arange(v), b)
        mask = np.repeat(np.broadcast_to(seen, x.shape), v, axis=0).copy()
        mask[:, i] = True
        return self.value(wide, mask, np.repeat(np.arange(b), v)).reshape(b, v)


def _ratio(a: Values, b: Values) -> Values:
    """Return a - b in logs; the ratio of two zeros is zero."""
    return np.where(np.isneginf(a), -np.inf, a - np.where(np.isneginf(b), 0.0, b))


def reference(circuit: Circuit, query: str, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Return the outputs of a deterministic query by name (see the documentation's table)."""
    m, x = _Model(circuit, inputs), np.asarray(inputs["x"])
    every = np.ones(x.shape, bool)
    upto = np.arange(m.n)
    match query:
        case "loglik":
            return {"log_prob": m.each(x, every)}
        case "marginal":
            return {"log_prob": m.each(x, inputs["observed"])}
        case "conditional":
            seen = inputs["observed"]
            both = m.each(x, seen | inputs["target"])
            return {"log_prob": _ratio(both, m.each(x, seen))}
        case "prefix":
            logs = [m.each(x, upto < i) for i in range(m.n + 1)]
            steps = [_ratio(logs[i + 1], logs[i]) for i in range(m.n)]
            return {"log_cond": np.stack(steps, axis=1)}
        case "conditionals":
            rows = [_normalise(m.open_variable(x, upto < i, i)) for i in range(m.n)]
            return {"log_cond": np.stack(rows, axis=1)}
        case "univariate":
            return {"log_marg": _univariate(m, x, np.asarray(inputs["observed"]))}
        case _:
            raise PccError("E150", f"'{query}' has no single reference value")


def _normalise(rows: Values) -> Values:
    top = rows.max(axis=1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(rows - top).sum(axis=1, keepdims=True)) + top
    return _ratio(rows, total)


def _univariate(m: _Model, x: Values, seen: Values) -> Values:
    v = int(m.cards.max())
    out = np.full((len(x), m.n, v), -np.inf)
    possible = ~np.isneginf(m.each(x, seen))
    for i in range(m.n):
        free = _normalise(m.open_variable(x, seen, i))
        known = np.where(np.arange(v) == x[:, i : i + 1], 0.0, -np.inf)
        row = np.where(seen[:, i : i + 1], known, free)
        out[:, i] = np.where(possible[:, None], row, -np.inf)
    return out


def check(
    circuit: Circuit, query: str, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, float]:
    """Return how far the outputs of `sample`, `mode` or `draft` are from what they must satisfy."""
    m = _Model(circuit, inputs)
    if query == "draft":
        return {"q against masked evaluations": _draft_error(m, inputs, outputs)}
    x, seen = np.asarray(outputs["x"]), np.asarray(inputs["observed"])
    kept = np.where(seen, x == np.asarray(inputs["x"]), True).all()
    out = {"evidence kept": 0.0 if kept else float("inf")}
    every = np.ones(x.shape, bool)
    if query == "sample":
        out["log_prob of the row"] = gap(m.each(x, every), outputs["log_prob"])
    else:
        best = m.value(x, every, np.arange(len(x)), maximise=True)
        out["max-product value of the row"] = gap(best, outputs["log_value"])
    return out


def gap(want: Values, got: Values) -> float:
    if np.isnan(got).any():
        return float("inf")
    with np.errstate(invalid="ignore"):
        return float(np.where(want == got, 0.0, np.abs(want - got)).max(initial=0.0))


def _draft_error(m: _Model, inputs: Mapping[str, Values], outputs: Mapping[str, Values]) -> float:
    carry, drawn = np.asarray(inputs["carry"]), np.asarray(outputs["x"])
    x = np.concatenate([carry[:, None], drawn], axis=1)
    first = np.arange(m.n) == 0
    possible = ~np.isneginf(m.each(x, first))
    worst = 0.0
    for i in range(1, m.n):
        # Where the carry is impossible, its evidence is dropped.
        seen = np.broadcast_to(np.arange(m.n) < i, x.shape) & (possible[:, None] | ~first)
        want = np.exp(_normalise(m.open_variable(x, seen, i)))
        worst = max(worst, gap(want, np.asarray(outputs["q"])[:, i - 1]))
    return worst
