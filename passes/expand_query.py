"""Rewrite compound queries as arithmetic over the primitives `q.value` and `q.rows`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pcc.circuit.queries import Query, Rows, Value
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class ExpandQuery(Pass):
    """log p(x) => log value; p(a | b) => value(a, b) / value(b); rows => normalised rows.

    Pays: two primitives are lowered, whatever the queries. Declines `prefix`, `sample`, `mode` and
    `draft`: each is one pass of its own over the circuit.
    """

    name: ClassVar[str] = "expand-query"
    exact: ClassVar[Exact] = Exact.ROUNDING

    def run(self, module: Module, notes: Notes) -> Module:
        """Expand every query of the module."""
        return module.rewrite(lambda n, _: expand(n) if isinstance(n, Query) else None)


def expand(q: Query) -> Op | None:
    """Return the query's definition over primitives, or None if it is one itself."""
    n = q.variables
    every = mk.const(np.ones(n, bool))
    match q.query:
        case "loglik":
            return t.Log(Value(q.root, q.inputs[0], every))
        case "marginal":
            return t.Log(Value(q.root, *q.inputs))
        case "conditional":
            x, observed, target = q.inputs
            both = t.Log(Value(q.root, x, t.Or(observed, target)))
            return t.Sub(both, t.Log(Value(q.root, x, observed)))
        case "conditionals":
            rows = t.Log(Rows(q.root, q.inputs[0], every, True, q.card))
            return t.Sub(rows, mk.reshape(t.ReduceLse(rows, 1), (n, 1)))
        case "univariate":
            return _univariate(q)
        case _:
            return None


def _univariate(q: Query) -> Op:
    """Log p(X_i = v | x[observed]): at an observed i, 0 at x_i and -inf elsewhere."""
    (x, observed), n, v = q.inputs, q.variables, q.card
    assert tensor(x).dtype == "i64"
    rows = t.Log(Rows(q.root, x, observed, False, v))
    free = t.Sub(rows, mk.reshape(t.ReduceLse(rows, 1), (n, 1)))
    mask = mk.reshape(observed, (n, 1))
    hit = t.Equal(mk.reshape(x, (n, 1)), mk.const(np.arange(v).reshape(1, v)))
    never = mk.full((1, 1), -np.inf)
    known = t.Where(hit, mk.full((1, 1), 0.0), never)
    # Equality: parameters that overflowed to NaN must not pass for evidence of probability zero.
    impossible = t.Equal(mk.reshape(t.Log(Value(q.root, x, observed)), (1, 1)), never)
    return t.Where(impossible, never, t.Where(mask, known, free))
