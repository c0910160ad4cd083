"""act(gate) * up, both of one product: the gate is applied where the product's sums end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.library import linear
from pcc.backends.cuda.pack import interleave
from pcc.backends.cuda.patterns.products import Product, product
from pcc.backends.cuda.patterns.terms import given, only_multiplied, operand
from pcc.backends.cuda.piece import WIDE, Offers, Output, Want
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Gate:
    """root = act(x W_gate) * (x W_up); columns of the two matrices alternate when packed."""

    root: Op
    inner: Product
    activation: str
    forms: frozenset[str]
    states: tuple[Op, ...] = ()

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """What the product reads."""
        return list(operand(self.inner.terms[0], graph, offers).needs)

    def emit(self, out: Output) -> None:
        """One launch."""
        (x,), (form,) = self.inner.terms, self.forms
        how, args = given(x, out, gated=True)
        args |= {"y": out.make(self.root, form)}
        if self.inner.bias is not None:
            flat = self.inner.bias.value.reshape(-1)
            args["bias"] = out.array(Array.of(np.ascontiguousarray(interleave(flat))))
        kernel = linear(
            out.name(), rows=x.rows, k=x.k, n=x.n, dtype=x.dtype, source=how.source,
            out="f32" if form == WIDE else "half", epilogue="gated", activation=self.activation,
            bias=self.inner.bias is not None, eps=how.norm.eps if how.norm else 0.0,
            integers=x.scale is not None, gpu=out.graph.gpu,
        )  # fmt: skip
        out.launch(kernel, args, self.root)


def gate(op: Op, graph: Graph) -> Gate | None:
    """Match Mul(act(first half), second half) of one product that nobody else reads."""
    if not isinstance(op, t.Mul) or not isinstance(op.a, nn.Silu | nn.Gelu):
        return None
    first, second = op.a.x, op.b
    if not isinstance(first, t.Take) or not isinstance(second, t.Take) or first.x is not second.x:
        return None
    y = first.x
    size = tensor(y).shape[-1] if len(tensor(y).shape) == 2 else 0
    halves = tuple(range(size // 2)), tuple(range(size // 2, size))
    whole = (first.indices, second.indices) == halves and first.axis == second.axis == 1
    alone = all(graph.single(x) for x in (op.a, first, second)) and len(graph.users(y)) == 2
    if not size or size % 2 or not whole or not alone or y in graph.outputs:
        return None
    inner = product(y, graph)
    if inner is None or len(inner.terms) != 1 or inner.residual is not None:
        return None
    kind = inner.terms[0].dtype
    if kind != WIDE and only_multiplied(op, graph) != kind:
        kind = WIDE
    activation = "gelu" if isinstance(op.a, nn.Gelu) else "silu"
    return Gate(op, inner, activation, frozenset({kind}))
