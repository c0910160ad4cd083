"""Upward and downward messages of a circuit, as linear tensor expressions.

up(v)   = the units of v given the evidence below it;
down(v) = d p / d v, the derivative of the root with respect to v's units (Darwiche 2003).
For a variable i with input units u_f: p(X_i = v, evidence elsewhere) = sum_k down(u)[f,k] p[f,k,v].

For prefixes, the evidence of down(v) is x_<i with i the first variable of v's scope. Where every
product splits its scope into consecutive intervals (mixture, HMM, trees over spans), the operands
left of v are then fully observed and those right of it are summed out, so that one upward and one
downward pass give all n prefix conditionals: `Ordered`. Otherwise `NotOrdered` is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, rewrite, tensor, units
from pcc.ir.types import mask_of
from pcc.passes import pieces as mk
from pcc.passes.evidence import Evidence, gaussian_norm, total
from pcc.tensor import ops as t


class NotOrderedError(Exception):
    """A product's operands are not consecutive intervals of variables."""


def expand_fused(root: Op) -> Op:
    """Replace fused layers by their definitions."""
    (out,) = rewrite((root,), lambda n, _: c.expand(n) if c.expand(n) is not n else None)
    return out


class Up:
    """Upward messages in the linear semiring, `[F,K]`."""

    def __init__(self, evidence: Evidence, free: Free | None = None) -> None:
        self.evidence = evidence
        self.free = free or Free()
        self.seen = mask_of([i for i, k in enumerate(evidence.known) if k is not False])
        self.value: dict[Op, Op] = {}

    def __call__(self, root: Op) -> Op:
        """Return the units of `root`."""
        for n in postorder(root):
            if isinstance(n, c.CircuitOp) and n not in self.value:
                # Nothing observed below: the totals, which are ones for normalised circuits.
                value = self.free.known(n) if self.unseen(n) else self.step(n)
                self.value[n] = mk.place(value, mk.layer_name(n))
        return self.value[root]

    def unseen(self, n: Op) -> bool:
        """Whether no variable below `n` can be observed."""
        return len(self.idle(n)) == units(n).folds

    def idle(self, n: Op) -> list[int]:
        """Return the folds of `n` below which nothing can be observed: their units are totals."""
        return [f for f, s in enumerate(units(n).scopes) if not s & self.seen]

    def step(self, n: Op) -> Op:
        """Return a node's units from those of its operands."""
        v = self.value
        match n:
            case c.InputOp():
                return self.leaf(n)
            case c.Sum():
                return self.sum(n)
            case c.Mix(xs=xs, w=w):
                f, k = units(n).folds, units(n).k
                stacked = mk.concat([mk.reshape(v[x], (f, k, 1)) for x in xs], 2)
                return self.contract(stacked, w, "fkh,fkh->fk")
            case c.Hadamard(xs=xs):
                return self.hadamard(xs)
            case c.Kronecker(a=a, b=b):
                return self.outer(v[a], v[b])
            case c.Gather(x=x, folds=folds):
                return mk.take(v[x], folds)
            case c.Concat(xs=xs):
                return mk.concat([v[x] for x in xs])
            case c.Cpt(xs=xs, w=w):
                return self.contract(self.hadamard(xs), w, "fi,foi->fo")
            case c.Cp(xs=xs, ws=ws):
                parts = zip(xs, ws, strict=True)
                return self.times([self.contract(v[x], w, "fi,foi->fo") for x, w in parts])
            case c.Tucker(a=a, b=b, w=w):
                return self.tucker(v[a], v[b], w)
            case _:
                raise PccError("E404", f"'{n.name}' has no tensor form", at=n.loc)

    def leaf(self, n: c.InputOp) -> Op:
        """Return input units."""
        return self.evidence.leaf(n)

    def sum(self, n: c.Sum) -> Op:
        """Weighted sums; none for folds whose units are known without (of a tree, all but one)."""
        folds, idle = units(n).folds, self.idle(n)
        if len(idle) in (0, folds):
            return self.contract(self.value[n.x], n.w, "fi,foi->fo")
        busy = sorted(set(range(folds)) - set(idle))
        x, w = mk.take(self.value[n.x], busy), mk.take(n.w, busy)
        made = self.contract(x, w, "fi,foi->fo")
        return mk.assemble(folds, [(busy, made), (idle, mk.take(self.free.known(n), idle))])

    def contract(self, x: Op, w: Op, eq: str) -> Op:
        """Weighted sum."""
        return t.Contract(x, w, eq)

    def times(self, xs: list[Op]) -> Op:
        """Unit-wise product."""
        out = xs[0]
        for x in xs[1:]:
            out = t.Mul(out, x)
        return out

    def hadamard(self, xs: tuple[Op, ...]) -> Op:
        """Unit-wise product of layers; folds of one layer are multiplied by one reduction."""
        source = single_folds(xs)
        if source is None:
            return self.times([self.value[x] for x in xs])
        layer, folds = source
        rows = mk.take(self.value[layer], folds)
        return mk.reshape(self.reduce(rows), (1, units(layer).k))

    def reduce(self, rows: Op) -> Op:
        """Product over the first axis."""
        return t.ReduceProd(rows, 0)

    def outer(self, a: Op, b: Op) -> Op:
        """All pairwise products."""
        (f, i), (_, j) = tensor(a).shape, tensor(b).shape
        pairs = self.times([mk.reshape(a, (f, i, 1)), mk.reshape(b, (f, 1, j))])
        return mk.reshape(pairs, (f, i * j))

    def tucker(self, a: Op, b: Op, w: Op) -> Op:
        """sum_ij w a_i b_j; `contraction-order` chooses how."""
        f, o, i, j = tensor(w).shape
        flat = t.Reshape(w, (f, o, i * j))
        return self.contract(self.outer(a, b), flat, "fi,foi->fo")


