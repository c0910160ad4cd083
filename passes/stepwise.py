"""The stepwise draft: d_i = argmax_v q(v | carry, d_<i), one position after the other.

Row i of all-prefix conditionals depends on d_1..d_(i-1) only, so that the graph is built once, over
placeholders, with F = 1 in every layer, and each placeholder is then replaced by the choice at its
position: messages that two positions need are one node.

Where every unit has one reader and parameters are normalised, a message may be divided by any
number. A choice has at least the mean probability, q(d_i | d_<i) >= 1/V, so that a normalised
message stays above V^-s within a scope of s variables: such messages are linear, with no logarithm
after the one that makes them. The carry can have any probability; what it touches is in logs.
"""

from __future__ import annotations

import math

import numpy as np

from pcc.circuit import ops as c
from pcc.ir.core import Op, postorder, tensor, units, use_counts
from pcc.passes import pieces as mk
from pcc.passes.evidence import Evidence
from pcc.passes.messages import Down, Free, Up
from pcc.passes.unfold import paths
from pcc.tensor import ops as t

DECADES = 20  # a linear message may lose this many; float32 has 38 below one


class Prefix:
    """The evidence of all positions: the carry if it is possible, placeholders for the drafts."""

    def __init__(self, flat: Op, carry: Op, possible: Op) -> None:
        self.n = units(flat).scopes[0].bit_count()
        flag = mk.reshape(possible, (1,))
        first = t.Where(flag, mk.reshape(carry, (1,)), mk.const(np.zeros(1, np.int64)))
        self.drafts = [t.Input(f"draft.{i}", "i64", "b", (1,)) for i in range(1, self.n)]
        self.x = mk.concat([first, *self.drafts])
        self.mask = mk.concat([flag, mk.const(np.ones(self.n - 1, bool))])

    def before(self, i: int) -> Evidence:
        """Return the evidence of the variables before `i`."""
        known = [None] + [j < i for j in range(1, self.n)]
        return Evidence(self.x, known, self.mask, trusted=True)


def inside(flat: Op, carry: Op) -> Op | None:
    """Return whether a carry is possible, if that only takes to be a value: `positive`."""
    tables = [n.p for n in postorder(flat) if isinstance(n, c.Categorical) and n.vars == (0,)]
    sizes = {tensor(p).shape[2] for p in tables}
    if not positive(flat) or len(sizes) > 1:
        return None
    size = mk.const(np.int64(sizes.pop()))
    return t.And(t.Less(carry, size), t.Less(mk.const(np.int64(-1)), carry))


class Flat(Down):
    """Downward messages where F = 1; below one unit, weights are no contraction."""

    def _push(self, n: Op, d: Op) -> None:
        if isinstance(n, c.Sum) and units(n).k == 1:
            # In logarithms too: a contraction would take the weights as they are, and some as zero.
            row = mk.reshape(n.w, (1, units(n.x).k))
            self._give(n.x, None, row if n is self.root else t.Mul(d, row))
        else:
            super()._push(n, d)


class Filter(Flat):
    """Downward messages of a tree, normalised as soon as they may be linear from there on."""

    def __init__(self, root: Op, up: Up, card: int) -> None:
        self.limit = max(1, int(DECADES / math.log10(max(card, 2))))
        self.linear: dict[Op, bool] = {root: False}
        super().__init__(root, up, prefix=True)

    def _push(self, n: Op, d: Op) -> None:
        self.giver = n
        super()._push(n, d)

    def _small(self, scope: int) -> bool:
        return not scope & 1 and scope.bit_count() <= self.limit

    def _give(self, x: Op, folds: object, d: Op) -> None:
        self.linear[x] = self.linear[self.giver] or self._small(units(x).scopes[0])
        if self.linear[x] and not self.linear[self.giver]:
            d = t.Softmax(t.Log(d))
        super()._give(x, folds, d)

    def _hadamard(self, xs: tuple[Op, ...], d: Op) -> None:
        order = [xs[a] for a in self._order(xs)]
        rest = units(self.giver).scopes[0]
        for x in order:
            if not self.linear[self.giver] and self._small(rest):
                d, self.linear[self.giver] = t.Softmax(t.Log(d)), True
            self._give(x, None, d)
            rest &= ~units(x).scopes[0]
            if x is not order[-1]:
                d = t.Mul(d, self.up(x))


