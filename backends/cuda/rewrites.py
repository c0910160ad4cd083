"""Identities that make a module cheaper to compute here, before anything is matched."""

from __future__ import annotations

from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.tensor import nn
from pcc.tensor import ops as t


def rewritten(module: Module) -> Module:
    """Return the module that is compiled."""
    return module.rewrite(_norm_of_a_row)


def _norm_of_a_row(op: Op, _: Uses) -> Op | None:
    """Select, then norm: row s of norm(x) is norm(row s of x), and the others are not needed."""
    match op:
        case t.SelectRow(w=t.Reshape(x=nn.RmsNorm() as norm, shape=shape), sel=sel):
            if shape[-1] != tensor(norm).shape[-1]:
                return None
            row = t.SelectRow(t.Reshape(norm.x, shape), sel)
            return nn.RmsNorm(row, norm.w, norm.eps)
        case _:
            return None
