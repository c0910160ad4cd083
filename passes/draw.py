"""The top-down pass: which unit of each layer is chosen, and the values that follow.

A sum unit o chooses its input i with mass w[o,i] up(x)[i], a product hands its choice to every
operand, an input unit chooses a value. In a decomposable circuit a fold is reached at most once per
row; -1 stands for "not reached".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pcc.circuit import ops as c
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, tensor, units
from pcc.passes import pieces as mk
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Slot:
    """One uniform number: a latent of fold `index` of sum layer `layer`, or the token `index`."""

    role: str
    layer: int
    index: int


def plan_slots(root: Op, tokens: list[int]) -> tuple[list[Slot], dict[Op, list[int]]]:
    """Return the uniforms a draw needs, latents top-down and then tokens, and each layer's."""
    slots: list[Slot] = []
    of: dict[Op, list[int]] = {}
    nodes = [n for n in postorder(root) if isinstance(n, c.Sum | c.Mix) and fan_in(n) > 1]
    for layer, n in enumerate(reversed(nodes)):
        of[n] = list(range(len(slots), len(slots) + units(n).folds))
        slots += [Slot("latent", layer, f) for f in range(units(n).folds)]
    slots += [Slot("token", 0, v) for v in tokens]
    return slots, of


def fan_in(n: c.Sum | c.Mix) -> int:
    """Return how many inputs a sum unit has."""
    return units(n.x).k if isinstance(n, c.Sum) else len(n.xs)


class Draw:
    """The choices of every layer, top-down.

    `pick(node, row, below)` draws an input of the sum `node`: `row [F,Ki]` are the chosen unit's
    weights, `below` the layer (or, for a mixture, the layers) that they lead to.
    """

    def __init__(self, root: Op, pick: Callable[[Op, Op, Op | tuple[Op, ...]], Op]) -> None:
        self.pick = pick
        self.parts: dict[Op, list[mk.Piece]] = {root: [([0], mk.const(np.zeros(1, np.int64)))]}
        self.sure: dict[Op, bool] = {root: True}
        self.choice: dict[Op, Op] = {}
        self.root = root

    def run(self) -> None:
        """Choose top-down."""
        order = [n for n in postorder(self.root) if isinstance(n, c.CircuitOp)]
        for n in reversed(order):
            self.choice[n] = self._merge(n)
            self.layer = mk.layer_name(n)
            self._push(n)

    def _merge(self, n: Op) -> Op:
        folds, parts = units(n).folds, self.parts[n]
        reached = sorted(f for dest, _ in parts for f in dest)
        if reached == list(range(folds)):
            return mk.assemble(folds, parts)
        self.sure[n] = False
        # At most one reader is active: -1s are sums of (choice + 1), less one.
        one = mk.const(np.ones(1, np.int64))
        shifted = [(dest, t.Add(p, one)) for dest, p in parts]
        return t.Sub(mk.assemble(folds, shifted), one)

    def _give(self, x: Op, folds: list[int] | None, sel: Op, *, sure: bool) -> None:
        rows = folds if folds is not None else list(range(units(x).folds))
        self.parts.setdefault(x, []).append((rows, mk.place(sel, self.layer)))
        self.sure[x] = self.sure.get(x, True) and sure

    def safe(self, n: Op) -> Op:
        """Return the choice at `n`, 0 where it is not reached."""
        sel = self.choice[n]
        return sel if self.sure[n] else t.Where(self._off(sel), _zeros(sel), sel)

    def _off(self, sel: Op) -> Op:
        return t.Less(sel, _zeros(sel))

    def _keep(self, n: Op, chosen: Op) -> Op:
        if self.sure[n]:
            return chosen
        sel = self.choice[n]
        return t.Where(self._off(sel), sel, chosen)

    def row(self, n: Op, w: Op) -> Op:
        """Return the rows `[F, *]` of `w [F,Ko,*]` that the choices at `n` select."""
        f, o, i = tensor(w).shape
        return mk.reshape(w, (f, i)) if o == 1 else t.SelectRow(w, self.safe(n))

    def _push(self, n: Op) -> None:
        sel, sure = self.choice[n], self.sure[n]
        match n:
            case c.InputOp():
                pass
            case c.Sum(x=x, w=w):
                if units(x).k == 1:
                    self._give(x, None, self._keep(n, _zeros(sel)), sure=sure)
                else:
                    self._give(x, None, self._keep(n, self.pick(n, self.row(n, w), x)), sure=sure)
            case c.Mix(xs=xs, w=w):
                self._mix(n, xs, w)
            case c.Hadamard(xs=xs):
                for x in xs:
                    self._give(x, None, sel, sure=sure)
            case c.Kronecker(a=a, b=b):
                by = units(b).k
                self._give(a, None, self._keep(n, t.FloorDiv(self.safe(n), by)), sure=sure)
                self._give(b, None, self._keep(n, t.Remainder(self.safe(n), by)), sure=sure)
            case c.Gather(x=x, folds=folds):
                self._gather(x, folds, sel, sure=sure)
            case c.Concat(xs=xs):
                start = 0
                for x in xs:
                    stop = start + units(x).folds
                    self._give(x, None, mk.take(sel, range(start, stop)), sure=sure)
                    start = stop
            case _:
                raise PccError("E404", f"'{n.name}' has no top-down pass", at=n.loc)

    def _gather(self, x: Op, folds: tuple[int, ...], sel: Op, *, sure: bool) -> None:
        first: dict[int, int] = {}
        again: list[int] = []
        for j, f in enumerate(folds):
            if f in first:
                again.append(j)
            else:
                first[f] = j
        self._give(x, list(first), mk.take(sel, list(first.values())), sure=sure)
        for j in again:
            self._give(x, [folds[j]], mk.take(sel, [j]), sure=sure)

    def _mix(self, n: Op, xs: tuple[Op, ...], w: Op) -> None:
        if len(xs) == 1:
            self._give(xs[0], None, self.choice[n], sure=self.sure[n])
            return
        which = self.pick(n, self.row(n, w), xs)
        sel = self.safe(n)
        for h, x in enumerate(xs):
            here = t.Equal(which, mk.const(np.full(1, h)))
            minus = mk.const(np.full(1, -1))
            taken = t.Where(here, sel, minus)
            self._give(x, None, self._keep(n, taken), sure=False)


def _zeros(like: Op) -> Op:
    return mk.const(np.zeros(tensor(like).shape, np.int64))


def values(root: Op, draw: Draw, of: Callable[[c.InputOp, Op], Op], dtype: str) -> Op:
    """Return `[n]`: the value that each variable's chosen input unit gives (`of(layer, unit)`)."""
    n = units(root).scopes[0].bit_count()
    parts: list[mk.Piece] = []
    sure = True
    one = mk.const(np.ones(1, np.int64 if dtype == "i64" else np.float32))
    nodes = [x for x in postorder(root) if isinstance(x, c.InputOp)]
    seen = sorted(v for x in nodes for v in x.vars)
    sure = seen == list(range(n)) and all(draw.sure[x] for x in nodes)
    for node in nodes:
        value = mk.place(of(node, draw.safe(node)), mk.layer_name(node))
        if not sure:
            off = t.Less(draw.choice[node], _zeros(draw.choice[node]))
            zero = t.Sub(one, one)
            value = t.Where(off, zero, value)
        parts.append((node.vars, value))
    return mk.assemble(n, parts)
