"""One product of a value with a trained matrix, wherever it stands: `t.contract` as x W."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.pack import STRIP, interleave, pack_linear, packed_size
from pcc.backends.cuda.piece import SQUARES, WIDE, Offers, Output, Want, Weight
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.ir.recipe import named
from pcc.ir.semiring import split_equation
from pcc.tensor import nn
from pcc.tensor import ops as t

MOST_ROWS = 2048  # more rows read the weights too often: 64 of them share one reading
LEAST = 4096  # f32 numbers in a matrix that is worth a kernel of its own; halves always are


@dataclass(frozen=True)
class Term:
    """x [rows,k] W [k,n]; `turned`: the array holds W^T, [n,k].

    `dtype` to which x is rounded. `scale f32[n]`: `weight` holds integers, of which W is as many.
    """

    op: Op
    x: Op
    weight: Array
    dtype: str
    rows: int
    k: int
    n: int
    turned: bool
    scale: Array | None = None

    @property
    def packing(self) -> str:
        """The dtype of the packed W."""
        return self.dtype if self.scale is None else "u8"

    def scales(self, gated: bool = False) -> Array:
        """Return the scales of the columns, in the order of the packed ones."""
        assert self.scale is not None
        flat = self.scale.reshaped((self.n,))
        return Array.of(interleave(flat.value)) if gated else flat

    def packed(self, gated: bool = False) -> Weight:
        """Return W in the order of the products."""
        key = named("linear", _identity(self.weight), self.k, self.n, self.turned, gated)
        size = packed_size(self.k, self.n, self.packing)
        return Weight(key, self.packing, size, lambda: self._pieces(gated))

    def _pieces(self, gated: bool) -> Iterator[NDArray[np.generic]]:
        """Yield strips of columns: as many as a part of the array has, where it holds W^T."""
        if not self.turned or gated:
            w = self.weight.value
            w = w.reshape(self.n, self.k).T if self.turned else w.reshape(self.k, self.n)
            yield pack_linear(interleave(w) if gated else w)
            return
        held: list[NDArray[np.generic]] = []
        step, count = STRIP * self.k, 0
        for part in self.weight.parts():
            held.append(part)
            count += part.size
            if count < step:
                continue
            flat = np.concatenate(held) if len(held) > 1 else part
            whole = count // step * step
            yield pack_linear(flat[:whole].reshape(-1, self.k).T)
            held, count = [flat[whole:]] if count > whole else [], count - whole
        if count:
            yield pack_linear(np.concatenate(held).reshape(-1, self.k).T)


def _identity(array: Array) -> str:
    return array.ref if array.recipe is None else array.recipe.identity


def term(op: Op, graph: Graph) -> Term | None:
    """Return `op` as a product with a trained matrix, if it is one.

    Equal because the lost axes end the axes of x in their order, and are the first or the last axes
    of the array: then both are matrices as they lie in memory, and so is the result.
    """
    if not isinstance(op, t.Contract | t.ScaledContract) or not isinstance(op.b, t.Const):
        return None
    a, array, scale = tensor(op.a), op.b.value, None
    dtype = op.dtype if isinstance(op, t.ScaledContract) else array.dtype
    if isinstance(op, t.ScaledContract):
        if not isinstance(op.scale, t.Const) or dtype == WIDE:
            return None
        scale = op.scale.value
    if a.dtype != "f32" or not a.batch or dtype not in ("f32", "f16", "bf16"):
        return None
    (left, right), out = split_equation(op.eq)
    lost = "".join(c for c in left if c not in out)
    lead, kept = left.removesuffix(lost), "".join(c for c in right if c not in lost)
    straight, turned = right == lost + kept, right == kept + lost
    if not lost or lead + lost != left or out != lead + kept or not (straight or turned):
        return None
    if set(lead) & set(kept):
        return None
    k = math.prod(a.shape[len(lead) :])
    n = math.prod(array.shape) // k
    rows = graph.rows(op.a, len(lost))
    worth = dtype != WIDE or k * n >= LEAST
    if rows > MOST_ROWS or not worth or min(k, n) < 1:
        return None
    return Term(op, op.a, array, dtype, rows, k, n, not straight, scale)


def only_multiplied(op: Op, graph: Graph) -> str:
    """Return the half dtype that every reader of `op` rounds it to, '' if some reader does not."""
    if op in graph.outputs or op in graph.in_place:
        return ""
    kinds = set()
    for user in graph.users(op):
        if isinstance(user, t.Reshape):
            kinds.add(only_multiplied(user, graph))
            continue
        found = term(user, graph)
        kinds.add(found.dtype if found is not None and found.x is op else "")
    kind = kinds.pop() if len(kinds) == 1 else ""
    return kind if kind != WIDE else ""


# ---------------------------------------------------------------- where x comes from


@dataclass(frozen=True)
class Operand:
    """How a product takes x: option `source` of the kernel, and what that reads."""

    source: str
    needs: tuple[Want, ...]
    norm: nn.RmsNorm | None = None


def operand(x: Term, graph: Graph, offers: Offers) -> Operand:
    """Return the cheapest way to take x that whoever makes it allows.

    "norm" is equal because a row's scale is a function of the sum of its squares only.
    """
    if x.dtype == WIDE:
        return Operand("f32", ((x.x, WIDE),))
    at = graph.source(x.x)
    if isinstance(at, nn.RmsNorm) and _row_norm(at, x) and offers(at.x, SQUARES):
        return Operand("norm", ((at.x, WIDE), (at.x, SQUARES)), at)
    if offers(at, x.dtype):
        return Operand("half", ((at, x.dtype),))
    return Operand("f32", ((x.x, WIDE),))


def _row_norm(norm: nn.RmsNorm, x: Term) -> bool:
    return isinstance(norm.w, t.Const) and tensor(norm).shape[-1] == x.k


def given(x: Term, out: Output, gated: bool = False) -> tuple[Operand, dict[str, int]]:
    """Return how x is taken, and the buffers of x and W by argument."""
    how = operand(x, out.graph, out.offers)
    args = {"x": out.value(*how.needs[0]), "w": out.weight(x.packed(gated))}
    if x.scale is not None:
        args["scales"] = out.array(x.scales(gated))
    if how.norm is not None:
        assert isinstance(how.norm.w, t.Const)
        args["gain"] = out.array(how.norm.w.value)
        args["squares"] = out.value(*how.needs[1])
    return how, args
