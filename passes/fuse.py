"""Fuse sum and product layers, so that the product is never written to memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.circuit import ops as c
from pcc.ir.core import Op, Uses, tensor, units
from pcc.ir.module import Module
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class _Fuse(Pass):
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        """Fuse bottom-up."""
        return module.rewrite(lambda n, uses: self.fuse(n, uses, notes))

    def fuse(self, n: Op, uses: Uses, notes: Notes) -> Op | None:
        """Return the fused layer, or None."""
        raise NotImplementedError

    def alone(self, n: Op, inner: Op, uses: Uses, notes: Notes) -> bool:
        """Whether `inner` has only this reader; otherwise it would be computed twice."""
        if uses[inner] > 1:
            notes.skip(n, f"the '{inner.name}' below has {uses[inner]} readers")
        return uses[inner] == 1


@dataclass(frozen=True)
class FuseTucker(_Fuse):
    """c.sum(c.kronecker(a, b), w) => c.tucker(a, b, reshape(w)).

    Pays: Ka Kb products per fold need not be written. Declines if something else reads them.
    """

    name: ClassVar[str] = "fuse-tucker"

    def fuse(self, n: Op, uses: Uses, notes: Notes) -> Op | None:
        """Return the fused layer, or None."""
        match n:
            case c.Sum(x=c.Kronecker(a=a, b=b) as k, w=w) if self.alone(n, k, uses, notes):
                (f, o, _), i, j = tensor(w).shape, units(a).k, units(b).k
                notes.did(n, f"{i} x {j} products")
                return c.Tucker(a, b, t.Reshape(w, (f, o, i, j)))
            case _:
                return None


@dataclass(frozen=True)
class FuseCpt(_Fuse):
    """c.sum(c.hadamard(xs), w) => c.cpt(xs, w).

    Pays: the product is an operand of one contraction. Declines if something else reads it.
    """

    name: ClassVar[str] = "fuse-cpt"

    def fuse(self, n: Op, uses: Uses, notes: Notes) -> Op | None:
        """Return the fused layer, or None."""
        match n:
            case c.Sum(x=c.Hadamard(xs=xs) as h, w=w) if self.alone(n, h, uses, notes):
                notes.did(n, f"{len(xs)} factors")
                return c.Cpt(xs, w)
            case _:
                return None


@dataclass(frozen=True)
class FuseCp(_Fuse):
    """c.hadamard(c.sum(x_a, w_a) ...) => c.cp(xs, ws).

    Pays: the factors' sums are one layer. Declines unless every factor is a sum read only here.
    """

    name: ClassVar[str] = "fuse-cp"

    def fuse(self, n: Op, uses: Uses, notes: Notes) -> Op | None:
        """Return the fused layer, or None."""
        if not isinstance(n, c.Hadamard) or len(set(n.xs)) != len(n.xs):
            return None
        sums = [x for x in n.xs if isinstance(x, c.Sum)]
        if len(sums) != len(n.xs):
            notes.skip(n, f"{len(n.xs) - len(sums)} of {len(n.xs)} factors are not sums")
            return None
        if not all(self.alone(n, x, uses, notes) for x in sums):
            return None
        notes.did(n, f"{len(sums)} sums")
        return c.Cp(tuple(x.x for x in sums), tuple(x.w for x in sums))
