"""What every query means, by naive masked evaluation in float64: one evaluation per question.

Independent of the query compiler: circuits are only ever evaluated bottom-up by `pcc.interp.run`.
Results that depend on random numbers (`sample`, `draft`) are not predicted but judged: `check`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.circuit.ops import Categorical, Gaussian
from pcc.errors import PccError
from pcc.interp.run import log_value, run
from pcc.ir.core import Op, Values
from pcc.ir.semiring import MaxPlus
from pcc.ir.types import Tensor, Units
from pcc.knobs import CELLS, ROWS

NAMES = ("x", "observed", "target", "carry", "u")


class _Model:
    def __init__(self, circuit: Circuit, inputs: Mapping[str, Values]) -> None:
        self.circuit, self.n = circuit, circuit.n
        self.params = {k: np.asarray(v) for k, v in inputs.items() if k not in NAMES}
        self.cards = np.array(circuit.cards)
        self.chunk = max(1, min(ROWS, CELLS // max(map(_cells, circuit.module().nodes()))))

    def value(self, x: Values, seen: Values, rows: Values, *, maximise: bool = False) -> Values:
        """Return log p(x[seen]) `[len(x)]`; `rows` says which request row each belongs to."""
        out, root = np.empty(len(x)), self.circuit.root
        for part, params in self._parts(rows):
            y = log_value(root, x[part], seen[part], params, maximise=maximise)
            out[part] = y[:, 0, 0]
        return out

    def _parts(self, rows: Values) -> list[tuple[Values, dict[str, Values]]]:
        """Cut the rows up so that parameters are computed once per context, and memory is bound."""
        whole = [np.arange(len(rows))]
        shared = all(v.shape[0] == 1 for v in self.params.values())
        if not shared and len(np.unique(rows)) < len(rows):
            whole = [np.flatnonzero(rows == r) for r in np.unique(rows)]
        cut = [p[a : a + self.chunk] for p in whole for a in range(0, len(p), self.chunk)]
        return [(p, self._params(rows[p])) for p in cut]

    def _params(self, rows: Values) -> dict[str, Values]:
        take = rows[:1] if (rows == rows[0]).all() else rows
        return {k: v if v.shape[0] == 1 else v[take] for k, v in self.params.items()}

    def each(self, x: Values, seen: Values, *, maximise: bool = False) -> Values:
        """Return log p(x[seen]) per request row."""
        seen, rows = np.broadcast_to(seen, x.shape), np.arange(len(x))
        return self.value(x, seen, rows, maximise=maximise)

    def open(self, x: Values, seen: Values, i: int) -> Values:
        """Return log p(X_i = v, x[seen]) `[B, V]`; -inf beyond the variable's values."""
        b, v = len(x), int(self.cards.max())
        wide = np.repeat(x, v, axis=0)
        wide[:, i] = np.tile(np.arange(v), b)
        mask = np.repeat(np.broadcast_to(seen, x.shape), v, axis=0)
        mask[:, i] = True
        return self.value(wide, mask, np.repeat(np.arange(b), v)).reshape(b, v)

    def best(self, x: Values, seen: Values) -> Values:
        """Return the largest max-product value of any completion of x[seen], `[B]`.

        max_y max_{induced trees} prod(weights, leaves) = max over trees of the product of each
        leaf's maximum: an induced tree of a decomposable circuit reads every variable once.
        """
        out, seen = np.empty(len(x)), np.broadcast_to(seen, x.shape)
        for part, params in self._parts(np.arange(len(x))):
            env = {"x": x[part], "observed": seen[part], **params}
            tops = _leaf_maxima(self.circuit, env)
            with np.errstate(invalid="ignore"):
                (y,) = run((self.circuit.root,), env, MaxPlus(), tops)
            out[part] = np.broadcast_to(y, (len(part), 1, 1))[:, 0, 0]
        return out


def _cells(n: Op) -> int:
    """Values per row that a node holds."""
    if isinstance(n.type, Units):
        # Input units are read from a table with a row axis of its own.
        width = n.p.type.shape[-1] if isinstance(n, Categorical) else 1  # type: ignore[union-attr]
        return n.type.folds * n.type.k * width
    assert isinstance(n.type, Tensor)
    return math.prod(n.type.shape) if n.type.batch else 1


def _leaf_maxima(circuit: Circuit, env: dict[str, Values]) -> dict[Op, Values]:
    """Return the log values of all input units; an unobserved one takes its largest."""
    out: dict[Op, Values] = {}
    for n in circuit.module().nodes():
        if isinstance(n, Categorical):
            (value,) = run((n,), {**env, "observed": np.ones_like(env["observed"])}, MaxPlus())
            (p,) = run((n.p,), env, MaxPlus())
            with np.errstate(divide="ignore"):
                top = np.log(p.max(axis=-1))
        elif isinstance(n, Gaussian):
            (value,) = run((n,), {**env, "observed": np.ones_like(env["observed"])}, MaxPlus())
            (sigma,) = run((n.sigma,), env, MaxPlus())
            top = -np.log(sigma) - 0.5 * math.log(2 * math.pi)
        else:
            continue
        out[n] = np.where(env["observed"][:, list(n.vars), None], value, top)
    return out


def _ratio(a: Values, b: Values) -> Values:
    """A - b in logs; the ratio of two zeros is zero."""
    return np.where(np.isneginf(a), -np.inf, a - np.where(np.isneginf(b), 0.0, b))


