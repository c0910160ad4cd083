"""What runs one graph on a device: an engine of our own, ONNX Runtime, or TensorRT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from pcc.errors import PccError
from pcc.runtime.dtypes import ITEM


class Executor(Protocol):
    """One graph at fixed shapes, whose arrays lie where it is told.

    Everything that is bound stays owned by the caller. `enqueue` may be called again and again; it
    allocates nothing after its first call, so that it can be recorded into a CUDA graph.
    """

    def bind(self, name: str, address: int) -> None:
        """Say where an array lies on the device: an input, an output, `past.X` or `present.X`.

        The name is the graph's: of an input and a state the manifest's `name`, of an output its
        `onnx` (`x_out`), since a query may return what it is given under the same `name`.
        Arrays are dense and row-major, of the manifest's types and shapes; `past.X` and `present.X`
        of a state with an axis of rows have the same address. A name is bound before the first
        `enqueue`, and again whenever its buffer has moved.
        """

    def enqueue(self, stream: int) -> None:
        """Enqueue the graph's work on a stream (a CUstream as an integer), without waiting."""


class Opener(Protocol):
    """Opens the graphs of one bundle; what they share, weights first of all, it holds once."""

    def executor(self, query: str) -> Executor:
        """Return a query's graph with addresses of its own, nothing of it bound yet."""


def arrays(spec: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the arrays of a query by the names that `bind` takes, inputs first."""
    return [(i["name"], i) for i in spec["inputs"]] + [(o["onnx"], o) for o in spec["outputs"]]


def bytes_of(io: Mapping[str, Any], batch: int, manifest: Mapping[str, Any]) -> int:
    """Return the bytes of an array of a query, an entry of the manifest, for `batch` rows.

    An axis with a name is open: the sizes are then those of the state. Errors: B215 for no state.
    """
    shape = [batch if d in ("B", "Bc") else d for d in io["shape"]]
    if not all(isinstance(d, int) for d in shape):
        states = (manifest["generation"] or {}).get("states", ())
        sizes = {s["name"]: s["shape"] for s in states}
        state = io["name"].partition(".")[2]
        if state not in sizes:
            what = f"the manifest's {io['name'][:60]!r} has open sizes, and is no state"
            raise PccError("B215", what, hint="compile the bundle again")
        shape = [shape[0], *sizes[state]]
    return math.prod(shape) * ITEM[io["dtype"]]
