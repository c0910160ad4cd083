"""Which values each unit may have positive at: where sums are proven to be deterministic.

A box over-approximates a unit's support: for every variable below it, a set of values. A table
gives its positive entries, a product the boxes of its operands, a sum the union of its terms'
boxes, one variable at a time. Two terms whose boxes share no value of some variable are never
positive together. Where that holds for every pair of terms of every sum unit, p(x) is a single term
whatever x is, so that the largest term is the largest p.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from pcc.circuit import ops as c
from pcc.ir.core import Op, Values, postorder, tensor, units
from pcc.passes.messages import expand_fused
from pcc.tensor import ops as t

CELLS = 1 << 24  # boxes of one layer: units times variables times values
Box: TypeAlias = Values  # bool [F,K,n,V]; variables that are not below a unit have no value


def deterministic(root: Op) -> bool:
    """Whether no sum unit can have two positive terms at once; False where that is not proven.

    Computed parameters (a softmax of a context) are taken to be positive throughout.
    """
    flat = expand_fused(root)
    layers = [n for n in postorder(flat) if isinstance(n, c.CircuitOp)]
    sums = [n for n in layers if isinstance(n, c.Sum | c.Mix)]
    if not any((_positive(n.w).sum(axis=-1) > 1).any() for n in sums):
        return True
    leaves = [n for n in layers if isinstance(n, c.InputOp)]
    tables = [n for n in leaves if isinstance(n, c.Categorical)]
    width = max((tensor(n.p).shape[2] for n in tables), default=1)
    cells = units(root).scopes[0].bit_count() * width
    if max(units(n).folds * units(n).k for n in layers) * cells > CELLS:
        return False
    if all(_positive(n.p).all() for n in tables):
        return False  # every unit may be positive everywhere
    boxes: dict[Op, Box] = {}
    for n in layers:
        if isinstance(n, c.Sum | c.Mix) and not _apart(n, boxes):
            return False
        boxes[n] = _box(n, boxes, (units(root).scopes[0].bit_count(), width))
    return True


def _positive(w: Op) -> Values:
    """Return where a parameter may be positive."""
    if isinstance(w, t.Const):
        return np.asarray(w.value.value != 0)
    return np.ones(tensor(w).shape, bool)


def _apart(n: c.Sum | c.Mix, boxes: dict[Op, Box]) -> bool:
    """Whether any two terms of a sum unit have disjoint boxes on some variable."""
    w = _positive(n.w)
    for f, o in np.ndindex(*w.shape[:2]):
        (chosen,) = np.nonzero(w[f, o])
        if len(chosen) < 2:
            continue
        if isinstance(n, c.Sum):
            terms = boxes[n.x][f, chosen]
        else:
            terms = np.stack([boxes[n.xs[h]][f, o] for h in chosen])
        if not _disjoint(terms, units(n).scopes[f]):
            return False
    return True


def _disjoint(terms: Box, scope: int) -> bool:
    """Whether every two of `[H,n,V]` share no value of some variable of the scope."""
    below = terms[:, [scope >> i & 1 == 1 for i in range(terms.shape[1])]]
    by_variable = below.transpose(1, 0, 2).astype(np.float32)
    shared = by_variable @ by_variable.transpose(0, 2, 1)  # [n,H,H]: values in common
    apart = (shared == 0).any(axis=0)
    return bool((apart | np.eye(len(terms), dtype=bool)).all())


def _box(n: Op, boxes: dict[Op, Box], shape: tuple[int, int]) -> Box:
    match n:
        case c.InputOp():
            return _leaf(n, shape)
        case c.Sum(x=x, w=w):
            return _union(_positive(w), boxes[x])
        case c.Mix(xs=xs, w=w):
            keep = _positive(w)
            parts = [boxes[x] & keep[:, :, h, None, None] for h, x in enumerate(xs)]
            return np.asarray(np.logical_or.reduce(parts))
        case c.Hadamard(xs=xs):
            return np.asarray(np.logical_or.reduce([boxes[x] for x in xs]))
        case c.Kronecker(a=a, b=b):
            left, right = boxes[a][:, :, None], boxes[b][:, None]
            return (left | right).reshape(units(n).folds, units(n).k, *shape)
        case c.Gather(x=x, folds=folds):
            return boxes[x][list(folds)]
        case c.Concat(xs=xs):
            return np.concatenate([boxes[x] for x in xs])
        case _:
            raise AssertionError(n.name)


def _leaf(n: c.InputOp, shape: tuple[int, int]) -> Box:
    """Return a table's positive entries; a density is positive everywhere."""
    out = np.zeros((len(n.vars), units(n).k, *shape), bool)
    for f, v in enumerate(n.vars):
        if isinstance(n, c.Categorical):
            p = _positive(n.p)[f]
            out[f, :, v, : p.shape[1]] = p
        else:
            out[f, :, v] = True
    return out


def _union(w: Values, x: Box) -> Box:
    """Union over the inputs with a positive weight, `[F,Ko,n,V]`."""
    flat = x.reshape(*x.shape[:2], -1).astype(np.float32)
    return (w.astype(np.float32) @ flat > 0).reshape(*w.shape[:2], *x.shape[2:])
