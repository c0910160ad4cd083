"""What a pass promises, and the machinery that holds it to that promise."""

from __future__ import annotations

import enum
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pcc.errors import PccError
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.verify import verify


class Exact(enum.Enum):
    """How far a pass may move the computed function."""

    POLYNOMIAL = "same polynomial"  # checked exactly, in a finite field
    ROUNDING = "same function, different rounding"  # checked in float64 with a tolerance
    LOSSY = "bounded change"  # needs a budget; the measured error is reported


class Notes:
    """What a pass did and declined to do, with reasons: `--explain`."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def did(self, node: Op, what: str) -> None:
        """Record that a rule fired at `node`."""
        self.lines.append(f"did      {node.name} {node.loc}: {what}")

    def skip(self, node: Op, why: str) -> None:
        """Record why a rule did not fire at `node`."""
        self.lines.append(f"declined {node.name} {node.loc}: {why}")


@dataclass(frozen=True)
class Pass:
    """A named, pure rewrite of a whole module. Options are dataclass fields."""

    name: ClassVar[str]
    exact: ClassVar[Exact]
    removes: ClassVar[tuple[type[Op], ...]] = ()  # postcondition: none of these remain
    stage: ClassVar[str] = ""  # what `verify` checks after it, if it changes the stage
    keeps_max: ClassVar[bool] = True  # also the same function in max-product (for `mode`)
    tolerance: ClassVar[float] = 1e-9  # of a ROUNDING pass, in float64, relative beyond 1

    def run(self, module: Module, notes: Notes) -> Module:
        """Return the rewritten module."""
        raise NotImplementedError(self.name)

    def sites(self, module: Module) -> Module:
        """Return what a LOSSY pass is judged by: the values that it changes, before it does."""
        return module


@dataclass(frozen=True)
class Record:
    """What one pass did."""

    name: str
    changed: bool
    before: int
    after: int
    ms: float
    check_ms: float
    error: float
    notes: tuple[str, ...] = ()


@dataclass
class Manager:
    """Runs a pipeline; verifies and validates after every pass that changed something.

    A failed validation writes a reproducer folder below `reproducers` (or in a temporary folder)
    and raises E303.
    """

    validate: bool = True
    dump: Path | None = None
    stop_after: str = ""
    reproducers: Path | None = None
    on_pass: Callable[[Record], None] | None = None
    records: list[Record] = field(default_factory=list)
    dumped: int = 0

    def run(self, module: Module, pipeline: Sequence[Pass]) -> Module:
        """Return the module after the whole pipeline."""
        for i, p in enumerate(pipeline):
            module = self.step(module, p, pipeline[i + 1 :])
            if p.name == self.stop_after:
                break
        return module

    def step(self, before: Module, p: Pass, rest: Sequence[Pass] = ()) -> Module:
        """Run one pass and hold it to its promise."""
        notes, start = Notes(), time.perf_counter()
        after = p.run(before, notes)
        middle = time.perf_counter()
        changed = any(a is not b for a, b in zip(before.roots, after.roots, strict=True))
        error = self._check(p, before, after, rest) if changed else 0.0
        size = (sum(1 for _ in before.nodes()), sum(1 for _ in after.nodes()))
        end = time.perf_counter()
        record = Record(
            p.name,
            changed,
            *size,
            (middle - start) * 1e3,
            (end - middle) * 1e3,
            error,
            tuple(notes.lines),
        )
        self.records.append(record)
        if self.on_pass:
            self.on_pass(record)
        if changed and self.dump:
            self._dump(p, after)
        return after

    def _check(self, p: Pass, before: Module, after: Module, rest: Sequence[Pass]) -> float:
        for n in after.nodes():
            if isinstance(n, p.removes):
                raise PccError("E301", f"pass '{p.name}' left a '{n.name}' behind", at=n.loc)
        if [str(r.type) for r in before.roots] != [str(r.type) for r in after.roots]:
            raise PccError("E302", f"pass '{p.name}' changed the module's signature")
        if not self.validate:
            return 0.0
        verify(after, stage=p.stage)
        from pcc.passes.validate import Mismatch, compare

        if p.exact is Exact.LOSSY:
            before = p.sites(before)
            after = p.run(before, Notes())
        try:
            return compare(before, after, p.exact, p.tolerance)
        except Mismatch as bad:
            where = self._reproduce(p, before, bad, rest)
            raise PccError(
                "E303", f"pass '{p.name}' changed the function it compiles: {bad}", hint=where
            ) from None

    def _dump(self, p: Pass, module: Module) -> None:
        from pcc.circuit.text import save

        assert self.dump is not None
        self.dump.mkdir(parents=True, exist_ok=True)
        self.dumped += 1
        save(module, self.dump / f"{self.dumped:02d}-{p.name}.pcir")

    def _reproduce(self, p: Pass, before: Module, bad: Exception, rest: Sequence[Pass]) -> str:
        import numpy as np

        from pcc.circuit.text import save
        from pcc.passes.registry import describe

        # Without a folder the case still must not be lost: a wrong pass is a bug to be reported.
        parent = self.reproducers or Path(tempfile.mkdtemp(prefix="pcc-repro-"))
        folder = parent / f"repro-{p.name}"
        folder.mkdir(parents=True, exist_ok=True)
        save(before, folder / "repro.pcir")
        np.savez(folder / "inputs.npz", **getattr(bad, "inputs", {}))
        (folder / "pipeline.txt").write_text(",".join(describe(q) for q in (p, *rest)) + "\n")
        return f"the module and inputs are in {folder}: pcc opt repro.pcir -p '{describe(p)}'"
