"""Evaluate at compile time what depends on trained numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Semiring
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class FoldConstants(Pass):
    """f(constants) => the constant, computed in float64 and stored in float32.

    Pays: what is the same for every row is computed once. Declined for what depends on an input,
    and if the result has more than `limit` elements and is `grow` times its operands.
    """

    name: ClassVar[str] = "fold-constants"
    exact: ClassVar[Exact] = Exact.ROUNDING
    tolerance: ClassVar[float] = 2e-5  # float32 storage of every intermediate parameter
    limit: int = 1 << 22
    grow: int = 4

    def run(self, module: Module, notes: Notes) -> Module:
        """Fold bottom-up."""
        exact: dict[Op, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}

        def rule(n: Op, _: Uses) -> Op | None:
            if not isinstance(n, t.TensorOp) or isinstance(n, t.Const | t.Input) or not n.args:
                return None
            if not all(isinstance(a, t.Const) for a in n.args):
                return None
            if any(isinstance(a, t.Const) and a.value.recipe for a in n.args):
                notes.skip(n, "an operand is not in memory")
                return None
            size = int(np.prod(tensor(n).shape))
            total = sum(int(np.prod(tensor(a).shape)) for a in n.args)
            if size > self.limit and size > self.grow * total:
                notes.skip(n, f"{size} elements from {total}")
                return None
            values = [
                exact[a] if a in exact else a.eval(Semiring())
                for a in n.args
                if isinstance(a, t.Const)
            ]
            result = np.asarray(n.eval(Semiring(), *values))
            out = t.Const(Array.of(result))
            if result.dtype.kind == "f":
                exact[out] = result  # chains round once, at their end
            return out

        return module.rewrite(rule)