def reference(circuit: Circuit, query: str, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Return the outputs of a deterministic query by name (see the documentation's table).

    `mode` gives `log_value` only: the row that reaches it need not be unique.
    """
    m = _Model(circuit, inputs)
    given = {k: np.asarray(inputs[k]) for k in NAMES if k in inputs}
    match query:
        case "sample" | "draft":
            raise PccError(
                "E150",
                f"'{query}' has no single reference value",
                hint="judge what was drawn with pcc.interp.reference.check",
            )
        case "conditionals" | "univariate" if not circuit.cards or not all(circuit.cards):
            raise PccError("E132", f"'{query}' needs every variable to be finite")
        case "loglik" | "marginal" | "conditional" | "prefix" | "conditionals" | "univariate":
            return _deterministic(m, query, given)
        case "mode":
            return {"log_value": m.best(given["x"], given["observed"])}
        case _:
            raise PccError("E130", f"unknown query {query!r}")


def log_joint(circuit: Circuit, inputs: Mapping[str, Values], seen: Values) -> Values:
    """Return log p(x[seen]) `[B]`, with the request's parameters."""
    return _Model(circuit, inputs).each(np.asarray(inputs["x"]), seen)


def _deterministic(m: _Model, query: str, given: dict[str, Values]) -> dict[str, Values]:
    x, upto = given["x"], np.arange(m.n)
    match query:
        case "loglik":
            return {"log_prob": m.each(x, np.ones(x.shape, bool))}
        case "marginal":
            return {"log_prob": m.each(x, given["observed"])}
        case "conditional":
            # A variable that is both observed and a target is in both, so it counts as observed.
            both = m.each(x, given["observed"] | given["target"])
            return {"log_prob": _ratio(both, m.each(x, given["observed"]))}
        case "prefix":
            logs = [m.each(x, upto < i) for i in range(m.n + 1)]
            steps = [_ratio(logs[i + 1], logs[i]) for i in range(m.n)]
            return {"log_cond": np.stack(steps, axis=1)}
        case "conditionals":
            rows = [_normalise(m.open(x, upto < i, i)) for i in range(m.n)]
            return {"log_cond": np.stack(rows, axis=1)}
        case _:
            return {"log_marg": _univariate(m, x, given["observed"])}


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
        free = _normalise(m.open(x, seen, i))
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
        return _check_draft(circuit, inputs, outputs)
    given, x, seen = np.asarray(inputs["x"]), np.asarray(outputs["x"]), inputs["observed"]
    # What is observed stays as it is; an observed NaN equals nothing and is refused elsewhere.
    out = {"evidence kept": _flag(bool(np.where(seen, x == given, True).all()))}
    every = np.ones(x.shape, bool)
    if query == "sample":
        value = m.each(x, every)
        possible = ~np.isneginf(m.each(given, np.asarray(seen)))
        out["drawn rows are possible"] = _flag(not np.isneginf(value[possible]).any())
        out["log_prob of the row"] = gap(value, outputs["log_prob"])
    else:
        value = m.each(x, every, maximise=True)
        out["max-product value of the row"] = gap(value, outputs["log_value"])
        out["largest max-product value"] = gap(m.best(given, np.asarray(seen)), value)
    return out


def _flag(ok: bool) -> float:
    return 0.0 if ok else math.inf


def gap(want: Values, got: Values) -> float:
    """Return the largest difference; equal infinities differ by nothing, NaN by infinity."""
    if np.isnan(got).any() or np.isnan(want).any():
        return math.inf
    with np.errstate(invalid="ignore"):
        return float(np.where(want == got, 0.0, np.abs(want - got)).max(initial=0.0))


def draft_rows(circuit: Circuit, inputs: Mapping[str, Values], drawn: Values) -> Values:
    """Return q(x_i = v | carry, drawn_<i) `[B, n-1, V]`, linear, for i = 1..n-1.

    Where the carry has probability zero its evidence is dropped: variable 0 is summed out.
    """
    m, carry = _Model(circuit, inputs), np.asarray(inputs["carry"])
    if not all(circuit.cards) or m.n < 2:
        raise PccError("E134", "'draft' needs two or more variables, all finite")
    x = np.concatenate([carry[:, None], drawn], axis=1)
    first = np.arange(m.n) == 0
    possible = ~np.isneginf(m.each(x, first))
    rows = []
    for i in range(1, m.n):
        seen = np.broadcast_to(np.arange(m.n) < i, x.shape) & (possible[:, None] | ~first)
        rows.append(np.exp(_normalise(m.open(x, seen, i))))
    return np.stack(rows, axis=1)


def _check_draft(
    circuit: Circuit, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, float]:
    drawn = np.asarray(outputs["x"])
    want, got = draft_rows(circuit, inputs, drawn), np.asarray(outputs["q"])
    # A circuit that is zero everywhere has no law: its draft is any row of values in range.
    law = want.any(axis=(1, 2))
    inside = (drawn >= 0) & (drawn < want.shape[-1])
    index = np.where(inside, drawn, 0)[..., None]
    chosen = np.take_along_axis(want, index, axis=-1)[..., 0]
    return {
        "drawn values are possible": _flag(bool(inside.all() and (chosen[law] > 0).all())),
        "q against masked evaluations": gap(want[law], got[law]),
    }
