"""The interpreter: evaluates circuit and tensor values in a carrier. It judges every backend.

Inputs of a circuit: `x` (i64 or float `[B,n]`), `observed` (bool `[B,n]`; unobserved variables are
summed out) and named tensor inputs such as `context [Bc,D]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pcc.circuit.ops import Categorical, CircuitOp, Gaussian
from pcc.errors import PccError
from pcc.interp.opaque import stand_in
from pcc.ir.array import widened
from pcc.ir.core import Op, Values, postorder
from pcc.ir.module import Module
from pcc.ir.semiring import LogReal, MaxPlus, Semiring
from pcc.ir.types import Units
from pcc.knobs import MAX_VALUE
from pcc.tensor.ops import Input, TensorOp


def run(
    roots: tuple[Op, ...],
    inputs: Mapping[str, Values],
    s: Semiring,
    leaves: dict[Op, Values] | None = None,
) -> list[Values]:
    """Evaluate `roots`. In exact carriers, non-polynomial values come from `leaves` (filled)."""
    last: dict[Op, int] = {}
    filled = leaves = {} if leaves is None else leaves
    order = list(postorder(*roots, leaf=lambda n: n in filled or (s.exact and n.opaque)))
    for i, n in enumerate(order):
        for a in n.args:
            last[a] = i
    for r in roots:
        last[r] = len(order)
    value: dict[Op, Values] = {}
    rows = rows_of(inputs)
    for i, n in enumerate(order):
        _fits(n, rows)
        value[n] = _value(n, value, inputs, s, leaves)
        for a in set(n.args):
            # Free what no later node reads: deep circuits would hold many rows.
            if last[a] == i and a in value:
                del value[a]
    return [value[r] for r in roots]


def _fits(n: Op, rows: int) -> None:
    """Refuse a value too large to be computed; a constant or an input is there already."""
    t = n.type
    if isinstance(t, Units):
        size = t.folds * t.k * rows
    else:
        size = math.prod(t.shape) * (rows if t.batch else 1)
    if size > MAX_VALUE and n.args:
        what = f"'{n.name}' : {t} has {size} values in {rows} rows (limit {MAX_VALUE})"
        raise PccError("E405", what, at=n.loc, hint="evaluate fewer rows, or a smaller circuit")


def _value(
    n: Op,
    value: dict[Op, Values],
    inputs: Mapping[str, Values],
    s: Semiring,
    leaves: dict[Op, Values],
) -> Values:
    if n in leaves:
        return leaves[n]
    if isinstance(n, Categorical):
        return categorical(n, value[n.p], inputs, s)
    if isinstance(n, Gaussian):
        return gaussian(n, value[n.mu], value[n.sigma], inputs, s, leaves)
    if isinstance(n, Input):
        return _input(n, inputs, s)
    if s.exact and n.opaque:
        leaves[n] = stand_in(n, rows_of(inputs), s, len(leaves))
        return leaves[n]
    if isinstance(n, CircuitOp | TensorOp):
        return n.eval(s, *(value[a] for a in n.args))
    raise PccError("E402", f"'{n.name}' has no evaluator", at=n.loc)


def rows_of(inputs: Mapping[str, Values]) -> int:
    """Return the number of rows that the inputs have."""
    return max((a.shape[0] for a in inputs.values() if a.ndim), default=1)


def _input(n: Input, inputs: Mapping[str, Values], s: Semiring) -> Values:
    if n.key not in inputs:
        raise PccError("E403", f"input {n.key!r} is missing")
    a = widened(np.asarray(inputs[n.key]))
    rank = len(n.shape) + (1 if n.batch else 0)
    if a.ndim != rank or a.shape[a.ndim - len(n.shape) :] != n.shape:
        raise PccError("E403", f"input {n.key!r} has shape {a.shape}, expected {n.type}")
    return a if s.exact and a.dtype.kind != "f" else s.const(a, n.key)


def categorical(n: Categorical, p: Values, inputs: Mapping[str, Values], s: Semiring) -> Values:
    """Input units: the table's entry where observed, its row total where not."""
    x = np.asarray(inputs["x"])[:, list(n.vars)]
    observed = np.asarray(inputs["observed"])[:, list(n.vars)]
    card = p.shape[-1]
    index = np.clip(np.nan_to_num(x), 0, card - 1).astype(np.int64)
    inside = (x >= 0) & (x < card) & (x == index)
    wide = np.broadcast_to(p, (x.shape[0], *p.shape[-3:]))
    at = np.broadcast_to(index[..., None, None], (*wide.shape[:-1], 1))
    seen = np.take_along_axis(wide, at, axis=-1)[..., 0]
    seen = np.where(inside[..., None], seen, seen * 0)
    total = s.einsum("...v->...", p)
    return s.unit(np.where(observed[..., None], seen, total))


def gaussian(
    n: Gaussian,
    mu: Values,
    sigma: Values,
    inputs: Mapping[str, Values],
    s: Semiring,
    leaves: dict[Op, Values],
) -> Values:
    """Input units: the density where observed, 1 where not."""
    x = np.asarray(inputs["x"], np.float64)[:, list(n.vars), None]
    observed = np.asarray(inputs["observed"])[:, list(n.vars), None]
    if s.exact:
        leaves[n] = s.random_leaf((x.shape[0], *mu.shape[-2:]), f"opaque{len(leaves)}")
        return leaves[n]
    z = (np.where(observed, x, 0.0) - mu) / sigma
    log = -0.5 * z * z - np.log(sigma) - 0.5 * math.log(2 * math.pi)
    log = np.where(observed, log, 0.0)
    return log if isinstance(s, LogReal) else np.exp(log)


def log_value(
    root: Op,
    x: Values,
    observed: Values | None = None,
    inputs: Mapping[str, Values] | None = None,
    *,
    maximise: bool = False,
) -> Values:
    """Log of the circuit's value `[B,F,K]` in float64, unobserved variables summed out.

    With `maximise`, sums over latents are maxima (observed variables only: the max-product value).
    """
    seen = np.ones(x.shape, bool) if observed is None else observed
    env = {"x": x, "observed": seen, **(inputs or {})}
    with np.errstate(invalid="ignore"):
        (y,) = run((root,), env, MaxPlus() if maximise else LogReal())
    t = root.type
    return np.broadcast_to(y, (x.shape[0], t.folds, t.k))  # type: ignore[union-attr]


def root_of(m: Module) -> Op:
    """Return the single circuit value that a circuit module holds."""
    if len(m.outputs) != 1:
        raise PccError("E121", f"module '{m.name}' has {len(m.outputs)} outputs, expected 1")
    return m.outputs[0][1]
