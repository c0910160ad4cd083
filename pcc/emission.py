"""What the compiler hands to the writer of a target, and what it gets back.

A writer is a module with `write_graphs(order, folder, say) -> Written`. `WRITERS` is the one table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.targets import Target
from pcc.tensor.ops import Input

Say: TypeAlias = Callable[[str], None]
# By format. Modules, since a backend is loaded when it is needed.
WRITERS: Mapping[str, str] = {
    "onnx": "pcc.backends.onnx.write",
    "tensorrt": "pcc.backends.tensorrt.write",
    "cuda": "pcc.backends.cuda.emit",
}


@dataclass(frozen=True)
class Emission:
    """A tensor module to emit as a graph: its inputs in order, uniforms, and open axes.

    `slots` have `role`, `layer` and `index`. `symbols`: by name of an input or output, the per-row
    axes whose size the caller leaves open. `parts` makes the graphs that a target may write in its
    place, to be run one after the other, if there is such a division.
    """

    module: Module
    inputs: tuple[Input, ...]
    slots: tuple[Any, ...] = ()
    symbols: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    parts: Callable[[], tuple[Part, ...]] | None = None


@dataclass(frozen=True)
class Part:
    """One of the graphs that a query is divided into.

    Parts of one `name` are one graph at several sizes (`size` tokens). `arrays`: the query's name
    of what the part calls otherwise. Other names are the query's too where it has such an array;
    the rest is handed from part to part.
    """

    name: str
    size: int
    emission: Emission
    arrays: Mapping[str, str]


@dataclass(frozen=True)
class Order:
    """Graphs to write for one target. `batch`: the rows of a static graph, else of no meaning.

    `gpu`: the architecture to build for, "sm_90" (target cuda: or with multiprocessors,
    "sm_89:142"); "": that of the GPU that is present.
    `engine`: options of the writer's own, by name.
    """

    name: str
    emissions: Mapping[str, Emission]
    target: Target
    precision: str = "fp32"
    batch: int = 1
    gpu: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)


class Places(Protocol):
    """A finished weight file."""

    def find(self, array: Array) -> tuple[tuple[int, int], bool] | None:
        """Return (offset, bytes) of an array and whether it lies there turned, None if nowhere."""
        ...


@dataclass(frozen=True)
class Written:
    """What a writer made.

    `specs`: by query what the manifest says beside inputs and outputs: "graph", the name of its
    file, "nodes", and what only this format has. `variants`: the manifest's. `placed`: where arrays
    lie in the bundle's `graphs/weights.bin`, None if the format keeps them elsewhere. `hashes`:
    SHA-256 of files, by name in the bundle, that were hashed while they were written.
    """

    specs: Mapping[str, Mapping[str, Any]]
    variants: tuple[Mapping[str, Any], ...]
    placed: Places | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)


def described(name: str, value: Op, e: Emission) -> dict[str, Any]:
    """Return what the manifest says of an input or output."""
    kind = tensor(value)
    batch = {"b": ["B"], "c": ["Bc"], "": []}[kind.batch]
    open_axes = e.symbols.get(name, {})
    sizes = [open_axes.get(i, d) for i, d in enumerate(kind.shape)]
    return {"name": name, "dtype": kind.dtype, "shape": [*batch, *sizes]}


def listed(e: Emission) -> dict[str, list[dict[str, Any]]]:
    """Return what the manifest says of a graph's inputs and outputs."""
    names = {i.key for i in e.inputs}
    return {
        "inputs": [described(i.key, i, e) for i in e.inputs],
        "outputs": [
            {**described(o, v, e), "onnx": graph_name(o, names)} for o, v in e.module.outputs
        ],
    }


def graph_name(output: str, inputs: Collection[str | None]) -> str:
    """Return an output's name in a graph, which may not give an input and an output the same."""
    return f"{output}_out" if output in inputs else output


def write_graphs(order: Order, folder: Path, say: Say) -> Written:
    """Write every graph of an order into a bundle's folder."""
    writer = importlib.import_module(WRITERS[order.target.format])
    return cast(Written, writer.write_graphs(order, folder, say))