class MaxUp(Up):
    """Upward messages in max-product, in logs: the largest term instead of each sum."""

    def idle(self, n: Op) -> list[int]:
        return []

    def leaf(self, n: c.InputOp) -> Op:
        ev = self.evidence
        if isinstance(n, c.Gaussian):
            best: Op = t.Sub(mk.full((1, 1), 0.0), gaussian_norm(n.sigma))
        else:
            assert isinstance(n, c.Categorical)
            best = t.ReduceMax(t.Log(n.p), 2)
        if all(ev.known[v] is True for v in n.vars):
            return t.Log(ev.leaf(n))
        f = len(n.vars)
        assert ev.mask is not None
        mask = mk.reshape(mk.take(ev.mask, n.vars), (f, 1))
        return t.Where(mask, t.Log(ev.leaf(n)), best)

    def contract(self, x: Op, w: Op, eq: str) -> Op:
        return t.MaxContract(x, t.Log(w), eq)

    def times(self, xs: list[Op]) -> Op:
        out = xs[0]
        for x in xs[1:]:
            out = t.Add(out, x)
        return out

    def reduce(self, rows: Op) -> Op:
        return t.ReduceSum(rows, 0)


def single_folds(xs: tuple[Op, ...]) -> tuple[Op, list[int]] | None:
    """Return (layer, folds) if the operands are single folds of one layer and there are several."""
    if len(xs) < 3 or not all(isinstance(x, c.Gather) and len(x.folds) == 1 for x in xs):
        return None
    gathers = [x for x in xs if isinstance(x, c.Gather)]
    if any(g.x is not gathers[0].x for g in gathers):
        return None
    return gathers[0].x, [g.folds[0] for g in gathers]


class Free:
    """Units with every variable summed out; None where they are one by construction."""

    def __init__(self) -> None:
        self.value: dict[Op, Op | None] = {}

    def __call__(self, root: Op) -> Op | None:
        """Return the totals `[F,K]` of `root`, or None for ones."""
        for n in postorder(root):
            if isinstance(n, c.CircuitOp) and n not in self.value:
                self.value[n] = self.step(n)
        return self.value[root]

    def known(self, n: Op) -> Op:
        """Return the totals of `n`, ones written out."""
        z = self(n)
        return mk.full((units(n).folds, units(n).k), 1.0) if z is None else z

    def step(self, n: Op) -> Op | None:
        """Return a node's totals from those of its operands."""
        v = self.value
        if all(v[a] is None for a in n.args if isinstance(a, c.CircuitOp)):
            if isinstance(n, c.Sum | c.Mix) and mk.normalised(n.w):
                return None
            if isinstance(n, c.Hadamard | c.Kronecker | c.Gather | c.Concat):
                return None
        if isinstance(n, c.Categorical):
            return None if mk.normalised(n.p) else total(n.p)
        if isinstance(n, c.Gaussian):
            return None
        up = Up(Evidence(None, ()), self)
        up.value = _Totals(self)
        return up.step(n)


class _Totals(dict[Op, Op]):
    """Totals by node, ones written out when asked for."""

    def __init__(self, free: Free) -> None:
        self.free = free

    def __missing__(self, n: Op) -> Op:
        return self.free.known(n)


