"""Which function emits which op, by the way in which it is emitted.

| table | the op's value |
|---|---|
| `INLINE` | an expression at an index: computed by whoever reads it |
| `ROWS` | registers of a warp: a whole row of the last axis at once |
| `SCALARS` | one number that a warp computes together |
| `SERIAL` | a sum: a job of its own, or of its only reader where that reads each result once |
| `JOBS` | a loop of its own: always stored |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pcc.ir.core import Op

R = TypeVar("R", bound=Callable[..., Any])
INLINE: dict[type[Op], Callable[..., str]] = {}
ROWS: dict[type[Op], Callable[..., str]] = {}
SCALARS: dict[type[Op], Callable[..., str]] = {}
SERIAL: dict[type[Op], Callable[..., str]] = {}
JOBS: dict[type[Op], Callable[..., None]] = {}
TABLES: dict[str, dict[type[Op], Callable[..., Any]]] = {
    "inline": INLINE,
    "rows": ROWS,
    "scalar": SCALARS,
    "serial": SERIAL,
    "job": JOBS,
}


class UnreadableError(Exception):
    """A value that cannot be computed where it is read: it must be stored."""

    def __init__(self, node: Op) -> None:
        super().__init__(node.name)
        self.node = node


def emits(way: str, *ops: type[Op]) -> Callable[[R], R]:
    """Register the emitter of ops. A second one in the same way is a bug, not an override."""

    def register(rule: R) -> R:
        table = TABLES[way]
        for op in ops:
            if op in table:
                raise TypeError(f"'{op.name}' is already emitted as {way}")
            table[op] = rule
        return rule

    return register


def emitted() -> set[type[Op]]:
    """Every op that has an emitter."""
    return {op for table in TABLES.values() for op in table}
