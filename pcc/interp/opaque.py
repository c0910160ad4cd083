"""Stand-ins for values that are not polynomials, in exact carriers.

A softmax over logits becomes random numbers, fold by fold, keyed by what the fold is computed from:
stacking folds of several layers, or selecting some, keeps each fold's numbers. What is below such a
value is never evaluated.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import Semiring
from pcc.tensor import ops as t

_FOLDS: WeakKeyDictionary[Array, list[str]] = WeakKeyDictionary()


def stand_in(n: Op, rows: int, s: Semiring, count: int) -> Values:
    """Return the stand-in for the opaque node `n`; `count` numbers those with no structure."""
    kind = tensor(n)
    lead = (rows,) if kind.batch else ()
    keys = fold_keys(n.x) if isinstance(n, t.Unary) and len(kind.shape) > 1 else None
    if keys is None:
        return s.random_leaf((*lead, *kind.shape), f"opaque{count}")
    parts = [s.random_leaf((*lead, *kind.shape[1:]), f"{n.name}:{key}") for key in keys]
    return np.stack(parts, axis=len(lead))


def fold_keys(x: Op) -> list[str] | None:
    """Return one key per index of the first axis, or None if the folds are not told apart."""
    match x:
        case t.Const(value=array):
            return _of_array(array)
        case t.Input(key=key, shape=shape) if shape:
            return [f"{key}[{f}]" for f in range(shape[0])]
        case t.Contract(a=t.Input(key=key), b=t.Const(value=array), eq="d,abcd->abc"):
            return [f"{key}.{k}" for k in _of_array(array)]
        case t.ScaledContract(
            a=t.Input(key=key), b=t.Const(value=q), scale=t.Const(value=s), eq="d,abcd->abc"
        ):
            pairs = zip(_of_array(q), _of_array(s), strict=True)
            return [f"{key}.{x.dtype}.{k}*{step}" for k, step in pairs]
        case t.Take(x=y, axis=0, indices=rows):
            keys = fold_keys(y)
            return None if keys is None else [keys[r] for r in rows]
        case t.Concat(xs=xs, axis=0):
            parts = [fold_keys(y) for y in xs]
            return [k for p in parts for k in p or ()] if all(p for p in parts) else None
        case t.Add(a=a, b=b):
            left, right = fold_keys(a), fold_keys(b)
            if left is None or right is None or len(left) != len(right):
                return None
            return [f"({p}+{q})" for p, q in zip(left, right, strict=True)]
        case _:
            return None


def _of_array(array: Array) -> list[str]:
    if array not in _FOLDS:
        _FOLDS[array] = array.row_keys()
    return _FOLDS[array]
