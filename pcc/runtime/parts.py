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
    """Return the bytes that a launch must move, as its plan says (docs/cuda.md)."""
    listed = {k: int(v) for k, v in (launch.get("bytes") or {}).items()}
    return sum(v for k, v in listed.items() if not k.startswith("kv_")) + keys(listed, context)


def keys(listed: Mapping[str, int], context: int) -> int:
    """Return the bytes of keys and values that a launch reads of the positions before `context`.

    `kv_row` is for each row of a cache that is read, of `kv_rows` at most. Where there is
    `kv_chunk`, `kv_rows` are a window: its own rows are read, and one for each chunk of so many in
    the windows before it, as `pcc.runtime.traffic.Attention` has it.
    """
    most = listed.get("kv_rows", 0)
    rows = min(context, most)
    if most and (chunk := listed.get("kv_chunk", 0)):
        rows = context % most + context // most * (most // chunk)
    return listed.get("kv_row", 0) * rows
