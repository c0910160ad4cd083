"""How long the launches of a graph take, before any of them is compiled.

A launch takes its body and its ends. With r the rate of a copy in MB per microsecond (TB/s), the
body of a launch that streams weights is

    max(weights / (read r), integers / (widened blocks)) + sums * partial

where `partial` are the sums of slabs that meet in L2, and `blocks` those that are on the GPU at
once; of an attention with `keys` bytes of keys and values it is

    max(keys / (read r), block * load + keys of a block / scanned),   load = max(1, blocks / GPU)

and `summaries` more where it makes those of chunks; of a generated kernel

    phase * phases + barrier * barriers + weights / r

Ends are `start` (of a generated kernel `generated`), and `apart` more for a stream of weights that
cannot begin while the launch before it ends. Launches are added: those of a round, each kind timed
alone, add up to the round within 2 %, but for attention (benchmarks/gpu/cost_fit.py).

Sizes are MB, times microseconds. `Constants` says what each constant means; they are fitted to rows
of an H100 and an H200, and are taken for every other GPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.codegen.generate import Generated
from pcc.backends.cuda.fitted import FITTED
from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Kernel

MB = 1e6
STREAM = 1 << 20  # bytes of weights from which a launch fills rings, and so has a beginning
TILE = 8  # rows of x, to a multiple of which partial sums have room
PARTS = ("layers", "head", "attention", "generated", "ends")
Moved = Mapping[str, int]  # the bytes of a launch, as a plan says them


@dataclass(frozen=True)
class Constants:
    """What was measured of the kernels.

    `read`: the rate at which weights are read, over that of a copy. `start`: microseconds that the
    two ends of a launch cost where it overlaps its neighbours; `apart`: more where it does not.
    `sums`: microseconds for a MB of partial sums. `widened`: KB of 8-bit weights that a block makes
    into halves in a microsecond. `block`: microseconds of a block of attention beside its keys;
    `scanned`: KB of keys and values that it reads in one; `summaries`: for those of EvaByte's
    chunks. `phase`, `barrier`, `generated`: microseconds of a phase, of a barrier of the grid, and
    of the ends of a generated kernel.
    """

    read: float
    start: float
    apart: float
    sums: float
    widened: float
    block: float
    scanned: float
    summaries: float
    phase: float
    barrier: float
    generated: float


MEASURED = Constants(**FITTED)


@dataclass(frozen=True)
class Work:
    """One launch, as far as its time depends on it.

    `part`: one of `PARTS`; `layer`: as in the plan. Bytes: `weights` that it reads, of these
    `integers` of 8 bits; `partial` sums through L2; `keys` and values of caches, `scanned` of them
    by one block. `summaries`: it makes those of chunks. `blocks` of the grid. `apart`: it cannot
    begin while the launch before it ends. `phases` and `barriers`: of a generated kernel, else 0.
    """

    part: str
    layer: str = ""
    weights: int = 0
    integers: int = 0
    partial: int = 0
    keys: int = 0
    scanned: int = 0
    summaries: bool = False
    blocks: int = 1
    apart: bool = False
    phases: int = 0
    barriers: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that no launch can do without: weights, keys and values."""
        return self.weights + self.keys


@dataclass(frozen=True)
class Duration:
    """Microseconds of a launch: its body, and its ends."""

    body: float
    ends: float

    @property
    def whole(self) -> float:
        """Both."""
        return self.body + self.ends


def works(builder: Builder, keys: Callable[[Moved], int]) -> tuple[Work, ...]:
    """Return the launches of a graph. `keys`: the bytes of caches that a launch reads.

    A product belongs to the head where it comes after what follows the last attention (decisions),
    or where there is no attention.
    """
    drawn = builder.launches
    last = max((i for i, x in enumerate(drawn) if "kv_row" in x.bytes), default=-1)
    after = (i for i, x in enumerate(drawn) if i > last and isinstance(x.kernel, Generated))
    decided = next(after, len(drawn)) if last >= 0 else 0
    out, waits = [], True  # whether the launch before must end first
    for i, x in enumerate(drawn):
        overlaps = x.kernel.overlap and builder.graph.gpu.overlaps
        part = "head" if i >= decided else "layers"
        out.append(work(x.kernel, x.bytes, keys(x.bytes), part, x.layer, waits or not overlaps))
        waits = not overlaps
    return tuple(out)


