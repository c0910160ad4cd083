"""One op on operands of given kinds and shapes, and modules that hold it in every batch form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.conformance.edge import Values, stored, values
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.tensor import ops as t

Operand = tuple[str, tuple[int, ...]]  # kind of values, per-row shape
Made = dict[str, tuple[str, int]]  # input -> the kind and the seed of its values


@dataclass(frozen=True)
class Case:
    """One op on operands of given kinds and shapes.

    `forms` are the batch forms in which operands may come (see `module_of`); "" leaves the choice
    to whoever builds a module. Errors are relative above `floor` (`pcc.conformance.report`).
    """

    op: type[Op]
    operands: tuple[Operand, ...]
    make: Callable[..., Op]
    tolerance: float = 2e-6
    forms: str = ""
    floor: float = 1.0

    @property
    def name(self) -> str:
        """What the test is called."""
        shapes = ".".join("x".join(map(str, s)) or "scalar" for _, s in self.operands)
        attrs = [
            v
            for v in getattr(self.make, "__defaults__", ()) or ()
            if isinstance(v, int | str | tuple)
        ]
        halves = {k.partition("@")[2] for k, _ in self.operands} - {""}
        kinds = {k.partition("@")[0] for k, _ in self.operands} & {"faint", "tiny", "exponent"}
        more = (*map(str, attrs), *sorted(halves), *sorted(kinds))
        return "-".join([self.op.name.removeprefix("t."), shapes, *more])


def module_of(case: Case, batches: str, prefix: str = "") -> tuple[Module, Made]:
    """Return a module with an output for every combination, and the kind and seed of each input.

    Batches: "k" a trained constant, "v" an input without a batch axis, "c", "b". Names of inputs
    and outputs begin with `prefix`, so that modules of several cases can be joined.
    """
    made: Made = {}
    outs: dict[str, Op] = {}
    for combo in itertools.product(batches, repeat=len(case.operands)):
        pairs = enumerate(zip(case.operands, combo, strict=True))
        xs = [operand(i, *o, b, made, prefix) for i, (o, b) in pairs]
        outs[f"{prefix}y_" + "".join(combo)] = case.make(*xs)
    return Module("case", (), tuple(outs.items())), made


def operand(i: int, kind: str, shape: tuple[int, ...], b: str, made: Made, prefix: str) -> Op:
    """Return one operand in a batch form; inputs are noted in `made`."""
    if b == "k":
        return t.Const(Array.of(values(kind, 1, shape, i)[0]))
    key = f"{prefix}{b}{i}"
    made[key] = (kind, i)
    return t.Input(key, stored(kind), "" if b == "v" else b, shape)


def feeds(case: Case, made: Made, rows: int, contexts: int, prefix: str = "") -> dict[str, Values]:
    """Return the inputs of `module_of` for a batch size and a number of context rows."""
    out: dict[str, Values] = {}
    for key, (kind, i) in made.items():
        form = key[len(prefix)]
        count = {"v": 1, "c": contexts, "b": rows}[form]
        made_of = values(kind, count, case.operands[i][1], 7 * i + ord(form))
        out[key] = np.asarray(made_of[0]) if form == "v" else made_of
    return out


def each(
    op: type[Op], kinds: tuple[str, ...], *shapes: tuple[tuple[int, ...], ...], **more: Any
) -> Iterator[Case]:
    """Yield a case of an op without attributes for each tuple of operand shapes."""
    for shape in shapes:
        yield Case(op, tuple(zip(kinds, shape, strict=True)), op, **more)
