"""The CUDA engine without a GPU: its plans on the host, behind what a loaded bundle offers.

Hand-written kernels run as stand-ins of their documented meaning, generated ones as C++. So this
judges plans, layouts and generated code; the machine code needs the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pcc.conformance.edge import Values
from pcc.ir.core import tensor
from pcc.ir.module import Module
from pcc.tensor.ops import Input


class Simulated:
    """Tensor modules as plans of the CUDA engine at a batch size; `run` answers like an engine."""

    def __init__(self, modules: Mapping[str, Module], batch: int) -> None:
        self.modules, self.batch = dict(modules), batch
        self.made: dict[str, Any] = {}
        self.inputs = {
            name: [n for n in m.nodes() if isinstance(n, Input)] for name, m in modules.items()
        }
        self.queries = {
            name: {"inputs": [_described(i) for i in inputs], "batch": batch}
            for name, inputs in self.inputs.items()
        }

    def run(self, query: str, /, **inputs: Values) -> dict[str, Values]:
        """Return the outputs of a module by name; absent inputs are zeros."""
        simulator = self.simulator(query)
        feed: dict[str, Values] = {}
        for i in self.inputs[query]:
            kind = tensor(i)
            shape = (self.batch, *kind.shape) if kind.batch else kind.shape
            value = np.asarray(inputs.get(i.key, np.zeros(shape)))
            dtype = {"f32": np.float32, "i64": np.int64, "bool": np.bool_}[kind.dtype]
            feed[i.key] = np.ascontiguousarray(np.broadcast_to(value, shape), dtype)
        answers: dict[str, Values] = simulator.run(feed)
        return {name: answers[name] for name, _ in self.modules[query].outputs}

    def simulator(self, query: str) -> Any:
        """Return the plan of a module, ready to run; it is made when it is first asked for."""
        if query not in self.made:
            from pcc.backends.cuda.partition import partition
            from pcc.backends.cuda.simulator import Simulator

            builder = partition(self.modules[query], tuple(self.inputs[query]), self.batch)
            self.made[query] = Simulator(builder)
        return self.made[query]


def _described(i: Input) -> dict[str, Any]:
    kind = tensor(i)
    rows = {"b": ["B"], "c": ["Bc"], "": []}[kind.batch]
    return {"name": i.key, "dtype": kind.dtype, "shape": [*rows, *kind.shape]}
