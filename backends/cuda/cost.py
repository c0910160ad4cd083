"""How long the launches of a graph take, before any of them is compiled.

A launch takes its body and its ends. With r the rate of a copy in MB per microsecond (TB/s), the
body of a product whose warps take `steps` pieces of W one after another, each for `tiles` of 8
rows of x, is, where a multiprocessor has `waves` of its blocks,

    max(weights reads / (read r), waves steps each) + sums partial,
    each = multiplied tiles,    of integers widened + 2 multiplied tiles,

`partial` being the sums of slabs that meet in L2. Of an attention whose `old` blocks read
`scanned` bytes each it is, with load = max(1, its blocks / multiprocessors),

    max(keys / (read r), scanned / block_rate, scanned max(1, old / multiprocessors) / sm_rate)
    + block load,   and `summaries` more where it makes those of chunks;

of a generated kernel

    phase phases + barrier barriers + weights / (gathered r).

Ends are `start`; of a product of few rows (staged + normed where x is normalised) for each row; of
a generated kernel `generated`; and `apart` more for a stream of weights that cannot begin while the
launch before it ends. Launches are added.

Sizes are MB, times microseconds. `Constants` says what each constant means; they are fitted to rows
of an H200 and products of an H100 (benchmarks/gpu/cost_fit.py), and are taken for every other GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.codegen.generate import Generated
from pcc.backends.cuda.fitted import FITTED
from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.kernel import SCRATCH, Kernel
from pcc.backends.cuda.pack import blocks_of, strips_of
from pcc.backends.cuda.split import WARPS
from pcc.backends.cuda.standins import traits

MB, KB = 1e6, 1e3
STREAM = 1 << 20  # bytes of weights from which a launch fills rings, and so has a beginning
PARTS = ("layers", "head", "attention", "generated", "ends")
Moved = Mapping[str, int]  # the bytes of a launch, as a plan says them


@dataclass(frozen=True)
class Constants:
    """What was measured of the kernels, in microseconds where nothing else is said.

    Of all launches: `read`: the rate at which weights are read, over that of a copy. `start`: the
    two ends of a launch where it overlaps its neighbours; `apart`: more where it does not.
    Of products: `staged`: a row of x, into registers; `normed`: more where it is normalised on the
    way. `sums`: a MB of partial sums. `multiplied`: a piece of W of each of 8 warps, by 8 rows
    of x; `widened`: such pieces of integers, made into halves.
    Of attention: `block`: a block beside its keys. KB of keys and values in a microsecond:
    `block_rate`, of one block; `sm_rate`, of all blocks of a multiprocessor. `summaries`: those of
    EvaByte's chunks. Of generated kernels: a `phase`, a `barrier` of the grid; `gathered`: the rate
    at which they read weights, over that of a copy; `generated`: their two ends.
    """

    read: float
    start: float
    apart: float
    staged: float
    normed: float
    sums: float
    multiplied: float
    widened: float
    block: float
    block_rate: float
    sm_rate: float
    summaries: float
    phase: float
    barrier: float
    gathered: float
    generated: float


MEASURED = Constants(**FITTED)


@dataclass(frozen=True)
class Product:
    """x W through tensor cores.

    `steps`: pieces of 2 KiB of W that each of a block's eight warps takes one after another (with
    sixteen, twice as many); `tiles`: of 8 rows of x, that each is multiplied by; `reads`: how often
    W is read. `integers` of 8 bits, not halves.
    `rows` of x that a kernel of few rows takes into registers, 0 of others; `normed`: on the way.
    `partial`: bytes of sums through L2.
    """

    steps: int
    tiles: int = 1
    reads: int = 1
    integers: bool = False
    rows: int = 0
    normed: bool = False
    partial: int = 0


@dataclass(frozen=True)
class Scan:
    """Attention: `old` blocks read `scanned` bytes of old keys and values each.

    `summaries`: it makes those of chunks.
    """

    scanned: int
    old: int = 1
    summaries: bool = False


@dataclass(frozen=True)
class Phases:
    """A generated kernel: `phases` one after another, `barriers` of its whole grid."""

    phases: int
    barriers: int = 0


@dataclass(frozen=True)
class Work:
    """One launch, as far as its time depends on it.

    `part`: one of `PARTS`; `layer`: as in the plan. Bytes: `weights`, and `keys` and values of
    caches. `blocks` of the grid. `apart`: it cannot begin while the launch before it ends. `of`:
    what else its kind of kernel does; None where that is nothing (norms, look-ups).
    """

    part: str
    layer: str = ""
    weights: int = 0
    keys: int = 0
    blocks: int = 1
    apart: bool = False
    of: Product | Scan | Phases | None = None


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
    of: Product | Scan | Phases | None
    if isinstance(kernel, Generated):
        part, of = "generated", Phases(kernel.phases, kernel.barriers)
    elif "kv_row" in moved:
        part, of = "attention", _scan(kernel, moved, keys)
    else:
        of = _product(kernel)
    blocks = math.prod(kernel.grid)
    return Work(part, layer, moved.get("weights", 0), keys, blocks, apart, of)


def _scan(kernel: Kernel, moved: Moved, keys: int) -> Scan:
    """Return an attention: all tiles of a head read its keys, each divided over `SPLITS` blocks."""
    splits, (_, tiles, heads) = traits(kernel.source)["SPLITS"], kernel.grid
    return Scan(round(keys / (splits * heads)), splits * tiles * heads, "kv_chunk" in moved)


def _product(kernel: Kernel) -> Product | None:
    """Return a product, as its constants say how it is divided; None of other kernels."""
    c = traits(kernel.source)
    if "COLUMNS" not in c:
        return None
    integers, strips = c["SCALED"], strips_of(c["N"])
    if "CLUSTER" in c:  # a strip at a time, K over all warps: `narrow.py`
        pieces = -(-blocks_of(c["K"], "u8" if integers else "f16") // (c["WARPS"] * c["CLUSTER"]))
        steps = pieces * -(-strips // c["COLUMNS"]) * c["WARPS"] // WARPS
        return Product(steps, c["TILES"], 1, integers, c["M"], c["SOURCE"] == 2)
    groups = kernel.grid[2]  # of rows, each of which reads W: `split.py`
    room = sum(a.bytes for a in kernel.args if a.role == SCRATCH and not a.zero)
    partial = room * c["M"] // (8 * c["TILES"] * groups)
    steps = c["SLAB"] * -(-strips // (c["COLUMNS"] * c["WARPS"]))
    return Product(steps, c["TILES"], groups, integers, partial=partial)


def duration(w: Work, gpu: Gpu, c: Constants = MEASURED) -> Duration:
    """Return the time of a launch on a GPU, whose `copy_rate` is that of a copy there."""
    weights, rate, ends = w.weights / MB, c.read * gpu.copy_rate, c.start
    load = w.blocks / gpu.processors
    if isinstance(w.of, Phases):
        body = c.phase * w.of.phases + c.barrier * w.of.barriers
        return Duration(body + weights / (c.gathered * gpu.copy_rate), c.generated)
    if isinstance(w.of, Scan):
        each, shared = w.of.scanned / KB, max(1.0, w.of.old / gpu.processors)
        body = max(w.keys / MB / rate, each / c.block_rate, each * shared / c.sm_rate)
        body += weights / rate + c.block * max(1.0, load) + c.summaries * w.of.summaries
    elif isinstance(w.of, Product):
        p = w.of
        each = c.multiplied * p.tiles
        each = c.widened + 2 * each if p.integers else each
        body = max(weights * p.reads / rate, math.ceil(load) * p.steps * each)
        body += c.sums * p.partial / MB
        ends += p.rows * (c.staged + c.normed * p.normed)
    else:
        body = weights / rate
    alone = w.apart and w.weights >= STREAM
    return Duration(body, ends + (c.apart if alone else 0.0))


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
