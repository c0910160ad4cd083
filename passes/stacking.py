"""Group equal layers at one depth and stack them along the fold axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from pcc.circuit import ops as c
from pcc.ir.array import joined
from pcc.ir.core import Op, tensor, units
from pcc.ir.module import Module
from pcc.passes import pieces as mk
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t

Key = tuple[object, ...]


def signature(n: Op) -> Key | None:
    """Return what two layers must share to be stacked, or None if a layer cannot be."""
    if isinstance(n, c.Gather | c.Concat) or not isinstance(n, c.CircuitOp):
        return None
    shapes = [
        ("u", units(a).k) if isinstance(a, c.CircuitOp) else ("t", *parameter(a)) for a in n.args
    ]
    return (n.name, len(n.args), *shapes)


def parameter(p: Op) -> Key:
    """Return the kind of a parameter: its shape without folds, and how it is made."""
    shape = tensor(p).shape[1:]
    if isinstance(p, t.Const):
        return ("const", *shape)
    if isinstance(p, t.Softmax):
        return ("softmax", *parameter(p.x))
    if isinstance(p, t.Contract) and isinstance(p.b, t.Const) and p.eq == "d,abcd->abc":
        return ("linear", id(p.a), *shape)
    if isinstance(p, t.ScaledContract) and p.eq == "d,abcd->abc" and _trained(p.b, p.scale):
        return ("scaled", id(p.a), p.dtype, *shape)
    return ("other", tensor(p).batch, *shape)


def _trained(*values: Op) -> bool:
    return all(isinstance(v, t.Const) for v in values)


def stack(ps: list[Op]) -> Op:
    """Join parameters along folds; softmaxes and linear maps are joined inside."""
    if len(ps) == 1:
        return ps[0]
    if all(isinstance(p, t.Const) for p in ps):
        return t.Const(joined([p.value for p in ps if isinstance(p, t.Const)]))
    if all(isinstance(p, t.Softmax) for p in ps):
        return t.Softmax(stack([p.x for p in ps if isinstance(p, t.Softmax)]))
    first = ps[0]
    if isinstance(first, t.Contract) and parameter(first)[0] == "linear":
        return t.Contract(first.a, stack([p.b for p in ps if isinstance(p, t.Contract)]), first.eq)
    if isinstance(first, t.ScaledContract) and parameter(first)[0] == "scaled":
        same = [p for p in ps if isinstance(p, t.ScaledContract)]
        b, scale = stack([p.b for p in same]), stack([p.scale for p in same])
        return t.ScaledContract(first.a, b, scale, first.eq, first.dtype)
    return mk.concat(ps)


class _Stacker:
    """Rebuilds a circuit level by level; every old layer becomes (new layer, its folds)."""

    def __init__(self, module: Module, wanted: Callable[[Op], bool], notes: Notes) -> None:
        self.place: dict[Op, tuple[Op, tuple[int, ...]]] = {}
        self.notes = notes
        depth: dict[Op, int] = {}
        levels: dict[int, dict[Key, list[Op]]] = {}
        nodes = [n for n in module.nodes() if isinstance(n, c.CircuitOp)]
        for n in nodes:
            below = [depth[a] for a in n.args if isinstance(a, c.CircuitOp)]
            wiring = isinstance(n, c.Gather | c.Concat)
            depth[n] = max(below, default=0) + (0 if wiring else 1)
            key = (signature(n) if wanted(n) else None) or ("single", id(n))
            levels.setdefault(depth[n], {}).setdefault(key, []).append(n)
        for d in sorted(levels):
            # Wiring at this depth reads layers of this depth: build it after them.
            groups = sorted(levels[d].values(), key=lambda g: isinstance(g[0], c.Gather | c.Concat))
            for group in groups:
                self._build(group)

    def _build(self, group: list[Op]) -> None:
        n = group[0]
        if isinstance(n, c.Gather):
            layer, folds = self.place[n.x]
            self.place[n] = (layer, tuple(folds[f] for f in n.folds))
            return
        if isinstance(n, c.Concat):
            pairs = [(lay, f) for x in n.xs for lay, fs in [self.place[x]] for f in fs]
            self.place[n] = self._join(pairs)
            return
        if len(group) > 1:
            self.notes.did(n, f"{len(group)} layers into one")
        new = self._stacked(group)
        at = 0
        for old in group:
            stop = at + units(old).folds
            self.place[old] = (new, tuple(range(at, stop)))
            at = stop

    def _join(self, pairs: list[tuple[Op, int]]) -> tuple[Op, tuple[int, ...]]:
        layers = list(dict.fromkeys(lay for lay, _ in pairs))
        start: dict[Op, int] = {}
        total = 0
        for x in layers:
            start[x] = total
            total += units(x).folds
        whole = layers[0] if len(layers) == 1 else c.Concat(tuple(layers))
        return whole, tuple(start[lay] + f for lay, f in pairs)

    def read(self, olds: list[Op]) -> Op:
        """Return the rows of several old layers, one after another."""
        pairs = [(lay, f) for x in olds for lay, fs in [self.place[x]] for f in fs]
        layer, folds = self._join(pairs)
        return layer if folds == tuple(range(units(layer).folds)) else c.Gather(layer, folds)

    def _stacked(self, group: list[Op]) -> Op:
        columns = list(zip(*(n.args for n in group), strict=True))
        args = tuple(
            self.read(list(col)) if isinstance(col[0], c.CircuitOp) else stack(list(col))
            for col in columns
        )
        n = group[0]
        if isinstance(n, c.InputOp):
            variables = tuple(v for m in group if isinstance(m, c.InputOp) for v in m.vars)
            return type(n)(variables, *args)
        return n.with_args(args)


def _restack(module: Module, wanted: Callable[[Op], bool], notes: Notes) -> Module:
    work = _Stacker(module, wanted, notes)
    after = module.with_roots(tuple(work.read([r]) for r in module.roots))
    before_size = sum(isinstance(n, c.CircuitOp) for n in module.nodes())
    after_size = sum(isinstance(n, c.CircuitOp) for n in after.nodes())
    return after if after_size < before_size else module


@dataclass(frozen=True)
class Layerize(Pass):
    """Scalar nodes (one fold, one unit) of one kind, fan-in and depth => one layer of many folds.

    Pays: a node graph runs as a few batched contractions. Operands are gathered from the layers
    below. Declines nodes with several units or folds, and if the circuit would not get smaller.
    """

    name: ClassVar[str] = "layerize"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Group scalar nodes."""
        return _restack(module, lambda n: units(n).k == 1 and units(n).folds == 1, notes)


@dataclass(frozen=True)
class FoldLayers(Pass):
    """Layers of one kind, unit counts and depth => one layer with all their folds.

    Pays: one batched contraction for many small ones. Declined if the circuit would not get smaller
    (the gathers that readers need count).
    """

    name: ClassVar[str] = "fold-layers"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Stack equal layers."""
        return _restack(module, lambda _: True, notes)
