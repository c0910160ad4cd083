"""Circuit templates: fully factorised, CP (mixture), HMM, trees; trained or contextual.

Trained: tables and weights are probabilities. Contextual: they are softmaxes of linear functions of
an input `context [Bc, D]` (the published MTPC head, arXiv 2511.11346 §3.3), and the logits can be
supplied instead (`Circuit.with_logits`). Layers are "cp-t": a product, then a dense sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, Values, units
from pcc.tensor import ops as t

Nested: TypeAlias = Any  # int | tuple[Nested, ...]
Weights: TypeAlias = Mapping[str, Any]


class Parameters:
    """Makes tables and weights `[F,K,V]`, `[F,Ko,Ki]` in the published order of sum layers."""

    def __init__(self, context: int, seed: int, weights: Weights | None) -> None:
        self.context, self.rng = context, np.random.default_rng(seed)
        self.given = weights
        self.sums = list(weights["sums"]) if weights else []
        self.logits: list[tuple[str, Op, Op]] = []
        self.count = 0

    def table(self, variables: Sequence[int], k: int, v: int, n: int) -> Op:
        """Return the emission tables, one fold per entry of `variables`."""
        shape = (len(variables), k, v)
        value = None if self.given is None else np.asarray(self.given["emissions"])
        token = t.Input("emission_logits", "f32", "b", shape)
        order = tuple(variables)
        swap: Op = token
        if sorted(order) == list(range(n)) and order != tuple(range(n)):
            swap = t.Take(token, 0, order)
        return self._make(shape, value, "emission_logits", swap)

    def sum(self, folds: int, ko: int, ki: int) -> Op:
        """Return the weight of the next sum layer."""
        shape, name = (folds, ko, ki), f"sum_logits.{self.count}"
        value = np.asarray(self.sums[self.count]) if self.given is not None else None
        self.count += 1
        return self._make(shape, value, name, t.Input(name, "f32", "b", shape))

    def _make(self, shape: tuple[int, ...], value: Values | None, name: str, swap: Op) -> Op:
        full = (*shape, self.context) if self.context else shape
        if value is not None and value.shape != full:
            raise PccError("T101", f"'{name}' has shape {value.shape}, expected {full}")
        if not self.context:
            if value is None:
                value = self.rng.dirichlet(np.ones(shape[-1]), shape[:-1])
            return t.Const(Array.of(value.astype(np.float32)))
        if value is None:
            value = self.rng.normal(size=full) / np.sqrt(self.context)
        x = t.Input("context", "f32", "c", (self.context,))
        logits = t.Contract(x, t.Const(Array.of(value.astype(np.float32))), "d,abcd->abc")
        self.logits.append((name, logits, swap))
        return t.Softmax(logits)


def _check(n: int, r: int, vocab: int) -> None:
    if n < 1 or r < 1 or vocab < 2:
        raise PccError("T100", f"n={n}, r={r}, vocab={vocab}: n, r >= 1 and vocab >= 2")


def _circuit(root: Op, n: int, r: int, vocab: int, kind: str, p: Parameters) -> Circuit:
    return Circuit(root, (vocab,) * n, f"{kind}-n{n}-r{r}", kind, r, tuple(p.logits))


def _single(layer: Op) -> tuple[Op, ...]:
    return tuple(c.Gather(layer, (f,)) for f in range(units(layer).folds))


def ff(
    n: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = prod_i phi_i(x_i)."""
    _check(n, 1, vocab)
    p = Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(range(n), 1, vocab, n))
    root = c.Hadamard(_single(leaf)) if n > 1 else leaf
    return _circuit(root, n, 1, vocab, "ff", p)


def cp(
    n: int, r: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = sum_z w_z prod_i phi_{i,z}(x_i)."""
    _check(n, r, vocab)
    p = Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(range(n), r, vocab, n))
    joint = c.Hadamard(_single(leaf)) if n > 1 else leaf
    return _circuit(c.Sum(joint, p.sum(1, 1, r)), n, r, vocab, "cp", p)


def hmm(
    n: int, r: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = sum_z pi(z_1) phi_1(x_1|z_1) prod_i A_i(z_i|z_{i-1}) phi_i(x_i|z_i).

    Sum layer k = 0 is the last transition, k = n - 1 the initial distribution, as published.
    """
    _check(n, r, vocab)
    p = Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(range(n), r, vocab, n))
    state: Op = c.Gather(leaf, (n - 1,)) if n > 1 else leaf
    for i in range(n - 2, -1, -1):
        state = c.Hadamard((c.Gather(leaf, (i,)), c.Sum(state, p.sum(1, r, r))))
    return _circuit(c.Sum(state, p.sum(1, 1, r)), n, r, vocab, "hmm", p)


def btree(
    n: int, r: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """Recursive halving: m_v[k] = sum_z W_v[k,z] m_L[z] m_R[z]; the root has one unit.

    For n a power of two each level is one folded layer, sum layers bottom-up; otherwise `tree`.
    """
    _check(n, r, vocab)
    if n & (n - 1) or n < 2:
        from pcc.frontends.regions import balanced

        return tree(balanced(n), r, vocab, context=context, seed=seed, weights=weights)
    p = Parameters(context, seed, weights)
    level: Op = c.Categorical(tuple(range(n)), p.table(range(n), r, vocab, n))
    folds = n
    while folds > 1:
        left, right = tuple(range(0, folds, 2)), tuple(range(1, folds, 2))
        folds //= 2
        pairs = c.Hadamard((c.Gather(level, left), c.Gather(level, right)))
        level = c.Sum(pairs, p.sum(folds, r if folds > 1 else 1, r))
    return _circuit(level, n, r, vocab, "btree", p)


def tree(
    nested: Nested,
    r: int,
    vocab: int,
    *,
    context: int = 0,
    seed: int = 0,
    weights: Weights | None = None,
) -> Circuit:
    """Region-graph tree given as nested tuples of variables, e.g. `((0, 1), (2, 3))`."""
    order: list[int] = []
    _leaves(nested, order)
    n = len(order)
    _check(n, r, vocab)
    if sorted(order) != list(range(n)):
        raise PccError("T102", f"the tree's leaves are {order}, expected 0..{n - 1} once each")
    p = Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(range(n), r, vocab, n))

    def region(x: Nested, top: bool) -> Op:
        if isinstance(x, int):
            return c.Gather(leaf, (x,))
        product = c.Hadamard(tuple(region(y, False) for y in x))
        return c.Sum(product, p.sum(1, 1 if top else r, r))

    return _circuit(region(nested, True), n, r, vocab, "tree", p)


def _leaves(x: Nested, out: list[int], depth: int = 0) -> None:
    if depth > 200:
        raise PccError("T102", "the tree is nested deeper than 200 levels")
    if isinstance(x, int) and not isinstance(x, bool):
        out.append(x)
    elif isinstance(x, tuple) and len(x) > 1:
        for y in x:
            _leaves(y, out, depth + 1)
    else:
        raise PccError("T102", f"a region is a variable or a tuple of two or more, not {x!r}")
