"""What one file of text may cost, counted before memory or time is taken.

A line can be short and its value large: a list of ranges, a layer joined to itself again and again.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from pcc.ir.core import Op
from pcc.ir.scan import Cursor
from pcc.ir.types import Type, Units
from pcc.knobs import MAX_EXTENT, MAX_ITEMS, MAX_RANK, MAX_SCOPE_BYTES, MAX_SCOPE_WORK

Operands: TypeAlias = Op | tuple[Op, ...]


class Budget:
    """The integers and scopes that a file may still use."""

    def __init__(self) -> None:
        self.items, self.scopes, self.work = MAX_ITEMS, MAX_SCOPE_BYTES, MAX_SCOPE_WORK
        self.cost: dict[Op, int] = {}  # bytes that the scopes of a value may take

    def ints(self, c: Cursor) -> tuple[int, ...]:
        """Read a list of integers."""
        out = c.ints(self.items)
        self.items -= len(out)
        return out

    def rank(self, c: Cursor, axes: int) -> None:
        """Refuse a value of very many axes."""
        if axes > MAX_RANK:
            raise c.error("E010", f"a value has {axes} axes", f"at most {MAX_RANK} are supported")

    def mask(self, c: Cursor, last: int) -> None:
        """Refuse a scope whose mask would not fit; a mask has as many bits as its last variable."""
        if last // 8 > self.scopes:
            raise self._exceeded(c)

    def read(self, c: Cursor, operands: list[Operands]) -> None:
        """Count what computing a layer's scopes may cost, from those of its operands."""
        args = [a for x in operands for a in (x if isinstance(x, tuple) else (x,))]
        most = sum(self.cost.get(a, 0) for a in args)
        self.work -= most
        if most > self.scopes or self.work < 0:
            raise self._exceeded(c)

    def take(self, c: Cursor, node: Op) -> None:
        """Count a new value."""
        t = node.type
        self._extent(c, node.name, t)
        if isinstance(t, Units) and node not in self.cost:
            # A tuple's slot each, and a mask: shared between folds, or of its own.
            self.cost[node] = sum(8 + s.bit_length() // 8 for s in t.scopes)
            self.scopes -= self.cost[node]
            if self.scopes < 0:
                raise self._exceeded(c)

    def _extent(self, c: Cursor, name: str, t: Type) -> None:
        if isinstance(t, Units):
            size, least = t.folds * t.k, t.k
        else:
            self.rank(c, len(t.shape))
            size, least = math.prod(t.shape), min(t.shape, default=1)
        if size > MAX_EXTENT or least < 0:
            what = f"'{name}' has {size if size < 1 << 63 else 'too many'} elements"
            raise c.error("E010", what, f"a value has between 0 and {MAX_EXTENT} elements")

    def _exceeded(self, c: Cursor) -> Exception:
        hint = "fold layers, or split the circuit"
        return c.error("E010", "the scopes of this file take too much memory", hint)
