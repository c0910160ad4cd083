"""Translation validation: is the module after a pass the same function?

POLYNOMIAL passes are compared over GF(2^31 - 1) at random points, exactly; what is not a polynomial
(softmax, exp) is a random leaf, the same on both sides because equal nodes are one object. By
Schwartz-Zippel a wrong pass survives one trial with probability at most degree / 2^31.
ROUNDING passes are compared in float64, in logarithms where a logarithm is read (pcc.interp.logs),
on seeded inputs and edge cases.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from pcc.circuit.ops import InputOp
from pcc.circuit.queries import Query, QueryOp
from pcc.interp.answers import deviations
from pcc.interp.logs import run_logs
from pcc.interp.opaque import fold_keys
from pcc.interp.queries import Models, evaluate
from pcc.interp.run import run
from pcc.ir.core import Op, Values, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Field
from pcc.ir.types import Tensor
from pcc.passes.manager import Exact
from pcc.passes.shared import share
from pcc.tensor.ops import Input, Unary

ROWS, FEW_ROWS = 24, 2
LARGE = 20_000  # input elements per row above which fewer rows are compared
LARGE_SCALE = 30.0  # of contexts and logits in the extreme case


class Mismatch(Exception):  # noqa: N818 (it is a finding, not a failure of the checker)
    """Two modules differ; `inputs` shows where."""

    def __init__(self, what: str, inputs: dict[str, Values]) -> None:
        super().__init__(what)
        self.inputs = inputs


def compare(
    before: Module,
    after: Module,
    exact: Exact,
    tolerance: float,
    given: dict[str, Values] | None = None,
) -> float:
    """Return the measured error, or raise `Mismatch`; on the inputs `given` only, if there are."""
    if exact is Exact.POLYNOMIAL and not _indexed(before) and _keyed(before, after):
        return _field(before, after, given)
    first, second = share(before, after)
    envs = cases(first, second) if given is None else [given]
    if any(isinstance(n, Query) for n in first.nodes()) and not any(
        isinstance(n, QueryOp) for n in second.nodes()
    ):
        return _properties(first, second, tolerance, envs)
    worst = 0.0
    for env in envs:
        models: Models = {}
        one, two = evaluate(first, env, models), evaluate(second, env, models)
        for (name, _), a, b in zip(before.outputs, one, two, strict=True):
            worst = max(worst, difference(name, a, b, tolerance, env))
    return worst


def _indexed(m: Module) -> bool:
    """Whether indices are computed from opaque values: random residues are no indices."""
    return any(n.opaque and isinstance(n.type, Tensor) and n.type.dtype == "i64" for n in m.nodes())


def _keyed(before: Module, after: Module) -> bool:
    """Whether every value that is no polynomial has the same stand-in on both sides.

    Where a pass rebuilt one whose folds cannot be told apart, the sides are compared as reals.
    """
    one, two = set(before.nodes()), set(after.nodes())
    return all(
        isinstance(n, Unary) and fold_keys(n.x) is not None
        for n in one ^ two
        if n.opaque and isinstance(n.type, Tensor)
    )


def _properties(
    before: Module, after: Module, tolerance: float, envs: Iterable[dict[str, Values]]
) -> float:
    """Check what the answers of a lowered query must satisfy, by naive evaluation."""
    worst = 0.0
    for env in envs:
        answers = run_logs(after.roots, env)
        for what, error in deviations(before, answers, env).items():
            if not error <= tolerance:
                raise Mismatch(f"{what} is off by {error:.3g}", env)
            worst = max(worst, error)
    return worst


def _field(before: Module, after: Module, given: dict[str, Values] | None) -> float:
    for seed in range(3):
        env = next(cases(before, after, seed=seed)) if given is None else given
        s, leaves = Field(seed), dict[Op, Values]()
        a = run(before.roots, env, s, leaves)
        b = run(after.roots, env, s, leaves)
        for (name, _), x, y in zip(before.outputs, a, b, strict=True):
            x, y = np.broadcast_arrays(x, y)
            if not np.array_equal(x, y):
                at = tuple(int(i) for i in np.argwhere(x != y)[0])
                raise Mismatch(f"output '{name}' differs at {at} over GF(p)", env)
    return 0.0


def difference(name: str, a: Values, b: Values, tolerance: float, env: dict[str, Values]) -> float:
    """Return the largest error of `b` against `a`, relative beyond 1; raise if over tolerance."""
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind in "ib":
        if not np.array_equal(a, b):
            raise Mismatch(f"output '{name}' has other integers", env)
        return 0.0
    if np.isnan(b).any():
        raise Mismatch(f"output '{name}' holds NaN", env)
    with np.errstate(invalid="ignore"):
        error = np.where(a == b, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(a)))
    worst = float(error.max(initial=0.0))
    if not worst <= tolerance:
        at = np.unravel_index(int(np.nanargmax(error)), error.shape)
        raise Mismatch(f"output '{name}' at {at}: {float(a[at])!r} became {float(b[at])!r}", env)
    return worst


def cases(before: Module, after: Module, seed: int = 0) -> Iterator[dict[str, Values]]:
    """Yield three sets of inputs.

    Random ones with an impossible value and a context for each row; nothing observed, contexts of
    zero; everything observed, large contexts.
    """
    inputs = {n.key: n for m in (before, after) for n in m.nodes() if isinstance(n, Input)}
    if any(isinstance(n, InputOp) for n in before.nodes()):
        x = Input("x", "i64" if before.discrete else "f32", "b", (before.n,))
        observed = Input("observed", "bool", "b", (before.n,))
        inputs = {"x": x, "observed": observed, **inputs}
    wide = sum(int(np.prod(n.shape)) for n in inputs.values()) > LARGE
    rows = FEW_ROWS if wide else ROWS
    for scale, seen in ((1.0, None), (0.0, False), (LARGE_SCALE, True)):
        sizes = {"b": (rows,), "c": (rows if seen is None else 1,), "": ()}
        env = {}
        for k, n in inputs.items():
            drawn = _draw(before, k, tensor(n), sizes[tensor(n).batch], seed)
            if k == "observed" and seen is not None:
                drawn = np.full(drawn.shape, seen)
            elif _real(n):
                drawn = drawn * scale
            elif k in ("x", "carry") and seen is None:
                drawn[-1, ...] = _outside(before, k, drawn[-1])
            env[k] = drawn
        yield env


def _real(n: Input) -> bool:
    return tensor(n).dtype == "f32" and n.key not in ("x", "u")


def _outside(m: Module, key: str, row: Values) -> Values:
    """Return a row whose first value is impossible (a continuous variable has no such value)."""
    if key == "carry":
        return np.asarray(-1)
    row = row.copy()
    row[0] = m.cards[0] if m.cards[0] else row[0]
    return row


def _draw(m: Module, key: str, t: Tensor, lead: tuple[int, ...], seed: int) -> Values:
    """Return numbers that depend on the input's name and shape only."""
    shape = lead + t.shape
    rng = np.random.default_rng([seed, *key.encode()])
    if key == "x":
        x = rng.integers(0, np.array([c or 3 for c in m.cards]), shape)
        return x if t.dtype == "i64" else x + 0.0
    if key == "carry":
        return rng.integers(0, m.cards[0] or 3, shape)
    if t.dtype == "bool":
        return rng.random(shape) < 0.5
    if t.dtype == "i64":
        return rng.integers(0, 2, shape)
    return rng.random(shape) if key == "u" else _normal(seed, key, shape)


@functools.lru_cache(maxsize=64)
def _normal(seed: int, key: str, shape: tuple[int, ...]) -> Values:
    return np.random.default_rng([seed, *key.encode()]).normal(size=shape)
