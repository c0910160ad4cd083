"""Sums of products with trained matrices: y = x W (+ bias) (+ residual) (+ further products).

The terms of a sum may be added in any order, up to rounding: the residual is what the first
product adds to, in place, and each further product (the factors of an adapter) adds to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.library import linear
from pcc.backends.cuda.patterns.terms import Term, given, only_multiplied, operand, term
from pcc.backends.cuda.piece import SQUARES, WIDE, Offers, Output, Want
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Product:
    """root = residual + bias + sum of the terms; the forms are what its readers can take."""

    root: Op
    terms: tuple[Term, ...]
    residual: Op | None
    bias: Array | None
    forms: frozenset[str]
    states: tuple[Op, ...] = ()

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """What each product reads, and the residual."""
        wants = [w for x in self.terms for w in operand(x, graph, offers).needs]
        return wants if self.residual is None else [*wants, (self.residual, WIDE)]

    def emit(self, out: Output) -> None:
        """One launch for each term."""
        rounded = next((f for f in self.forms - {WIDE, SQUARES} if out.wants(self.root, f)), "")
        if self.residual is not None:
            y = out.updated(self.residual, self.root)
        else:
            y = out.make(self.root, rounded or WIDE)
        for i, x in enumerate(self.terms):
            last, adds = i == len(self.terms) - 1, i > 0 or self.residual is not None
            squares = last and out.wants(self.root, SQUARES)
            how, args = given(x, out)
            args |= {"y": y}
            biased = i == 0 and self.bias is not None
            if i == 0 and self.bias is not None:
                args["bias"] = out.array(self.bias)
            if squares:
                args["squares_out"] = out.make(self.root, SQUARES)
            kernel = linear(
                out.name(), rows=x.rows, k=x.k, n=x.n, dtype=x.dtype, source=how.source,
                out="half" if rounded else "f32", epilogue="residual" if adds else "none",
                bias=biased, squares=squares, integers=x.scale is not None,
                eps=how.norm.eps if how.norm else 0.0, gpu=out.graph.gpu,
            )  # fmt: skip
            out.launch(kernel, args, self.root)


def product(op: Op, graph: Graph) -> Product | None:
    """Match a sum with at least one product, and at most one value that is none."""
    if not isinstance(op, t.Add | t.Contract | t.ScaledContract):
        return None
    found, others = _terms(op, graph, top=True)
    if not found or tensor(op).shape[-1:] == ():
        return None
    biases = [x for x in others if _is_bias(x, op, found)]
    rest = [x for x in others if x not in biases]
    if len(biases) > 1 or len(rest) > 1 or any(tensor(x) != tensor(op) for x in rest):
        return None
    bias = biases[0].value if biases and isinstance(biases[0], t.Const) else None
    forms = {WIDE}
    kind = only_multiplied(op, graph)
    if kind and kind == found[0].dtype and len(found) == 1 and not rest:
        forms = {kind}
    elif len(tensor(op).shape) == 2:
        forms.add(SQUARES)
    return Product(op, tuple(found), rest[0] if rest else None, bias, frozenset(forms))


def _terms(op: Op, graph: Graph, *, top: bool = False) -> tuple[list[Term], list[Op]]:
    """Return the products and the other terms of a sum whose parts nobody else reads."""
    if top or graph.single(op):
        if (found := term(op, graph)) is not None:
            return [found], []
        if isinstance(op, t.Add) and tensor(op.a).batch == tensor(op.b).batch == tensor(op).batch:
            if tensor(op.a).shape == tensor(op.b).shape:
                left, right = _terms(op.a, graph), _terms(op.b, graph)
                return left[0] + right[0], left[1] + right[1]
        if isinstance(op, t.Add):
            for x, other in ((op.a, op.b), (op.b, op.a)):
                if isinstance(other, t.Const) and tensor(x) == tensor(op):
                    left = _terms(x, graph)
                    return left[0], [*left[1], other]
    return [], [op]


def _is_bias(x: Op, root: Op, terms: list[Term]) -> bool:
    """Whether a constant is one number for each column of every product."""
    if not isinstance(x, t.Const) or tensor(x).dtype != "f32":
        return False
    shape = tensor(x).shape
    columns = math.prod(shape) == terms[0].n == shape[-1] == tensor(root).shape[-1]
    return columns and all(x.n == terms[0].n for x in terms)
