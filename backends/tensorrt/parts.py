"""Which engines a bundle needs: one for each query, or the verifier's pass once for all of them.

With `profiles` a graph of generation is two engines, run one after the other: the verifier's pass,
merged over every number of tokens that any graph gives it (`merge`), and what follows. The pass has
a profile for each of these widths; its weights are on the device once. A pass over one token is an
engine of its own: its products are of vectors, whose tactics want the weights in another order, so
that an engine with both would hold them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.tensorrt.merge import Merged, merge
from pcc.emission import Emission, Part, listed
from pcc.errors import PccError
from pcc.variants import TABLE_ALIGN

Lower = Callable[[str, Emission], ir.Model]


@dataclass(frozen=True)
class Engines:
    """Graphs to build by name, those with profiles among them, and the parts of each query."""

    models: Mapping[str, ir.Model]
    merged: Mapping[str, Merged]
    widths: Mapping[str, tuple[int, ...]]  # of merged graphs, in the order of their profiles
    parts: Mapping[str, tuple[Part, ...]]

    def of(self, query: str) -> tuple[str, ...]:
        """Return the names of the graphs that a query runs, in order."""
        return tuple(p.name for p in self.parts.get(query, ())) or (query,)

    def profiles(self, name: str) -> list[dict[str, list[int]]]:
        """Return the shapes of a graph's open inputs at each width; none if it has none."""
        found = self.merged.get(name)
        if found is None:
            return []
        open_inputs = [v for v in found.model.graph.inputs if v.shape and v.shape.is_dynamic()]
        return [
            {str(v.name): found.shape(v, at) for v in open_inputs}
            for at in range(len(self.widths[name]))
        ]


def engines_of(emissions: Mapping[str, Emission], lower: Lower, *, divide: bool,
               wide: bool) -> Engines:  # fmt: skip
    """Return what is to be built. Errors: E430 where nothing can be divided, E436."""
    parts = {q: e.parts() for q, e in emissions.items() if divide and e.parts is not None}
    parts = {q: each for q, each in parts.items() if each[0].size > 1}
    if divide and not parts:
        raise PccError("E430", "profiles are of a verifier's pass: this bundle has no verifier")
    models, merged = dict[str, ir.Model](), dict[str, Merged]()
    widths, at = dict[str, tuple[int, ...]](), dict[str, dict[int, Emission]]()
    for each in parts.values():
        for p in each:
            at.setdefault(p.name, {})[p.size] = p.emission
    for name, sizes in at.items():
        widths[name] = tuple(sorted(sizes))
        graphs = [lower(name, sizes[w]) for w in widths[name]]
        models[name] = graphs[0]
        if len(graphs) > 1:
            merged[name] = merge(graphs, wide=wide)
            models[name] = merged[name].model
    models |= {q: lower(q, e) for q, e in emissions.items() if q not in parts}
    return Engines(models, merged, widths, parts)


class Tables:
    """The tables of merged graphs in one file: each aligned, equal ones once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.at: dict[bytes, int] = {}

    def place(self, name: str, value: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Return what the manifest says of a table."""
        raw = np.ascontiguousarray(value).tobytes()
        return {"name": name, "offset": self.place_bytes(raw), "bytes": len(raw)}

    def place_bytes(self, raw: bytes) -> int:
        """Return where bytes lie in the file."""
        if raw not in self.at:
            self.data += bytes(-len(self.data) % TABLE_ALIGN)
            self.at[raw] = len(self.data)
            self.data += raw
        return self.at[raw]

    def write(self, path: Path) -> None:
        """Write the file, if there is any table."""
        if self.data:
            path.write_bytes(self.data)


def document(engines: Engines, query: str, plans: Mapping[str, str], tables: Tables,
             file: str) -> list[dict[str, Any]]:  # fmt: skip
    """Return what the manifest says of a query's parts; `file` will hold the tables."""
    out = []
    for p in engines.parts.get(query, ()):
        part: dict[str, Any] = {"graph": plans[p.name], **listed(p.emission)}
        part["arrays"] = dict(p.arrays)
        if (found := engines.merged.get(p.name)) is not None:
            at = engines.widths[p.name].index(p.size)
            placed = [tables.place(name, v[at]) for name, v in found.tables.items()]
            part |= {"profile": at, "tables": placed, "file": file}
        out.append(part)
    return out
