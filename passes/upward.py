"""The upward pass of a query, its tables scaled so that linear arithmetic can be proven safe."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.queries import Value
from pcc.ir.core import Op, Values, postorder, tensor
from pcc.passes import pieces as mk
from pcc.passes.evidence import Evidence
from pcc.passes.messages import Up
from pcc.passes.ranges import HIGH, LOW, bounds
from pcc.passes.rescale import Spans
from pcc.tensor import ops as t


def known_from(observed: Op, n: int) -> tuple[list[bool | None], Op | None]:
    """Split a mask into what is known at compile time and what is read at run time."""
    if isinstance(observed, t.Const):
        return [bool(v) for v in observed.value.value], None
    return [None] * n, observed


def value(q: Value, *, scale: bool) -> Op:
    """p(x[observed]): one upward pass.

    With trained tables, each is divided by its largest unit per value: p(x) = prod_i m_i(x_i) p'(x)
    by homogeneity, which keeps p' in a narrow range, so that linear arithmetic can be proven safe.
    Where it can be without (`rescale`), the factors' look-ups are saved.
    """
    known, mask = known_from(q.observed, q.variables)
    tables = {n for n in postorder(q.root) if isinstance(n, c.Categorical)}
    trained = all(tensor(n.p).batch == "" and isinstance(n.p, t.Const) for n in tables)
    if not (scale and trained and tables and len(known) > 1 and any(k is not False for k in known)):
        up = Up(Evidence(q.x, known, mask))
        return rowwise(mk.reshape(up(q.root), ()), q.x)
    plain = Up(Evidence(q.x, known, mask))(q.root)
    if Spans((plain,), bounds((plain,)), (LOW, HIGH)).scaled(plain):
        return rowwise(mk.reshape(plain, ()), q.x)
    return _scaled(q, known, mask)


def _scaled(q: Value, known: list[bool | None], mask: Op | None) -> Op:
    tables = [n for n in postorder(q.root) if isinstance(n, c.Categorical)]
    width = max(tensor(n.p).shape[2] for n in tables)
    top = np.zeros((q.variables, width + 3))
    for n in tables:
        assert isinstance(n.p, t.Const)
        p = n.p.value.value.astype(np.float64)
        best = np.zeros((len(n.vars), width + 3))
        best[:, 1 : 1 + p.shape[2]] = p.max(axis=1)
        best[:, width + 2] = p.sum(axis=2).max(axis=1)
        np.maximum.at(top, list(n.vars), best)
    # Powers of two: dividing by them rounds nothing.
    power = np.exp2(np.ceil(np.log2(np.where(top > 0, top, 1.0))))
    ev = _ScaledEvidence(q.x, known, mask, width=width)
    for n in tables:
        ev.tables[n] = _scaled_table(n, width, 1.0 / power[list(n.vars)])
    discrete = sorted({v for n in tables for v in n.vars})
    body = Up(ev)(q.root)
    scales = mk.const(power[discrete][:, None, :].astype(np.float32))
    factor = t.ReduceProd(mk.reshape(t.Lookup(scales, ev.index(discrete)), (len(discrete),)), 0)
    return t.Mul(factor, mk.reshape(body, ()))


def _scaled_table(n: c.Categorical, width: int, factor: Values) -> Op:
    """Table between columns of zeros, then the totals; each column times its factor."""
    f, k, v = tensor(n.p).shape
    zeros = mk.full((f, k, width + 1 - v), 0.0)
    totals = mk.reshape(t.ReduceSum(n.p, 2), (f, k, 1))
    first = mk.full((f, k, 1), 0.0)
    padded = t.Concat((first, n.p, zeros, totals), 2)
    return t.Mul(padded, mk.const(factor[:, None, :].astype(np.float32)))


@dataclass
class _ScaledEvidence(Evidence):
    """Evidence over padded tables: columns 0 and V + 1 are impossible, V + 2 "summed out"."""

    tables: dict[Op, Op] = field(default_factory=dict)
    width: int = 0

    def index(self, variables: list[int]) -> Op:
        """Return the table columns to read, `[len(variables)]`."""
        assert self.x is not None
        x = self.x if tensor(self.x).dtype == "i64" else t.Cast(self.x, "i64")
        column: Op = t.Column(x, self.width)
        free = mk.const(np.full(len(self.known), self.width + 2))
        if self.mask is not None:
            column = t.Where(self.mask, column, free)
        elif not all(self.known):
            column = t.Where(mk.const(np.array(self.known, bool)), column, free)
        return mk.take(column, variables)

    def leaf(self, n: c.InputOp) -> Op:
        if n not in self.tables:
            return super().leaf(n)
        return t.Lookup(self.tables[n], self.index(list(n.vars)))


def rowwise(x: Op, like: Op) -> Op:
    """Give `x` the batch axis of a per-row input."""
    if tensor(x).batch == "b":
        return x
    return t.Expand(x, like, tensor(x).shape)
