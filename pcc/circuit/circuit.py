"""`Circuit`: what frontends produce and the compiler takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pcc.errors import PccError
from pcc.ir.core import Op, rewrite, units
from pcc.ir.module import Module
from pcc.tensor.ops import Input


@dataclass(frozen=True)
class Circuit:
    """A smooth and decomposable circuit with one root over variables with cardinalities `cards`.

    `cards[i]` is the number of values of variable i, or 0 if it is continuous. `logits` lists
    `(name, node, replacement)`: logits computed from the context that a caller may supply instead
    (`parameters="logits"`), with the expression over the input `name` that then takes their place.
    """

    root: Op
    cards: tuple[int, ...]
    name: str = "circuit"
    kind: str = "custom"
    rank: int = 0
    logits: tuple[tuple[str, Op, Op], ...] = ()

    def __post_init__(self) -> None:
        t = units(self.root)
        if (t.folds, t.k) != (1, 1):
            raise PccError("E122", f"a circuit's root has one fold and one unit, not {t}")
        full = (1 << len(self.cards)) - 1
        if t.scopes[0] != full:
            raise PccError(
                "E122",
                f"the root is over {t.scopes[0].bit_count()} variables, "
                f"but the circuit has {len(self.cards)}",
            )

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.cards)

    def module(self) -> Module:
        """Return the circuit as a module with one output `p`."""
        return Module(self.name, self.cards, (("p", self.root),))

    def inputs(self) -> dict[str, Input]:
        """Return the named inputs that the parameters depend on."""
        found = (n for n in self.module().nodes() if isinstance(n, Input))
        return {n.key: n for n in found}

    def with_logits(self) -> Circuit:
        """Return the circuit whose logits are inputs instead of functions of the context."""
        if not self.logits:
            raise PccError(
                "E123",
                f"circuit '{self.name}' has no logits computed from a context",
                hint="compile it with parameters='context'",
            )
        swap = {node: new for _, node, new in self.logits}
        (root,) = rewrite((self.root,), lambda n, _: swap.get(n))
        return replace(self, root=root, logits=())