class Down:
    """Downward messages; `prefix` conditions each on the variables before it."""

    def __init__(self, root: Op, up: Up, *, prefix: bool, only: set[Op] | None = None) -> None:
        self.root, self.prefix, self.only = root, prefix, only
        self.up, self.free = up, up.free
        self.parts: dict[Op, list[mk.Piece]] = {root: [([0], mk.full((1, 1), 1.0))]}
        self.value: dict[Op, Op] = {}
        up(root)
        order = [n for n in postorder(root) if isinstance(n, c.CircuitOp)]
        for n in reversed(order):
            if n not in self.parts:
                continue  # not above a variable that was asked for
            self.value[n] = mk.assemble(units(n).folds, self.parts[n])
            self.layer = mk.layer_name(n)
            self._push(n, self.value[n])

    def _give(self, x: Op, folds: object, d: Op) -> None:
        if self.only is not None and x not in self.only:
            return
        rows = list(folds) if folds is not None else list(range(units(x).folds))  # type: ignore[call-overload]
        self.parts.setdefault(x, []).append((rows, mk.place(d, self.layer)))

    def _push(self, n: Op, d: Op) -> None:
        match n:
            case c.InputOp():
                pass
            case c.Sum(x=x, w=w):
                self._give(x, None, t.Contract(d, w, "fo,foi->fi"))
            case c.Mix(xs=xs, w=w):
                f, k = units(n).folds, units(n).k
                for h, x in enumerate(xs):
                    weight = mk.reshape(mk.take(w, [h], 2), (f, k))
                    self._give(x, None, t.Mul(d, weight))
            case c.Hadamard(xs=xs):
                self._hadamard(xs, d)
            case c.Kronecker(a=a, b=b):
                self._kronecker(a, b, d)
            case c.Gather(x=x, folds=folds):
                # A fold may be read several times: one piece per occurrence.
                seen: dict[int, int] = {}
                levels: list[list[int]] = []
                for j, f in enumerate(folds):
                    level = seen[f] = seen.get(f, -1) + 1
                    while len(levels) <= level:
                        levels.append([])
                    levels[level].append(j)
                for js in levels:
                    self._give(x, [folds[j] for j in js], mk.take(d, js))
            case c.Concat(xs=xs):
                start = 0
                for x in xs:
                    stop = start + units(x).folds
                    self._give(x, None, mk.take(d, range(start, stop)))
                    start = stop
            case _:
                raise PccError("E404", f"'{n.name}' has no downward pass", at=n.loc)

    def _order(self, xs: tuple[Op, ...]) -> list[int]:
        """Return the operands' left-to-right order; the same in every fold."""
        if not self.prefix:
            return list(range(len(xs)))
        orders = set()
        for f in range(units(xs[0]).folds):
            spans = []
            for a, x in enumerate(xs):
                s = units(x).scopes[f]
                spans.append(((s & -s).bit_length(), s.bit_length(), a))
            spans.sort()
            if any(p[1] >= q[0] for p, q in pairwise(spans)):
                raise NotOrderedError
            orders.add(tuple(a for _, _, a in spans))
        if len(orders) > 1:
            raise NotOrderedError
        return list(orders.pop())

    def _right(self, x: Op) -> Op | None:
        # What is summed out and normalised contributes a factor of one.
        return self.free(x) if self.prefix or self.up.unseen(x) else self.up(x)

    def _hadamard(self, xs: tuple[Op, ...], d: Op) -> None:
        order = self._order(xs)
        if (source := single_folds(xs)) is not None and self._chain(source, order, d):
            return
        right: list[Op | None] = [None] * len(order)
        for at in range(len(order) - 2, -1, -1):
            right[at] = mk.product([self._right(xs[order[at + 1]]), right[at + 1]])
        left: Op | None = None
        for at, a in enumerate(order):
            side = mk.product([d, left, right[at]])
            assert side is not None
            self._give(xs[a], None, side)
            left = mk.product([left, self.up(xs[a])])

    def _chain(self, source: tuple[Op, list[int]], order: list[int], d: Op) -> bool:
        """Folds of one layer: exclusive running products along the fold axis."""
        layer, folds = source
        rows = [folds[a] for a in order]
        left = t.CumProd(mk.take(self.up(layer), rows), 0)
        side: Op = t.Mul(left, d)
        z = self.free(layer)
        if not (self.prefix and z is None):
            back = list(range(len(rows)))[::-1]
            other = self.up(layer) if not self.prefix else self.free.known(layer)
            right = t.CumProd(mk.take(other, rows[::-1]), 0)
            side = t.Mul(side, mk.take(right, back))
        self._give(layer, rows, side)
        return True

    def _kronecker(self, a: Op, b: Op, d: Op) -> None:
        f, i, j = units(a).folds, units(a).k, units(b).k
        grid = mk.reshape(d, (f, i, j))
        flipped = self._order((a, b)) == [1, 0]
        for x, y, axis in ((a, b, 2), (b, a, 1)):
            before = (y is a) != flipped
            other = self.up(y) if before else self._right(y)
            if other is not None:
                shape = (f, 1, j) if axis == 2 else (f, i, 1)
                side: Op = t.Mul(grid, mk.reshape(other, shape))
            else:
                side = grid
            self._give(x, None, t.ReduceSum(side, axis))


def rows(root: Op, down: Down, entry: Callable[[c.InputOp, Op], Op], width: int) -> Op:
    """Return `[n, width]`: per variable, `entry(layer, down message)` summed over its folds."""
    n = units(root).scopes[0].bit_count()
    parts: list[mk.Piece] = []
    for node in postorder(root):
        if isinstance(node, c.InputOp) and node in down.value:
            value = mk.place(entry(node, down.value[node]), mk.layer_name(node))
            short = width - tensor(value).shape[1]
            if short:
                value = mk.concat([value, mk.full((len(node.vars), short), 0.0)], 1)
            parts.append((node.vars, value))
    return mk.assemble(n, parts)
