"""What `sample` and `draft` must draw from given uniforms: one row at a time, choice by choice.

At a sum unit o the input i has mass w[o,i] up(x)[i], with up the units given the evidence; a
product passes its choice to every operand; an input unit draws its variable. An index is the first
j with cumsum_j > u * total. Slots: the sums with a choice from the root downward (the reverse of
the order in which operands come first), one for each fold, then the drawn variables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.interp.logs import LogRun
from pcc.interp.queries import Evaluations
from pcc.ir.core import Op, Values, postorder, rewrite, units


def unfused(root: Op) -> Op:
    """Return the circuit with fused layers replaced by their definitions."""
    (out,) = rewrite((root,), lambda n, _: None if (e := c.expand(n)) is n else e)
    return out


def drawn(m: Evaluations, x: Values, seen: Values, u: Values, tokens: Sequence[int]) -> Values:
    """Return `[B, n]`: `x` where seen, else what `u` draws; impossible evidence is dropped."""
    seen = np.broadcast_to(seen, x.shape)
    use = seen & ~np.isneginf(m.value(x, seen))[:, None]
    work = _Rows(m, x, use, u, tokens)
    new = np.stack([work.row(b) for b in range(len(x))])
    return np.where(seen, x, new)


class _Rows:
    def __init__(
        self, m: Evaluations, x: Values, use: Values, u: Values, tokens: Sequence[int]
    ) -> None:
        self.m, self.u = m, u
        run = LogRun({}, {**m.weights, **m.units_of(x, use)})
        nodes = [n for n in postorder(m.root) if isinstance(n, c.CircuitOp)]
        self.up: dict[Op, Values] = {n: _wide(run.solve((True, n)), len(x), 2) for n in nodes}
        self.weight: dict[Op, Values] = {n: _wide(run.solve((True, n.w)), len(x), 3)
                       for n in nodes if isinstance(n, c.Sum | c.Mix)}  # fmt: skip
        self.slot: dict[Op, int] = {}
        count = 0
        for n in reversed(nodes):
            if isinstance(n, c.Sum | c.Mix) and self._inputs(n) > 1:
                self.slot[n] = count
                count += units(n).folds
        self.token = {v: count + i for i, v in enumerate(tokens)}

    @staticmethod
    def _inputs(n: Op) -> int:
        return units(n.x).k if isinstance(n, c.Sum) else len(n.xs)  # type: ignore[attr-defined]

    def row(self, b: int) -> Values:
        """Return the values that row `b` draws."""
        out = np.zeros(self.m.n, np.int64)
        todo: list[tuple[Op, int, int]] = [(self.m.root, 0, 0)]
        while todo:
            n, f, k = todo.pop()
            match n:
                case c.Categorical(vars=vs):
                    slot = self.token.get(vs[f])
                    if slot is not None:
                        p = self.m.tables[n]
                        p = p[b % len(p)] if p.ndim > 3 else p
                        out[vs[f]] = _choose(p[f, k], self.u[b, slot])
                case c.Sum(x=x):
                    todo.append((x, f, self._pick(b, n, f, k, self.up[x][b, f])))
                case c.Mix(xs=xs):
                    scores = np.array([self.up[x][b, f, k] for x in xs])
                    todo.append((xs[self._pick(b, n, f, k, scores)], f, k))
                case _:
                    todo += _below(n, f, k)
        return out

    def _pick(self, b: int, n: Op, f: int, k: int, scores: Values) -> int:
        if n not in self.slot:
            return 0
        return _choose(self.weight[n][b, f, k] + scores, self.u[b, self.slot[n] + f])


def _wide(v: Values, rows: int, rank: int) -> Values:
    lead = v if v.ndim > rank else v[None]
    return np.broadcast_to(lead, (rows, *lead.shape[1:]))


def _below(n: Op, f: int, k: int) -> list[tuple[Op, int, int]]:
    match n:
        case c.Hadamard(xs=xs):
            return [(x, f, k) for x in xs]
        case c.Kronecker(a=a, b=b):
            i, j = divmod(k, units(b).k)
            return [(a, f, i), (b, f, j)]
        case c.Gather(x=x, folds=folds):
            return [(x, folds[f], k)]
        case c.Concat(xs=xs):
            for x in xs:
                if f < units(x).folds:
                    return [(x, f, k)]
                f -= units(x).folds
        case _:
            pass
    raise PccError("E404", f"'{n.name}' has no top-down pass", at=n.loc)


def _choose(logs: Values, u: float) -> int:
    top = logs.max()
    mass = np.exp(logs - (0.0 if np.isneginf(top) else top))
    total = mass.cumsum()
    hit = np.flatnonzero((mass > 0) & (total > u * total[-1]))
    positive = np.flatnonzero(mass > 0)
    return int(hit[0] if hit.size else positive[-1] if positive.size else 0)
