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


def parts(launches: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the parts of a plan's launches in the order of their first ones."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, x in enumerate(launches):
        key = str(x.get("op", "")), NUMBER.sub("*", str(x.get("layer", "")))
        found.setdefault(key, []).append(i)
    return [
        Part(op, layer, tuple(at), sum(moved(launches[i]) for i in at))
        for (op, layer), at in found.items()
    ]


def moved(launch: Mapping[str, Any]) -> int:
    """Return the bytes that a launch must move, as its plan says."""
    listed = launch.get("bytes") or {}
    return sum(int(v) for v in listed.values())