def choices(laws: list[Op], prefix: Prefix) -> Op:
    """Return d_2..d_n, `i64[n-1]`, from laws over placeholders."""
    memo: dict[Op, Op] = {}
    out: list[Op] = []
    for i, law in enumerate(laws):
        out.append(t.ArgMax(_replaced(law, memo)))
        memo[prefix.drafts[i]] = out[i]
    return mk.concat(out)


def positive(root: Op) -> bool:
    """Whether parameters are normalised, with every weight positive, by construction."""
    for n in postorder(root):
        if isinstance(n, c.Sum | c.Mix) and not _softmax(n.w):
            return False
        if isinstance(n, c.Categorical) and not mk.normalised(n.p):
            return False
    return True


def _softmax(w: Op) -> bool:
    while isinstance(w, t.Take | t.Reshape | t.Transpose) and mk.normalised(w):
        w = w.x
    return isinstance(w, t.Softmax)


def free_of_scale(flat: Op) -> bool:
    """Whether each message may have a factor of its own: a normalised tree, ordered."""
    nodes = [n for n in postorder(flat) if isinstance(n, c.CircuitOp)]
    counts = use_counts(flat)
    once = sum(isinstance(n, c.Categorical) for n in nodes) == units(flat).scopes[0].bit_count()
    return once and positive(flat) and all(counts[n] == 1 for n in nodes if n is not flat)


def ordered_laws(flat: Op, prefix: Prefix, card: int) -> list[Op]:
    """Return q(x_i | carry, d_<i) up to a factor, `[1,V]`, i >= 2; or raise `NotOrderedError`."""
    up = Up(prefix.before(prefix.n))
    if free_of_scale(flat):
        down: Down = Filter(flat, up, card)
        leaf = {n.vars[0]: n for n in down.value if isinstance(n, c.Categorical)}
        return [_mixed([down.value[leaf[i]]], [leaf[i].p]) for i in range(1, prefix.n)]
    down = Flat(flat, up, prefix=True)
    return [_law(down, i) for i in range(1, prefix.n)]


def cut_laws(flat: Op, prefix: Prefix) -> list[Op]:
    """Return the same where products do not split intervals: the path from each leaf upward."""
    free, laws = Free(), list[Op]()
    for i, above in enumerate(paths(flat, prefix.n)):
        if i:  # the first variable is the carry
            laws.append(_law(Flat(flat, Up(prefix.before(i), free), prefix=False, only=above), i))
    return laws


def _law(down: Down, i: int) -> Op:
    leaves = [n for n in down.value if isinstance(n, c.Categorical) and n.vars == (i,)]
    ds, tables = [down.value[n] for n in leaves], [n.p for n in leaves]
    if not all(map(mk.normalised, tables)):
        return t.Log(_mixed(ds, tables))
    # The largest entry of a mixture of laws is no less than 1/V: shares may be linear.
    shares, at, parts = t.Softmax(t.Log(mk.concat(ds, 1))), 0, list[Op]()
    for d in ds:
        parts.append(mk.take(shares, range(at, at + tensor(d).shape[1]), 1))
        at += tensor(d).shape[1]
    return _mixed(parts, tables)


def _mixed(ds: list[Op], tables: list[Op]) -> Op:
    """sum_k d[k] p[k,v] `[1,V]` over all layers of one variable."""
    width = max(tensor(p).shape[2] for p in tables)
    out: Op | None = None
    for d, p in zip(ds, tables, strict=True):
        row: Op = t.Contract(d, p, "fk,fkv->fv")
        if tensor(p).shape[2] < width:
            row = mk.concat([row, mk.full((1, width - tensor(p).shape[2]), 0.0)], 1)
        out = row if out is None else t.Add(out, row)
    assert out is not None
    return out


def _replaced(root: Op, memo: dict[Op, Op]) -> Op:
    """Return `root` with what `memo` says of nodes below it; `memo` learns of the others."""
    stack = [(root, False)]
    while stack:
        n, ready = stack.pop()
        if n in memo:
            continue
        if ready:
            memo[n] = n.with_args(tuple(memo[a] for a in n.args)) if n.args else n
            memo[n] = mk.place(memo[n], n.loc)
        else:
            stack.append((n, True))
            stack.extend((a, False) for a in n.args if a not in memo)
    return memo[root]
