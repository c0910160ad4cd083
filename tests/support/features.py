"""Small products of features for the passes that store a head's matrices in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Features:
    """A context of `width` numbers, and modules over two variables of `cards` values."""

    width: int
    cards: int
    rng: Any = field(default_factory=lambda: np.random.default_rng(1))

    @property
    def context(self) -> t.Input:
        """The context: f32[width]."""
        return t.Input("context", "f32", "c", (self.width,))

    def const(self, *shape: int) -> t.Const:
        """Return trained numbers, N(0, 1 / width)."""
        return t.Const(Array.of(self.rng.normal(size=shape) / self.width**0.5))

    def one(self, op: t.TensorOp) -> Module:
        """Return a module of one output, y."""
        return Module("m", (self.cards, self.cards), (("y", op),))
