"""Where nodes come from: a line of a file, or the circuit layer that a tensor belongs to.

Equal nodes are one object, whoever built them, so their origin is no part of them: it is looked up
in a table. A compilation has a table of its own (`fresh`): what else is alive in the process cannot
show in what it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias
from weakref import WeakKeyDictionary

Places: TypeAlias = MutableMapping[object, str]
_EVERYWHERE: Places = WeakKeyDictionary()  # outside of compilations; nodes do not live for it
_PLACES: ContextVar[Places | None] = ContextVar("places", default=None)


def _table() -> Places:
    table = _PLACES.get()
    return _EVERYWHERE if table is None else table


def place_of(node: object) -> str:
    """Return where a node comes from, or ''."""
    return _table().get(node, "")


def place(node: object, where: str, *, again: bool = False) -> None:
    """Say where a node comes from, if nothing is known of it (or `again`)."""
    if where:
        table = _table()
        if again or node not in table:
            table[node] = where


SHOWN = 3  # places of several nodes that are named


def places_of(nodes: Iterable[object]) -> str:
    """Return where most of these nodes come from, the most frequent place first, or ''."""
    counts = Counter(where for n in nodes if (where := place_of(n)))
    return ", ".join(where for where, _ in counts.most_common(SHOWN))


@contextmanager
def fresh(known: Iterable[object] = ()) -> Iterator[None]:
    """Start a table that knows the places of some nodes only, for the duration of a block."""
    table: Places = {n: where for n in known if (where := place_of(n))}
    token = _PLACES.set(table)
    try:
        yield
    finally:
        _PLACES.reset(token)
