"""A piece: one value of a module, and what it is made of, as launches of hand-written kernels.

The same value may be wanted in several forms: as it is ("f32"), rounded for a product ("f16",
"bf16"), or as sums of squares of its rows ("squares", which a norm that is part of a product reads
instead of the whole row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.kernel import Kernel
from pcc.ir.array import Array
from pcc.ir.core import Op

WIDE, SQUARES = "f32", "squares"
HALF_FORMS = ("f16", "bf16")
Want = tuple[Op, str]  # a value in a form


@dataclass(frozen=True)
class Weight:
    """A trained array in the layout of a kernel: equal keys are one array in the file.

    `parts` yields it in flat pieces.
    """

    key: str
    dtype: str
    size: int
    parts: Callable[[], Iterable[NDArray[np.generic]]]


class Offers(Protocol):
    """Which forms of a value can be had."""

    def __call__(self, op: Op, form: str) -> bool:
        """Whether the piece that makes `op` can give it in this form."""
        ...


class Output(Protocol):
    """Takes launches in order, and gives buffers, by index."""

    graph: Graph
    offers: Offers

    def value(self, op: Op, form: str) -> int:
        """Return the buffer of a value that was made before."""
        ...

    def make(self, op: Op, form: str) -> int:
        """Return the buffer for a value that is about to be made."""
        ...

    def wants(self, op: Op, form: str) -> bool:
        """Whether somebody reads this form of a value."""
        ...

    def updated(self, old: Op, new: Op) -> int:
        """Return a buffer that holds `old`, f32, and becomes `new`: its own, or a copy."""
        ...

    def state(self, op: Op) -> int:
        """Return the buffer of a state, before and after the write `op`."""
        ...

    def weight(self, weight: Weight) -> int:
        """Return the buffer of a trained array."""
        ...

    def array(self, array: Array) -> int:
        """Return the buffer of a trained array as it is, in row-major order."""
        ...

    def name(self) -> str:
        """Return a name for a kernel that no other has."""
        ...

    def launch(
        self,
        kernel: Kernel,
        given: Mapping[str, int],
        op: Op,
        *,
        layer: str = "",
        bytes: Mapping[str, int] | None = None,
    ) -> None:
        """Launch a kernel over buffers by argument; its scratch is found here."""
        ...


class Piece(Protocol):
    """A value that hand-written kernels make. `states`: the writes into states that it does."""

    @property
    def root(self) -> Op:
        """The value."""
        ...

    @property
    def states(self) -> tuple[Op, ...]:
        """Other values that it makes: states after their writes."""
        ...

    @property
    def forms(self) -> frozenset[str]:
        """In which forms the value can be had."""
        ...

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """Return what must be there before."""
        ...

    def emit(self, out: Output) -> None:
        """Launch its kernels."""
        ...


Matcher = Callable[[Op, Graph], "Piece | None"]
