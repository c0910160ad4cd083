"""What patterns ask of a module: who reads a value, which array it is, how many rows it has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.ir.core import Op, postorder, tensor
from pcc.ir.module import Module
from pcc.ir.types import HALVES
from pcc.tensor import ops as t
from pcc.tensor.nn import RowWrite

PAST, PRESENT = "past.", "present."


class Graph:
    """A module at a fixed batch size and for one GPU, with each output a value of its own."""

    def __init__(
        self, module: Module, batch: int, inputs: Sequence[t.Input] = (), gpu: Gpu = TUNED
    ) -> None:
        self.batch, self.name, self.gpu = batch, module.name, gpu
        self.outputs: dict[Op, str] = {}
        self.in_place: dict[Op, str] = {}  # the write of each state that has one buffer
        for name, op in module.outputs:
            if (state := _written(name, op)) is not None:
                self.in_place[op] = state
                continue
            if isinstance(op, t.Input | t.Const) or op in self.outputs:
                op = t.Reshape(op, tensor(op).shape)  # an array of its own
            self.outputs[op] = name
        self.made: set[Op] = set()  # what a piece makes as it is
        self.roots = (*self.outputs, *self.in_place)
        self.nodes = tuple(postorder(*self.roots))
        listed = dict.fromkeys((*inputs, *(n for n in self.nodes if isinstance(n, t.Input))))
        self.inputs = tuple(listed)
        self._users: dict[Op, list[Op]] = {n: [] for n in (*self.nodes, *self.inputs)}
        for n in self.nodes:
            for a in dict.fromkeys(n.args):
                self._users[a].append(n)
        self._keep_in_place()

    def _keep_in_place(self) -> None:
        """Give two buffers to a state whose old rows somebody else reads."""
        for op in tuple(self.in_place):
            assert isinstance(op, RowWrite)
            if self._users[op.cache] != [op]:
                self.outputs[op] = PRESENT + self.in_place.pop(op)

    def users(self, op: Op) -> list[Op]:
        """Return the nodes that read a value."""
        return self._users[op]

    def single(self, op: Op) -> bool:
        """Whether one node reads a value, and nobody outside."""
        return len(self._users[op]) == 1 and op not in self.outputs and op not in self.in_place

    def shape(self, op: Op) -> tuple[int, ...]:
        """Return the shape of the array, batch axis first."""
        kind = tensor(op)
        return (self.batch, *kind.shape) if kind.batch else kind.shape

    def source(self, op: Op) -> Op:
        """Return the value whose array this is: reshapes leave the elements where they are."""
        while isinstance(op, t.Reshape) and op not in self.made:
            op = op.x
        return op

    def rows(self, op: Op, axes: int) -> int:
        """Return the product of the array's sizes before its last `axes` axes."""
        shape = self.shape(op)
        return math.prod(shape[: len(shape) - axes])


def _written(name: str, op: Op) -> str | None:
    """Return X where output present.X is the write into past.X: the two share one buffer."""
    if not name.startswith(PRESENT) or not isinstance(op, RowWrite):
        return None
    state = name.removeprefix(PRESENT)
    cache = op.cache
    return state if isinstance(cache, t.Input) and cache.key == PAST + state else None


def half(op: Op) -> str:
    """Return the dtype of a value that is stored in half precision, else ''."""
    dtype = tensor(op).dtype
    return dtype if dtype in HALVES else ""
