"""The points of a grid, and the heads that it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from pcc import knobs
from pcc.explore.config import Grid
from pcc.explore.heads import Head
from pcc.explore.records import Where

LATENT_FIRST = "latent-first"


@dataclass(frozen=True)
class Point:
    """One engine to measure: a head's first `n` variables, and how it drafts."""

    head: str
    architecture: str
    n: int
    r: int
    lora_layers: int
    proposal: str = knobs.PROPOSAL
    draft_mode: str = knobs.DRAFT_MODE
    precision: str = "fp32"
    int8: str = "none"

    @property
    def name(self) -> str:
        """A name that tells the points of one exploration apart."""
        more = [f"n={self.n}"]
        more += [f"proposal {self.proposal}"] if self.proposal != knobs.PROPOSAL else []
        more += [f"greedy {self.draft_mode}"] if self.draft_mode != knobs.DRAFT_MODE else []
        more += [self.precision] if self.precision != "fp32" else []
        more += [f"int8 {self.int8}"] if self.int8 != "none" else []
        return " ".join([self.head, *more])

    def where(self) -> Where:
        """Return the fields and the name."""
        return {
            "name": self.name, "head": self.head, "architecture": self.architecture,
            "n": self.n, "r": self.r, "lora_layers": self.lora_layers, "proposal": self.proposal,
            "draft_mode": self.draft_mode, "precision": self.precision, "int8": self.int8,
        }  # fmt: skip


@dataclass(frozen=True, order=True)
class Missing:
    """A head of the grid that no checkpoint covers: its architecture, n, r and adapted layers."""

    architecture: str
    n: int
    r: int
    lora_layers: int

    @property
    def name(self) -> str:
        """The name that a head gets when it is trained."""
        lora = f"-lora{self.lora_layers}" if self.lora_layers else ""
        return f"{self.architecture}-n{self.n}-r{self.r}{lora}"


def points_of(head: Head, grid: Grid) -> list[Point]:
    """Return the points of one head: windows x proposals x draft modes x precisions x integers.

    Latent-first drafts read rows that integers have not: such points are left out.
    """
    if not head.fits(grid):
        return []
    proposals, modes = grid.proposal, grid.draft_mode
    if head.architecture == "ff":  # it has no latents to draw first: both names are one engine
        proposals, modes = (knobs.PROPOSAL,), (knobs.DRAFT_MODE,)
    return [
        Point(head.name, head.architecture, n, head.r, head.lora_layers, *how)
        for n in head.windows(grid)
        for how in product(proposals, modes, grid.precision, grid.int8)
        if how[-1] == "none" or LATENT_FIRST not in how
    ]


def missing(grid: Grid, heads: Iterable[Head]) -> list[Missing]:
    """Return the cells (architecture, n, r, layers) that no head covers, whole or by a window."""
    have = list(heads)
    out = []
    for a, layers in product(grid.architecture, grid.lora_layers or (0,)):
        for r, n in product((1,) if a == "ff" else grid.r, grid.n):
            if not _covered(have, a, r, layers, n):
                out.append(Missing(a, n, r, layers))
    return out


def _covered(heads: Iterable[Head], architecture: str, r: int, layers: int, n: int) -> bool:
    return any(
        (h.architecture, h.lora_layers) == (architecture, layers)
        and (h.r == r or architecture == "ff")
        and h.n >= n
        for h in heads
    )


def trainable(cells: Iterable[Missing], *, each_n: bool) -> dict[Missing, list[int]]:
    """Return the heads to train for missing cells, with the n that each is measured at.

    Without `each_n`, of cells that differ in n only the largest is trained: its windows are the
    others. Trees are over a power of two, and windows of it.
    """
    out: dict[Missing, list[int]] = {}
    listed = list(cells)
    for cell in listed:
        alike = [c.n for c in listed if replace(c, n=cell.n) == cell]
        n = cell.n if each_n else max(alike)
        if cell.architecture == "btree":
            n = 1 << (n - 1).bit_length()
        out.setdefault(replace(cell, n=n), []).append(cell.n)
    return out
