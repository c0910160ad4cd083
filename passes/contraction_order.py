"""Choose the order in which a product of two layers and a weight are contracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class ContractionOrder(Pass):
    """sum_ij w[o,i,j] a[i] b[j]  =>  sum_j (sum_i w[o,i,j] a[i]) b[j], if Ko < Ka.

    Both orders cost about Ko Ka Kb multiply-adds; the first writes Ka Kb products per row, the
    second Ko Kb: it pays where there are fewer outputs than inputs. Declines otherwise, and where
    the products have another reader.
    """

    name: ClassVar[str] = "contraction-order"
    exact: ClassVar[Exact] = Exact.ROUNDING

    def run(self, module: Module, notes: Notes) -> Module:
        """Reorder every Tucker contraction that gains."""
        return module.rewrite(lambda n, uses: self.reorder(n, uses, notes))

    def reorder(self, n: Op, uses: Uses, notes: Notes) -> Op | None:
        """Return the reordered contraction, or None."""
        match n:
            case t.Contract(
                a=t.Reshape(x=t.Mul(a=t.Reshape(x=a), b=t.Reshape(x=b)) as grid) as flat,
                b=t.Reshape(x=w),
                eq="fi,foi->fo",
            ) if len(tensor(w).shape) == 4 and len(tensor(grid).shape) == 3:
                _, o, i, j = tensor(w).shape
                if tensor(a).shape[1:] != (i,) or tensor(b).shape[1:] != (j,):
                    return None
                if uses[flat] > 1 or uses[grid] > 1:
                    notes.skip(n, "the pairwise products have another reader")
                    return None
                if o >= i:
                    notes.skip(n, f"{o} outputs for {i} inputs: the products are smaller")
                    return None
                notes.did(n, f"contract {i} first: {o * j} instead of {i * j} values per row")
                return t.Contract(t.Contract(a, w, "fi,foij->foj"), b, "foj,fj->fo")
            case _:
                return None
