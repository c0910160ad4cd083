"""Launches and buffers of one graph, as its pieces and groups are emitted in order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pcc.backends.cuda.copy import copy
from pcc.backends.cuda.early import check_early
from pcc.backends.cuda.graph import PAST
from pcc.backends.cuda.kernel import SCRATCH, UPDATE, Kernel
from pcc.backends.cuda.labels import Labels
from pcc.backends.cuda.memory import Span, place
from pcc.backends.cuda.pack import strips_of
from pcc.backends.cuda.piece import SQUARES, WIDE, Offers, Piece, Weight
from pcc.backends.cuda.plan import Buffer, Launch, Plan
from pcc.backends.cuda.schedule import Group, Schedule, made_form
from pcc.backends.cuda.weights import WeightFile, plain
from pcc.emission import graph_name
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.tensor import ops as t
from pcc.tensor.nn import RowWrite


@dataclass(frozen=True)
class Drawn:
    """One launch: its kernel, buffers by index, and the value that it is for."""

    kernel: Kernel
    args: tuple[int, ...]
    op: Op
    layer: str
    bytes: Mapping[str, int]


class Builder:
    """Implements `Output` for one schedule."""

    def __init__(self, schedule: Schedule, weights: WeightFile, prefix: str) -> None:
        self.schedule, self.graph, self.weights = schedule, schedule.graph, weights
        self.offers: Offers = schedule.offers
        self.buffers: list[Buffer] = []
        self.launches: list[Drawn] = []
        self._values: dict[tuple[Op, str], int] = {}
        self._weights: dict[str, int] = {}
        self._kernels: dict[str, Kernel] = {}
        self._prefix, self._step, self._label = prefix, 0, ""
        self._last = self._last_reads()
        self._inputs = {x.key for x in self.graph.inputs}
        states = {op.cache: op for op in self.graph.in_place if isinstance(op, RowWrite)}
        for x in self.graph.inputs:
            name = self.graph.in_place.get(states[x], "") if x in states else x.key
            kind = "state" if x.key.startswith(PAST) else "input"
            at = self._add(Buffer(name, kind, tensor(x).dtype, self.graph.shape(x)))
            self._values[x, WIDE] = at
            if x in states:
                self._values[states[x], WIDE] = at

    # ------------------------------------------------------------ emission

    def run(self) -> None:
        """Emit every step."""
        labels = Labels(self.graph, self.schedule.ranked)
        for i, step in enumerate(self.schedule.steps):
            self._step = i
            self._label = "" if isinstance(step, Group) else labels.of(step)
            if isinstance(step, Group):
                from pcc.backends.cuda.groups import emit_group

                emit_group(step, self)
            else:
                step.emit(self)
        check_early(self.launches, self.buffers, self.graph.name)

    def _last_reads(self) -> dict[Op, int]:
        """Return for each value the last step that reads it as it is."""
        last: dict[Op, int] = {}
        for i, step in enumerate(self.schedule.steps):
            for op in self._reads(step):
                last[op] = i
        return last | dict.fromkeys(self.graph.outputs, len(self.schedule.steps))

    def _reads(self, step: Piece | Group) -> list[Op]:
        if isinstance(step, Group):
            return [self.graph.source(op) for op in step.inputs]
        return [op for op, form in self.schedule.needs(step) if form == WIDE]

    # ------------------------------------------------------------ Output

    def value(self, op: Op, form: str) -> int:
        """Return the buffer of a value that was made before."""
        at = self.graph.source(op)
        if isinstance(at, t.Const):
            return self.array(at.value)
        return self._values[at, made_form(form)]

    def make(self, op: Op, form: str) -> int:
        """Return the buffer for a value that is about to be made."""
        form = made_form(form)
        if (op, form) in self._values:
            return self._values[op, form]
        shape, dtype = self.graph.shape(op), tensor(op).dtype if form == WIDE else form
        if form == SQUARES:
            shape, dtype = (self.graph.rows(op, 1), strips_of(shape[-1])), "f32"
        name = self.graph.outputs.get(op, "") if form == WIDE else ""
        if name:
            name = graph_name(name, self._inputs)
            kind = "state" if name.startswith("present.") else "output"
        else:
            kind, name = "scratch", f"{self._prefix}v{len(self.buffers)}"
        self._values[op, form] = self._add(Buffer(name, kind, dtype, shape))
        return self._values[op, form]

    def wants(self, op: Op, form: str) -> bool:
        """Whether somebody reads this form of a value."""
        return form in self.schedule.wanted.get(op, ())

    def updated(self, old: Op, new: Op) -> int:
        """Return a buffer that holds `old`, f32, and becomes `new`: its own, or a copy."""
        at, reads = self.graph.source(old), self._reads(self.schedule.steps[self._step])
        begin = self.value(old, WIDE)
        free = self.buffers[begin].kind == "scratch" and reads.count(at) == 1
        if free and self._last[at] == self._step and new not in self.graph.outputs:
            self._values[new, WIDE] = begin
            return begin
        end = self.make(new, WIDE)
        size = math.prod(self.buffers[end].shape)
        self.launch(copy(self.name(), "f32", size), {"x": begin, "y": end}, new)
        return end

    def state(self, op: Op) -> int:
        """Return the buffer of a state, before and after the write `op`."""
        return self._values[op, WIDE]

    def weight(self, weight: Weight) -> int:
        """Return the buffer of a trained array."""
        if weight.key not in self._weights:
            offset = self.weights.offset(weight)
            made = Buffer(weight.key[:16], "weight", weight.dtype, (weight.size,), offset)
            self._weights[weight.key] = self._add(made)
        return self._weights[weight.key]

    def array(self, array: Array) -> int:
        """Return the buffer of a trained array as it is, in row-major order."""
        return self.weight(plain(array))

    def name(self) -> str:
        """Return a name for a kernel that no other has."""
        return f"{self._prefix}kernel_{len(self.launches)}"

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
        self._fit(kernel)
        args = []
        for a in kernel.args:
            at = given.get(a.name)
            if a.role == SCRATCH and at is None:
                name = f"{kernel.name}.{a.name}"
                at = self._add(Buffer(name, "scratch", a.dtype, a.shape, zero=a.zero))
            if at is None or self.buffers[at].bytes != a.bytes or a.dtype != self.buffers[at].dtype:
                found = None if at is None else self.buffers[at]
                raise PccError("E181", f"argument {a.name!r} of a kernel is {found}, wants {a}")
            args.append(at)
        moved = self._moved(kernel, args) | dict(bytes or {})
        self.launches.append(
            Drawn(self._shared(kernel), tuple(args), op, layer or self._label, moved)
        )

    def _fit(self, kernel: Kernel) -> None:
        """Refuse a kernel that the GPU cannot launch. Errors: E190."""
        gpu, blocks = self.graph.gpu, math.prod(kernel.grid)
        if kernel.shared > gpu.block_shared:
            what = f"a kernel takes {kernel.shared} bytes of shared memory, {gpu.arch} has "
            raise PccError("E190", f"{what}{gpu.block_shared} for a block", at=self.graph.name)
        if kernel.cooperative and blocks > gpu.processors:
            what = f"{blocks} blocks wait for each other on {gpu.processors} multiprocessors"
            raise PccError("E190", what, at=self.graph.name)

    def _shared(self, kernel: Kernel) -> Kernel:
        """Return an equal kernel of another launch, if there is one: it is compiled once."""
        return self._kernels.setdefault(kernel.source.replace(kernel.name, "@"), kernel)

    def _moved(self, kernel: Kernel, args: list[int]) -> dict[str, int]:
        """Return the bytes of the weights and of the values that a launch reads and writes."""
        out = {"weights": 0, "activations": 0}
        for a, at in zip(kernel.args, args, strict=True):
            kind = self.buffers[at].kind
            if kind == "weight":
                out["weights"] += a.bytes
            elif kind != "state" and a.role != SCRATCH:
                out["activations"] += a.bytes * (2 if a.role == UPDATE else 1)
        return out

    def _add(self, buffer: Buffer) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    # ------------------------------------------------------------ the plan

    def plan(self, cubin: str) -> Plan:
        """Return the plan: scratch placed by when it is read. Errors: E189 (equal names)."""
        counts = Counter(b.name for b in self.buffers)
        if counts and (twice := counts.most_common(1)[0])[1] > 1:
            raise PccError("E189", f"{twice[1]} buffers of '{self.graph.name}' are {twice[0]!r}")
        lives: dict[int, tuple[int, int]] = {}
        for i, launch in enumerate(self.launches):
            for at in launch.args:
                lives[at] = (lives.get(at, (i, i))[0], i)
        ends = len(self.launches) - 1
        scratch = [i for i, b in enumerate(self.buffers) if b.kind == "scratch" and i in lives]
        spans = [
            Span(self.buffers[i].bytes, *((0, ends) if self.buffers[i].zero else lives[i]))
            for i in scratch
        ]
        offsets, total = place(spans)
        buffers = list(self.buffers)
        for i, offset in zip(scratch, offsets, strict=True):
            buffers[i] = replace(buffers[i], offset=offset)
        launches = tuple(
            Launch(
                x.kernel.name, x.kernel.grid, x.kernel.block, x.args, x.kernel.shared,
                x.kernel.cooperative, x.kernel.overlap, x.op.name, x.layer, dict(x.bytes),
            )
            for x in self.launches
        )  # fmt: skip
        gpu = self.graph.gpu
        return Plan(
            self.graph.name, self.graph.batch, gpu.arch, gpu.processors, cubin, total,
            tuple(buffers), launches,
        )  # fmt: skip

    def source(self) -> str:
        """Return the CUDA source of all kernels."""
        return "\n".join(dict.fromkeys(x.kernel.source for x in self.launches))
