"""Random circuits, rows and contexts: `circuits()` for hypothesis, `random_circuit(seed)` without.

Every circuit is smooth and decomposable by construction: a layer over the scopes `(S_0, .., S_F-1)`
is an input layer, a product of layers over parts of each scope, a mixture of layers over the same
scopes, or folds gathered from another layer. Sizes are unequal, so that a swapped axis shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pcc.circuit.circuit import Circuit
from pcc.circuit.ops import (
    Categorical,
    Concat,
    Cp,
    Cpt,
    Gather,
    Gaussian,
    Hadamard,
    Kronecker,
    Mix,
    Sum,
    Tucker,
)
from pcc.ir.core import Op, units
from pcc.tensor.ops import Const, Contract, Input, Reshape, Softmax

CONTEXT = 3  # length of the context vector
Scopes = tuple[tuple[int, ...], ...]
Values = np.ndarray[Any, Any]


class _Grower:
    """Grows one circuit; `pick(n)` chooses among n ways, 0 being the plainest."""

    def __init__(self, pick: Callable[[int], int], cards: tuple[int, ...], context: bool) -> None:
        self.pick, self.cards, self.context = pick, cards, context
        self.rng = np.random.default_rng(pick(1 << 16))
        self.budget = 24  # layers; then only plain products and inputs
        self.made: dict[Scopes, list[Op]] = {}
        self.scalar = pick(4) == 3  # a classical node graph: one fold, one unit

    def width(self) -> int:
        return 1 if self.scalar else 1 + self.pick(3)

    def weight(self, *shape: int, summed: int = 1) -> Op:
        """Non-negative weights; those over the last `summed` axes sum to one, or nearly."""
        lead, rest = shape[: len(shape) - summed], math.prod(shape[len(shape) - summed :])
        style = self.pick(4)
        if style == 3 and self.context:
            size = math.prod(shape)
            w = Const(self.rng.normal(size=(CONTEXT, size)).astype(np.float32))
            logits = Contract(Input("context", "f32", "c", (CONTEXT,)), w, "d,dn->n")
            w = Softmax(Reshape(logits, (*lead, rest)))
            return w if summed == 1 else Reshape(w, shape)
        w = self.rng.uniform(0.1, 1.0, (*lead, rest))
        if style == 1 and rest > 1:  # an exact zero
            w[..., int(self.rng.integers(rest))] = 0.0
        if style != 2:
            w /= w.sum(axis=-1, keepdims=True)
        return Const(w.reshape(shape).astype(np.float32))

    def layer(self, scopes: Scopes, k: int) -> Op:
        """A layer of `k` units with one fold for each scope."""
        self.budget -= 1
        old = self.made.get(scopes, [])
        if old and self.pick(3) > 0:  # share
            x = old[self.pick(len(old))]
        else:
            x = self.fresh(scopes, k)
            self.made.setdefault(scopes, []).append(x)
        t = units(x)
        if t.k != k or (self.budget > 0 and self.pick(5) == 4):
            x = Sum(x, self.weight(t.folds, k, t.k))
        return x

    def fresh(self, scopes: Scopes, k: int) -> Op:
        kinds = [self.kind(s) for s in scopes]
        if len(set(kinds)) > 1:
            return self.joined(scopes, kinds, k)
        if kinds[0] != "many":
            return self.inputs(tuple(s[0] for s in scopes), k, kinds[0])
        if self.budget > 0 and self.pick(4) == 3:
            h = 2 + self.pick(2)
            xs = tuple(self.layer(scopes, k) for _ in range(h))
            return Mix(xs, self.weight(len(scopes), k, h))
        return self.product(scopes, k)

    def kind(self, scope: tuple[int, ...]) -> str:
        if len(scope) > 1:
            return "many"
        return "finite" if self.cards[scope[0]] else "continuous"

    def joined(self, scopes: Scopes, kinds: list[str], k: int) -> Op:
        """Build the folds of each kind apart, then put them in order."""
        groups = [[i for i, x in enumerate(kinds) if x == kind] for kind in dict.fromkeys(kinds)]
        parts = tuple(self.layer(tuple(scopes[i] for i in g), k) for g in groups)
        where = [i for g in groups for i in g]
        order = tuple(where.index(i) for i in range(len(scopes)))
        return Gather(Concat(parts), order)

    def inputs(self, variables: tuple[int, ...], k: int, kind: str) -> Op:
        if kind == "continuous":
            shape = (len(variables), k)
            mu = Const(self.rng.normal(size=shape).astype(np.float32))
            return Gaussian(variables, mu, Const(self.rng.uniform(0.5, 2, shape).astype("f4")))
        if self.pick(3) == 2:  # select among the inputs of all finite variables
            every = tuple(v for v, card in enumerate(self.cards) if card)
            folds = tuple(every.index(v) for v in variables)
            return Gather(self.tables(every, k), folds)
        return self.tables(variables, k)

    def tables(self, variables: tuple[int, ...], k: int) -> Op:
        cards = [self.cards[v] for v in variables]
        if len(set(cards)) == 1:
            return Categorical(variables, self.weight(len(variables), k, cards[0]))
        p = self.rng.uniform(0.1, 1.0, (len(variables), k, max(cards)))
        for row, card in zip(p, cards, strict=True):
            row[:, card:] = 0.0
        return Categorical(variables, Const((p / p.sum(-1, keepdims=True)).astype(np.float32)))

    def product(self, scopes: Scopes, k: int) -> Op:
        three = min(map(len, scopes)) >= 3 and self.pick(3) == 2
        parts = [self.split(s, 3 if three else 2) for s in scopes]
        sides: list[Scopes] = [tuple(side) for side in zip(*parts, strict=True)]
        how = self.pick(3) if three else self.pick(5)
        f = len(scopes)
        if how == 0:
            return Hadamard(self.operands(sides, [k] * len(sides)))
        if how == 1:
            inner = self.width()
            xs = self.operands(sides, [inner] * len(sides))
            return Cpt(xs, self.weight(f, k, inner))
        ks = [self.width() for _ in sides]
        xs = self.operands(sides, ks)
        if how == 2:
            return Cp(xs, tuple(self.weight(f, k, i) for i in ks))
        if how == 3:
            return Tucker(*xs, self.weight(f, k, *ks, summed=2))
        return Kronecker(*xs)

    def split(self, scope: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
        """Cut a scope into non-empty parts, in a random order of its variables."""
        order = list(scope)
        if self.pick(2):
            self.rng.shuffle(order)
        cuts, left = [], order
        for rest in range(parts - 1, 0, -1):
            size = 1 + self.pick(len(left) - rest)
            cuts.append(tuple(sorted(left[:size])))
            left = left[size:]
        return [*cuts, tuple(sorted(left))]

    def operands(self, sides: list[Scopes], ks: list[int]) -> tuple[Op, ...]:
        """One layer for each side, or (folded) all of them from one layer with more folds."""
        if not self.scalar and len(set(ks)) == 1 and self.pick(2):
            f = len(sides[0])
            x = self.layer(tuple(s for side in sides for s in side), ks[0])
            return tuple(Gather(x, tuple(range(i * f, i * f + f))) for i in range(len(sides)))
        return tuple(self.layer(side, k) for side, k in zip(sides, ks, strict=True))


def _circuit(pick: Callable[[int], int], max_vars: int, context: bool, continuous: bool) -> Circuit:
    choices = (2, 3, 4, 0) if continuous else (2, 3, 4)
    n = 1 + pick(max_vars)
    cards = tuple(choices[pick(len(choices))] for _ in range(n))
    root = _Grower(pick, cards, context).layer((tuple(range(n)),), 1)
    return Circuit(root, cards)


def circuits(
    *, max_vars: int = 5, context: bool = True, continuous: bool = False
) -> st.SearchStrategy[Circuit]:
    """Circuits of up to `max_vars` variables with 2 to 4 values (or 0: continuous).

    With `context`, some parameters are softmaxes of the input `context`, f32 `[Bc, CONTEXT]`.
    """

    @st.composite
    def drawn(draw: st.DrawFn) -> Circuit:
        def pick(n: int) -> int:
            return draw(st.integers(0, n - 1)) if n > 1 else 0

        return _circuit(pick, max_vars, context, continuous)

    return drawn()


def random_circuit(
    seed: int, *, max_vars: int = 5, context: bool = True, continuous: bool = False
) -> Circuit:
    """The circuit of a seed, for loops and benchmarks without hypothesis."""
    rng = np.random.default_rng(seed)
    return _circuit(lambda n: int(rng.integers(n)), max_vars, context, continuous)


def contexts(c: Circuit, rows: int, seed: int = 0) -> dict[str, Values]:
    """Return values for the inputs that the parameters of `c` depend on, maybe none."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(size=(rows, *n.shape)).astype(np.float32) for key, n in c.inputs().items()
    }


def evidence(c: Circuit, rows: int, seed: int = 0) -> tuple[Values, Values]:
    """Return `x [rows, n]` (i64, or f32 if a variable is continuous) and a mask `observed`."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, k, rows) if k else rng.normal(size=rows) for k in c.cards]
    x = np.stack(columns, axis=1)
    return x.astype(np.int64 if all(c.cards) else np.float32), rng.random(x.shape) < 0.5
