"""Parts of a round: launches of a plan that do the same in each layer, and what they must move."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """Launches by index; `name` is the op, `layer` the place with its number left out."""

    name: str
    layer: str
    launches: tuple[int, ...]
    bytes: int


def parts(launches: Sequence[Mapping[str, Any]], context: int = 0) -> list[Part]:
    """Return the parts of a plan's launches in the order of their first ones.

    `context`: the rows that caches hold, which attention reads.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for i, x in enumerate(launches):
        key = str(x.get("op", "")), NUMBER.sub("*", str(x.get("layer", "")))
        found.setdefault(key, []).append(i)
    return [
        Part(op, layer, tuple(at), sum(moved(launches[i], context) for i in at))
        for (op, layer), at in found.items()
    ]


def moved(launch: Mapping[str, Any], context: int = 0) -> int:
    """Return the bytes that a launch must move, as its plan says (docs/cuda.md).

    `kv_row` is for each row of a cache that is read: `kv_rows` at most, and where there is
    `kv_chunk` one for so many of the older ones.
    """
    listed = {k: int(v) for k, v in (launch.get("bytes") or {}).items()}
    rows = min(context, listed.get("kv_rows", 0))
    if chunk := listed.get("kv_chunk", 0):
        rows += (context - rows) // chunk
    plain = sum(v for k, v in listed.items() if not k.startswith("kv_"))
    return plain + listed.get("kv_row", 0) * rows
