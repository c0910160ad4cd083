"""Which engines a bundle needs: one for each query, or the verifier's pass once for all of them.

With `layers` a graph of a verifier is a chain of engines of so many layers each (`cut`).

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

from pcc.backends.onnx.graph import DTYPE
from pcc.backends.tensorrt.cut import cut, layers_in
from pcc.backends.tensorrt.merge import Merged, merge
from pcc.emission import Emission, Part, listed
from pcc.errors import PccError
from pcc.variants import TABLE_ALIGN

Lower = Callable[[str, Emission], ir.Model]
KINDS = {kind: name for name, kind in DTYPE.items()}


@dataclass(frozen=True)
class Engines:
    """Graphs to build by name, those with profiles among them, and how queries are divided.

    `cuts`: by name the graphs that a graph was cut into, itself where it is whole.
    """

    models: Mapping[str, ir.Model]
    merged: Mapping[str, Merged]
    widths: Mapping[str, tuple[int, ...]]  # of parts and what is cut of them, as their profiles
    parts: Mapping[str, tuple[Part, ...]]
    cuts: Mapping[str, tuple[str, ...]]

    def of(self, query: str) -> tuple[str, ...]:
        """Return the names of the graphs that a query runs, in order."""
        whole = [p.name for p in self.parts.get(query, ())] or [query]
        return tuple(name for w in whole for name in self.cuts[w])

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
               wide: bool, layers: int = 0) -> Engines:  # fmt: skip
    """Return what is to be built; `layers`: of a graph at most, 0 for all.

    Errors: E430 where nothing can be divided, E436.
    """
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
    whole = Engines(models, merged, widths, parts, {name: (name,) for name in models})
    return _cut(whole, layers) if layers else whole


def _cut(engines: Engines, layers: int) -> Engines:
    """Return the same with graphs of at most so many layers. Errors: E430."""
    if not any(map(layers_in, engines.models.values())):
        raise PccError("E430", "layers are of a verifier: this bundle has none")
    models, merged = dict[str, ir.Model](), dict[str, Merged]()
    widths, cuts = dict(engines.widths), dict[str, tuple[str, ...]]()
    for name, model in engines.models.items():
        pieces = cut(model, layers)
        names = [f"{name}-{i}" for i in range(len(pieces))] if len(pieces) > 1 else [name]
        cuts[name] = tuple(names)
        for own, piece in zip(names, pieces, strict=True):
            models[own] = piece
            if (found := engines.merged.get(name)) is None:
                continue
            reads = {v.name for v in piece.graph.inputs}
            tables = {k: v for k, v in found.tables.items() if k in reads}
            merged[own] = Merged(piece, found.sizes, tables)
            widths[own] = engines.widths[name]
    return Engines(models, merged, widths, engines.parts, cuts)


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


def document(engines: Engines, query: str, emission: Emission, plans: Mapping[str, str],
             tables: Tables, file: str) -> list[dict[str, Any]]:  # fmt: skip
    """Return what the manifest says of a query's parts; `file` will hold the tables."""
    names = engines.of(query)
    whole = engines.parts.get(query) or (Part(query, 0, emission, {}),)
    if names == (query,):
        return []
    out = []
    for p in whole:
        at = engines.widths[p.name].index(p.size) if p.name in engines.widths else 0
        for name in engines.cuts[p.name]:
            found = engines.merged.get(name)
            io = listed(p.emission)
            if name != p.name:
                io = _listed(io, engines.models[name].graph, found, at)
            part: dict[str, Any] = {"graph": plans[name], **io}
            part["arrays"] = dict(p.arrays)
            if found is not None:
                placed = [tables.place(k, v[at]) for k, v in found.tables.items()]
                part |= {"profile": at, "tables": placed, "file": file}
            out.append(part)
    return out


def _listed(io: Mapping[str, list[dict[str, Any]]], graph: ir.Graph, merged: Merged | None,
            at: int) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Return what the manifest says of the inputs and outputs of a graph that was cut out of one.

    `io`: of the whole graph. What is handed on is said as the graph has it.
    """
    known = {v["name"]: v for v in io["inputs"]} | {v["onnx"]: v for v in io["outputs"]}
    tables = merged.tables if merged else {}

    def said(v: ir.Value) -> dict[str, Any]:
        name = str(v.name)
        if name in known:
            return {**known[name], "name": known[name].get("onnx", name)}
        assert v.shape is not None
        assert v.dtype is not None
        shape = merged.shape(v, at) if merged else [int(d) for d in v.shape.numpy()]
        return {"name": name, "dtype": KINDS[v.dtype], "shape": shape}

    return {
        "inputs": [said(v) for v in graph.inputs if v.name not in tables],
        "outputs": [{"onnx": str(v.name), **known.get(str(v.name), said(v))}
                    for v in graph.outputs],
    }  # fmt: skip
