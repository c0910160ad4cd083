"""What is known of each variable, and the input units that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pcc.circuit.ops import Categorical, Gaussian, InputOp
from pcc.errors import PccError
from pcc.ir.core import Op, tensor, units
from pcc.passes import pieces as mk
from pcc.tensor import ops as t


@dataclass
class Evidence:
    """Values `x [n]` and, per variable, whether they count.

    `known[i]` is True (observed), False (summed out) or None (as `mask[i]` says at run time).
    `trusted` values are inside their ranges by construction; others may be anything.
    """

    x: Op | None
    known: Sequence[bool | None]
    mask: Op | None = None
    trusted: bool = False
    _leaves: dict[Op, Op] = field(default_factory=dict)

    def leaf(self, n: InputOp) -> Op:
        """Return the linear input units `[F,K]` of a layer."""
        if n not in self._leaves:
            groups: dict[bool | None, list[int]] = {}
            for f, v in enumerate(n.vars):
                groups.setdefault(self.known[v], []).append(f)
            if None in groups and True in groups:  # one masked look-up instead of two pieces
                groups = {None: sorted(groups.pop(None) + groups.pop(True)), **groups}
            parts = [(folds, self._part(n, folds, known)) for known, folds in groups.items()]
            self._leaves[n] = mk.assemble(len(n.vars), parts)
        return self._leaves[n]

    def _part(self, n: InputOp, folds: list[int], known: bool | None) -> Op:
        k = units(n).k
        if isinstance(n, Gaussian):
            ones = mk.full((len(folds), k), 1.0)
            if known is False:
                return ones
            density = self._density(n, folds, masked=known is None)
            return density if known else t.Where(self._mask(n, folds), density, ones)
        assert isinstance(n, Categorical)
        p = mk.take(n.p, folds)
        if known is False:
            return total(p)
        if tensor(p).batch == "" and not self.trusted:
            return self._padded(n, p, folds, masked=known is None)
        seen = self._seen(n, p, folds)
        return seen if known else t.Where(self._mask(n, folds), seen, total(p))

    def _column(self, n: InputOp, folds: list[int]) -> Op:
        if self.x is None:
            raise PccError("E131", "the query has no values to read")
        return mk.take(self.x, [n.vars[f] for f in folds])

    def _index(self, n: InputOp, folds: list[int]) -> Op:
        x = self._column(n, folds)
        return x if tensor(x).dtype == "i64" else t.Cast(x, "i64")

    def _mask(self, n: InputOp, folds: list[int]) -> Op:
        assert self.mask is not None
        return mk.reshape(mk.take(self.mask, [n.vars[f] for f in folds]), (len(folds), 1))

    def _padded(self, n: InputOp, p: Op, folds: list[int], *, masked: bool) -> Op:
        # More columns, for impossible values and for a variable that is summed out, make every
        # case one table look-up.
        f, k, v = tensor(p).shape
        empty = mk.full((f, k, 1), 0.0)
        columns = [empty, p, empty]
        index: Op = t.Column(self._index(n, folds), v)
        if masked:
            columns.append(mk.reshape(total(p), (f, k, 1)))
            free = mk.const(np.full((f,), v + 2))
            index = t.Where(mk.reshape(self._mask(n, folds), (f,)), index, free)
        return t.Lookup(mk.concat(columns, 2), index)

    def _seen(self, n: InputOp, p: Op, folds: list[int]) -> Op:
        f, _, v = tensor(p).shape
        index = self._index(n, folds)
        if self.trusted:
            return t.Lookup(p, index)
        inside = t.Less(index, mk.const(np.full((f,), v)))
        valid = t.And(inside, t.Less(mk.const(np.full((f,), -1)), index))
        safe = t.Where(valid, index, mk.const(np.zeros((f,), np.int64)))
        found = t.Lookup(p, safe)
        zero = mk.full((f, 1), 0.0)
        return t.Where(mk.reshape(valid, (f, 1)), found, zero)

    def _density(self, n: Gaussian, folds: list[int], *, masked: bool) -> Op:
        mu, sigma = mk.take(n.mu, folds), mk.take(n.sigma, folds)
        x = mk.reshape(self._column(n, folds), (len(folds), 1))
        if masked:  # whatever stands at an unobserved position must not reach the arithmetic
            x = t.Where(self._mask(n, folds), x, mk.full((len(folds), 1), 0.0))
        z = t.Div(t.Sub(x, mu), sigma)
        half = mk.full((1, 1), -0.5)
        return t.Exp(t.Sub(t.Mul(half, t.Mul(z, z)), gaussian_norm(sigma)))


def started(carry: Op, n: int) -> Op:
    """[carry, 0, .., 0]: i64[n]."""
    rest = t.Expand(mk.const(np.zeros(n - 1, np.int64)), carry, (n - 1,))
    return mk.concat([mk.reshape(carry, (1,)), rest])


def carried(carry: Op, n: int) -> Evidence:
    """Of n variables the first is known: x_1 = carry."""
    return Evidence(started(carry, n), [True] + [False] * (n - 1))


def gaussian_norm(sigma: Op) -> Op:
    """Return log sigma + log(2 pi)/2, `[F,K]`, the constant in two parts.

    Constants are float32; validation, in float64, would see what one part leaves out.
    """
    whole = 0.5 * float(np.log(2 * np.pi))
    main = float(np.float32(whole))
    return t.Add(t.Add(t.Log(sigma), mk.full((1, 1), main)), mk.full((1, 1), whole - main))


def total(p: Op) -> Op:
    """Return the row totals `[F,K]` of a table: what a variable that is summed out leaves."""
    if mk.normalised(p):
        return mk.full(tensor(p).shape[:2], 1.0)
    return t.ReduceSum(p, 2)