def work(
    kernel: Kernel, moved: Moved, keys: int, part: str, layer: str = "", apart: bool = False
) -> Work:
    """Return one launch of a kernel that moves so much. `part`: of a product."""
    blocks, weights = math.prod(kernel.grid), moved.get("weights", 0)
    if isinstance(kernel, Generated):
        return Work("generated", layer, weights, blocks=blocks, apart=apart,
                    phases=kernel.phases, barriers=kernel.barriers)  # fmt: skip
    if "kv_row" in moved:  # a cluster of one block for new positions, the others for old ones
        scanned = keys / (max(1, kernel.grid[0] - 1) * kernel.grid[2])
        return Work("attention", layer, weights, keys=keys, scanned=round(scanned),
                    summaries="kv_chunk" in moved, blocks=blocks, apart=apart)  # fmt: skip
    read = (a for a in kernel.args if a.role == READ)
    integers = sum(a.bytes for a in read if a.dtype == "u8")
    return Work(part, layer, weights, integers, _partial(kernel), blocks=blocks, apart=apart)


def _partial(kernel: Kernel) -> int:
    """Return the bytes of partial sums, of the rows that are there."""
    made = next((a for a in kernel.args if a.role in (WRITE, UPDATE)), None)
    rows = made.shape[0] if made else 1
    room = sum(a.bytes for a in kernel.args if a.role == SCRATCH and not a.zero)
    return room * rows // (TILE * -(-rows // TILE))


def duration(w: Work, gpu: Gpu, c: Constants = MEASURED) -> Duration:
    """Return the time of a launch on a GPU, whose `copy_rate` is that of a copy there."""
    rate = c.read * gpu.copy_rate
    if w.phases:
        body = c.phase * w.phases + c.barrier * w.barriers + w.weights / MB / gpu.copy_rate
        return Duration(body, c.generated)
    stream = w.weights / MB / rate
    if w.integers:
        there = min(w.blocks, gpu.processors)
        stream = max(stream, w.integers / 1e3 / (c.widened * there))
    body = stream + c.sums * w.partial / MB
    if w.part == "attention":
        load = max(1.0, w.blocks / gpu.processors)
        body += max(w.keys / MB / rate, c.block * load + w.scanned / 1e3 / c.scanned)
        body += c.summaries * w.summaries
    alone = w.apart and w.weights >= STREAM
    return Duration(body, c.start + (c.apart if alone else 0.0))


@dataclass(frozen=True)
class Prediction:
    """A round: milliseconds by part, in the order of `PARTS`, and the bytes that it must move.

    `moved`: of `weights` of layers, of the `head`, and `kv`, as a row of `pcc bench --gpu` has it.
    """

    parts: Mapping[str, float]
    moved: Mapping[str, int]
    copy_rate: float

    @property
    def ms(self) -> float:
        """Milliseconds of the round."""
        return sum(self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes that the round must move."""
        return sum(self.moved.values())

    @property
    def bound_ms(self) -> float:
        """Milliseconds that these bytes take at the rate of a copy."""
        return self.bytes / self.copy_rate / 1e9

    @property
    def ratio(self) -> float:
        """The round beside its bound."""
        return self.ms / self.bound_ms


def predict(launches: Sequence[Work], gpu: Gpu, c: Constants = MEASURED) -> Prediction:
    """Return the time of launches one after another on a GPU."""
    parts = dict.fromkeys(PARTS, 0.0)
    for w in launches:
        took = duration(w, gpu, c)
        parts[w.part] += took.body / 1e3
        parts["ends"] += took.ends / 1e3
    head = _weights(launches, head=True)
    moved = {"weights": _weights(launches, head=False), "head": head,
             "kv": sum(w.keys for w in launches)}  # fmt: skip
    return Prediction(parts, moved, gpu.copy_rate)


def _weights(launches: Iterable[Work], *, head: bool) -> int:
    """Return the weights of the head's products and draft, or of all before them."""
    listed = list(launches)
    first = next((i for i, w in enumerate(listed) if w.part == "head"), len(listed))
    return sum(w.weights for w in (listed[first:] if head else listed[:first]))
