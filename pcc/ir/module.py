"""A module: named outputs over a set of variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pcc.errors import PccError
from pcc.ir.core import Op, Uses, postorder, rewrite
from pcc.ir.types import HALVES


@dataclass(frozen=True)
class Module:
    """Named outputs `(name, value)` over variables with cardinalities `cards` (0: continuous)."""

    name: str
    cards: tuple[int, ...]
    outputs: tuple[tuple[str, Op], ...]

    @property
    def roots(self) -> tuple[Op, ...]:
        """The output values."""
        return tuple(op for _, op in self.outputs)

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.cards)

    @property
    def top_card(self) -> int:
        """Largest cardinality (0 if every variable is continuous)."""
        return max(self.cards, default=0)

    @property
    def discrete(self) -> bool:
        """Whether every variable is finite."""
        return all(self.cards)

    def nodes(self) -> Iterator[Op]:
        """Every node once, operands first."""
        return postorder(*self.roots)

    @property
    def stored(self) -> str:
        """Return the coarsest dtype of stored floats: "f32", "f16" or "bf16".

        To what an op rounds its operand counts as well: products with i8 say so.
        """
        kinds = {str(getattr(x, "dtype", "")) for n in self.nodes() for x in (n.type, n)}
        return next((k for k in reversed(HALVES) if k in kinds), "f32")

    def with_roots(self, roots: tuple[Op, ...]) -> Module:
        """Return this module with other output values under the same names."""
        names = [name for name, _ in self.outputs]
        return replace(self, outputs=tuple(zip(names, roots, strict=True)))

    def rewrite(self, rule: Callable[[Op, Uses], Op | None]) -> Module:
        """Rebuild bottom-up, replacing a node when `rule` returns one."""
        return self.with_roots(rewrite(self.roots, rule))

    def output(self, name: str) -> Op:
        """Return an output by name."""
        for key, op in self.outputs:
            if key == name:
                return op
        raise PccError("E120", f"module '{self.name}' has no output {name!r}")
