"""Store the matrices that map a context to a head's parameters as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.errors import PccError
from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.ir.quantise import by_columns, by_rows
from pcc.ir.semiring import split_equation
from pcc.passes.half_projections import feature_products, sampled
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import ops as t


@dataclass(frozen=True)
class IntegerProjections(Pass):
    """W x => (round(W / s) x) s, for trained W and features x, with one scale s for each output.

    x is rounded to `dtype` (f32: it is not). Features are those of `half-projections`.
    Pays: these matrices are nearly all bytes that a draft reads; small ones too, so that an engine
    can join them with the others. Declined for products of another form, which may become half
    afterwards, and for probabilities. Validation judges the products themselves, as that of
    `half-projections` does.
    """

    name: ClassVar[str] = "integer-projections"
    exact: ClassVar[Exact] = Exact.LOSSY
    tolerance: ClassVar[float] = 4.0  # 1 % of scores of up to 100, where one is near zero
    dtype: str = "f32"

    def run(self, module: Module, notes: Notes) -> Module:
        """Rewrite every matrix that features meet."""
        sites = set(feature_products(module))
        made: dict[Op, tuple[Op, Op] | None] = {}

        def rule(n: Op, _: Uses) -> Op | None:
            if not isinstance(n, t.Contract) or (n.eq, n.b) not in sites:
                return None
            if n.b not in made:
                made[n.b] = self._integers(n.b, n.eq, notes)
            found = made[n.b]
            return found and t.ScaledContract(n.a, *found, n.eq, self.dtype)

        return module.rewrite(rule)

    def _integers(self, b: Op, eq: str, notes: Notes) -> tuple[Op, Op] | None:
        """Return (q, s) of a matrix, None if it stays as it is. Errors: E107."""
        outputs = _outputs(eq)
        assert isinstance(b, t.Const)
        if not outputs:
            notes.skip(b, f"{eq} of {tensor(b)} has no outputs that lie as rows or columns")
            return None
        try:
            q, s = by_rows(b.value) if outputs == "rows" else by_columns(b.value)
        except PccError as e:
            raise PccError(e.code, e.what, at=e.at or b.loc, hint=e.hint) from None
        notes.did(b, f"{tensor(b)} as i8")
        return t.Const(q), t.Const(s)

    def sites(self, module: Module) -> Module:
        """Return the products that are changed, of large matrices some rows, as a module."""
        known = set(feature_products(module))
        found = [sampled(n) for n in module.nodes()
                 if isinstance(n, t.Contract) and (n.eq, n.b) in known]  # fmt: skip
        outputs = tuple((f"y{i}", n) for i, n in enumerate(found) if n is not None)
        return Module(module.name, module.cards, outputs)


def _outputs(eq: str) -> str:
    """Return how outputs lie in b: "rows" [..,D], "columns" [D,K], "" otherwise."""
    (ta, tb), out = split_equation(eq)
    lost = [c for c in tb if c not in out]
    if len(lost) != 1 or lost[0] not in ta:
        return ""
    if tb[-1] == lost[0]:
        return "rows"
    return "columns" if len(tb) == 2 else ""
