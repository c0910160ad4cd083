"""Building circuits by hand: each call returns an IR value over some variables.

Parameters are arrays, or softmaxes of expressions over a context (a verifier's hidden state).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends.expressions import Expressions, law
from pcc.ir.array import Array
from pcc.ir.core import Op, Values, tensor, units
from pcc.knobs import MAX_TRIALS
from pcc.tensor import ops as t


class Builder(Expressions):
    """Makes the layers of one circuit over variables with cardinalities `cards` (0: continuous).

    >>> b = Builder(cards=[2, 2])
    >>> x, y = b.bernoulli(0, [0.2, 0.7]), b.bernoulli(1, [0.5, 0.1])   # two units each
    >>> circuit = b.circuit(b.sum(b.product(x, y), [[0.4, 0.6]]))

    With `context=D` the circuit is a head: `context()` is the features f32[D], `linear`, `add`,
    `relu`, `silu`, `gelu` compute on them, and `softmax` makes tables and weights.

    >>> b = Builder(cards=[256, 256], context=64)
    >>> h = b.silu(b.linear(b.context(), up))  # up [H, 64]
    >>> x, y = (b.categorical(i, b.softmax(b.linear(h, out[i]))) for i in (0, 1))  # out [2,K,256,H]
    >>> head = b.circuit(b.sum(b.product(x, y), b.softmax(b.linear(h, mix))))  # mix [K, H]
    """

    def __init__(self, cards: Sequence[int], *, context: int = 0) -> None:
        self.cards = tuple(int(v) for v in cards)
        super().__init__(context)
        if any(v < 0 or v == 1 for v in self.cards):
            raise PccError("B101", f"cardinalities are 0 or at least 2, not {list(self.cards)}")

    def categorical(self, var: int, probs: Any) -> Op:
        """y[k] = probs[k, x_var]; `probs` is `[K, V]`, or `[V]` for one unit."""
        card = self._card(var, finite=True)
        p = self._parameter("probs", probs)
        if (shape := tensor(p).shape)[2] != card:
            what = f"probs has shape {shape[1:]}, variable {var} has {card} values"
            raise PccError("B102", what)
        return c.Categorical((var,), p)

    def bernoulli(self, var: int, p: Any) -> Op:
        """P(x_var = 1) = p[k]."""
        q = self._chances(p)
        return self.categorical(var, np.stack([1 - q, q], axis=-1))

    def binomial(self, var: int, trials: int, p: Any) -> Op:
        """P(x_var = v) = C(trials, v) p^v (1-p)^(trials-v), as a table of trials + 1 values."""
        q = self._chances(p)
        if not 1 <= trials <= MAX_TRIALS:
            raise PccError("B103", f"{trials} trials: there are between 1 and {MAX_TRIALS}")
        v = np.arange(trials + 1)
        count = np.array([math.comb(trials, int(k)) for k in v], float)
        return self.categorical(var, count * q[:, None] ** v * (1 - q[:, None]) ** (trials - v))

    def gaussian(self, var: int, mu: Any, sigma: Any) -> Op:
        """N(x_var; mu[k], sigma[k])."""
        self._card(var, finite=False)
        means, deviations = (np.atleast_1d(_numbers(*x)) for x in (("mu", mu), ("sigma", sigma)))
        try:
            m, s = np.broadcast_arrays(means, deviations)
        except ValueError:
            what = f"mu has shape {means.shape}, sigma {deviations.shape}"
            raise PccError("B102", what, hint="give one of each per unit") from None
        if m.ndim != 1:
            raise PccError("B102", f"mu and sigma have shape {m.shape}, expected one axis")
        if not np.isfinite(m).all() or not (np.isfinite(s).all() and (s > 0).all()):
            raise PccError("B103", "mu must be finite, sigma positive")
        return c.Gaussian((var,), self._const(m[None]), self._const(s[None]))

    def product(self, *xs: Op) -> Op:
        """Unit-wise product of functions of disjoint variables."""
        if not xs:
            raise PccError("B102", "a product needs operands")
        return c.Hadamard(xs) if len(xs) > 1 else xs[0]

    def kronecker(self, a: Op, b: Op) -> Op:
        """All pairwise products of units."""
        return c.Kronecker(a, b)

    def sum(self, x: Op | Sequence[Op], weights: Any) -> Op:
        """Weighted sum: one layer with weights `[Ko, Ki]`, or several with `[H]` or `[K, H]`."""
        if isinstance(x, Op):
            w = self._parameter("weights", weights)
            if (shape := tensor(w).shape)[2] != units(x).k:
                raise PccError("B102", f"weights have shape {shape[1:]} for {units(x).k} units")
            return c.Sum(x, w)
        if not isinstance(x, Sequence) or not x or not all(isinstance(v, Op) for v in x):
            raise PccError("B102", "a sum needs a layer, or a list of one or more layers")
        xs, k = tuple(x), units(x[0]).k
        if not isinstance(weights, Op) and np.ndim(w1 := self._weights("weights", weights)) == 1:
            weights = np.tile(w1, (k, 1))
        w = self._parameter("weights", weights)
        if (shape := tensor(w).shape[1:]) != (k, len(xs)):
            raise PccError("B102", f"weights have shape {shape} for {len(xs)} operands")
        return c.Mix(xs, w)

    def circuit(self, root: Op, name: str = "circuit") -> Circuit:
        """Return the finished circuit; its root has one unit over every variable."""
        return Circuit(root, self.cards, name)

    def _chances(self, p: Any) -> Values:
        """Return one probability per unit."""
        q = np.atleast_1d(self._weights("p", p))
        if q.ndim != 1 or (q > 1).any():
            what = "a probability is above 1" if q.ndim == 1 else f"p has shape {q.shape}"
            raise PccError("B103", what, hint="give one probability between 0 and 1 per unit")
        return q

    def _card(self, var: int, *, finite: bool) -> int:
        if not 0 <= var < len(self.cards):
            raise PccError("B104", f"there is no variable {var}, only 0..{len(self.cards) - 1}")
        card = self.cards[var]
        if finite != (card > 0):
            raise PccError("B104", f"variable {var} is {'finite' if card else 'continuous'}")
        return card

    def _weights(self, name: str, value: Any) -> Values:
        w = _numbers(name, value)
        if not np.isfinite(w).all() or (w < 0).any():
            raise PccError("B103", f"'{name}' holds a negative number, NaN or infinity")
        return w

    def _parameter(self, name: str, value: Any) -> Op:
        """Return laws over the context, or an array, as `[1, K, V]`."""
        if isinstance(value, Op):
            return law(name, value)
        w = self._weights(name, value)
        w = w[None] if w.ndim == 1 else w
        if w.ndim != 2:
            raise PccError("B102", f"{name} has shape {w.shape}, expected one axis or two")
        return self._const(w[None])

    def _const(self, value: Values) -> Op:
        with np.errstate(over="ignore"):
            single = np.asarray(value, np.float32)
        if not np.isfinite(single).all():
            raise PccError("B103", "a number does not fit into 32 bits")
        return t.Const(Array.of(single))


def _numbers(name: str, value: Any) -> Values:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise PccError("B102", f"'{name}' is not an array of numbers") from None
