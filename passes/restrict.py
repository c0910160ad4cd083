"""Fewer variables: the first n' of a circuit, the others summed out."""

from __future__ import annotations

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.ir.core import Op, postorder
from pcc.passes import pieces as mk
from pcc.passes.messages import expand_fused
from pcc.passes.unfold import unfold
from pcc.tensor import ops as t


def restrict(circuit: Circuit, n: int) -> Circuit:
    """sum_{x_{n+1}..} p(x): what depends on dropped variables only is one, and leaves products.

    Needs tables and weights that sum to one. Raises E143 where they do not.
    """
    if not 1 <= n <= circuit.n:
        raise PccError("E143", f"window {n} is not within 1..{circuit.n}")
    if n == circuit.n:
        return circuit
    root = unfold(expand_fused(circuit.root))
    kept: dict[Op, Op | None] = {}
    for x in postorder(root):
        if isinstance(x, c.CircuitOp):
            kept[x] = _reduce(x, n, kept)
    new = kept[root]
    assert new is not None
    name = f"{circuit.name}-window{n}"
    return Circuit(new, circuit.cards[:n], name, circuit.kind, circuit.rank, circuit.logits)


def _reduce(x: Op, n: int, kept: dict[Op, Op | None]) -> Op | None:
    below = [kept[a] for a in x.args if isinstance(a, c.CircuitOp)]
    match x:
        case c.Categorical(vars=(v,)) if v < n:
            return x
        case c.Gaussian(vars=(v,)) if v < n:
            return x
        case c.Categorical(p=p):
            _must_be_one(x, p)
            return None
        case c.Gaussian():
            return None
        case c.Hadamard():
            left = tuple(y for y in below if y is not None)
            return (left[0] if len(left) == 1 else c.Hadamard(left)) if left else None
        case c.Sum(w=w) | c.Mix(w=w) if all(y is None for y in below):
            _must_be_one(x, w)
            return None
        case _ if all(y is not None for y in below):
            args = iter(below)
            return x.with_args(
                tuple(next(args) if isinstance(a, c.CircuitOp) else a for a in x.args)  # type: ignore[misc]
            )
        case _ if all(y is None for y in below):
            return None
        case _:
            raise PccError("E143", f"a window cuts through a '{x.name}'", at=x.loc)


def _must_be_one(x: Op, p: Op) -> None:
    close = isinstance(p, t.Const) and np.allclose(p.value.value.sum(axis=-1), 1.0, atol=1e-6)
    if not (close or mk.normalised(p)):
        raise PccError("E143", f"a window needs normalised parameters below '{x.name}'", at=x.loc)
