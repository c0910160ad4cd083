"""Reads the plans of the engine of our own, and runs them: `engines/cuda/<graph>.json`.

A plan is a list of buffers and one of kernel launches over them; `docs/cuda.md` has the format. It
is a stranger's: no index, offset, size or grid is used before it was checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.runtime.device.arena import fixed
from pcc.runtime.device.executor import arrays
from pcc.runtime.dtypes import ITEM

VERSION = 1
KINDS = ("input", "output", "state", "weight", "scratch")
MAX_PLAN_BYTES = 64 << 20
MAX_LISTED = 1 << 18  # buffers or launches
MAX_BYTES = 1 << 40  # of the scratch arena, and of any buffer
MAX_GRID = ((1 << 31) - 1, 65535, 65535)
MAX_BLOCKS = 1 << 24  # of a launch: 2^31 elements are that many blocks of 128
MAX_THREADS = 1024
MAX_ARGS = 1024
MAX_PROCESSORS = 1 << 16
MAX_SHARED = 227 << 10  # of a block on any GPU so far
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
ARCH = re.compile(r"sm_(\d{1,2})(\d)([af]?)")


@dataclass(frozen=True)
class Buffer:
    """An array of a plan."""

    name: str
    kind: str
    dtype: str
    bytes: int
    offset: int
    zero: bool


@dataclass(frozen=True)
class Launch:
    """A kernel over buffers by index."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    cooperative: bool
    overlap: bool
    args: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """One graph, checked. `document` is the file as it was read.

    `processors`: multiprocessors that it was divided for, 0 where an older pcc did not say.
    """

    arch: str
    processors: int
    cubin: str
    weights: str
    scratch_bytes: int
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    document: Mapping[str, Any]


def read_plan(folder: Path, query: str, spec: Mapping[str, Any], states: Any) -> Plan:
    """Return the plan of a query. Errors: B240 where it is malformed or fits no manifest."""
    path = inside(folder, str(spec["graph"]))
    reader = _Reader(str(path))
    try:
        found = json.loads(read_bounded(path, MAX_PLAN_BYTES, "B240").decode("utf-8"))
    except (ValueError, RecursionError):
        raise reader.error("it is not JSON") from None
    except OSError as e:
        raise reader.error(f"it cannot be read: {e.strerror}") from None
    reader.need(isinstance(found, dict), "it is not an object")
    reader.version(found.get("version"))
    batch = int(spec.get("batch", 0))
    reader.need(found.get("batch") == batch, "it is for another batch than the manifest's")
    for key in ("arch", "cubin", "weights"):
        reader.need(isinstance(found.get(key), str), f"{key!r} is no text")
    reader.need(ARCH.fullmatch(found["arch"]) is not None, "'arch' is no architecture")
    divided = found.get("multiprocessors")
    if divided is not None:
        reader.integer(divided, 1, MAX_PROCESSORS, "'multiprocessors'")
    room = inside(folder, found["weights"]).stat().st_size
    scratch = reader.integer(found.get("scratch_bytes"), 0, MAX_BYTES, "'scratch_bytes'")
    buffers = reader.listed(found.get("buffers"), "'buffers'", reader.buffer)
    launches = reader.listed(found.get("launches"), "'launches'", reader.launch)
    for b in buffers:
        end = {"weight": room, "scratch": scratch}.get(b.kind)
        reader.need(end is None or b.offset + b.bytes <= end, f"{b.name[:60]!r} lies outside")
    reader.need(all(i < len(buffers) for x in launches for i in x.args), "an argument is no buffer")
    reader.need(len({b.name for b in buffers}) == len(buffers), "two buffers have one name")
    reader.fits(buffers, {i for x in launches for i in x.args}, spec, states, batch)
    return Plan(found["arch"], divided or 0, found["cubin"], found["weights"], scratch,
                tuple(buffers), tuple(launches), found)  # fmt: skip


class _Reader:
    """Checks the parts of one plan."""

    def __init__(self, at: str) -> None:
        self.at = at

    def error(self, what: str) -> PccError:
        hint = "it is damaged, or was not written by this release: compile the bundle again"
        return PccError("B240", f"the plan is malformed: {what}", at=self.at, hint=hint)

    def need(self, ok: object, what: str) -> None:
        if not ok:
            raise self.error(what)

    def version(self, value: object) -> None:
        self.need(type(value) is int, "it has no version")
        if value != VERSION:
            what = f"the plan has format {str(value)[:20]}, this pcc runs {VERSION}"
            hint = "use the release that wrote the bundle, or compile it again"
            raise PccError("X307", what, at=self.at, hint=hint)

    def integer(self, value: object, low: int, high: int, what: str) -> int:
        self.need(type(value) is int and low <= value <= high, f"{what} is out of range")
        assert isinstance(value, int)
        return value

    def listed(self, values: object, what: str, read: Callable[[Any], Any]) -> list[Any]:
        self.need(isinstance(values, list) and len(values) <= MAX_LISTED, f"{what} is no list")
        assert isinstance(values, list)
        self.need(all(isinstance(v, dict) for v in values), f"{what} holds no objects")
        return [read(v) for v in values]

    def buffer(self, b: Mapping[str, Any]) -> Buffer:
        name, kind, shape = b.get("name"), b.get("kind"), b.get("shape")
        self.need(isinstance(name, str) and kind in KINDS, "a buffer has no name or kind")
        what = f"buffer {str(name)[:60]!r}"
        dtype = b.get("dtype")
        known = isinstance(dtype, str) and dtype in ITEM
        self.need(known and isinstance(shape, list), f"{what} has no type")
        sizes = [self.integer(d, 0, MAX_BYTES, f"{what}: its shape") for d in shape or ()]
        self.need(len(sizes) < 17, f"{what} has too many axes")
        size = math.prod(sizes) * ITEM[str(dtype)]
        self.need(b.get("bytes") == size <= MAX_BYTES, f"{what} has other bytes than its shape")
        offset = self.integer(b.get("offset"), 0, MAX_BYTES, f"{what}: its offset")
        aligned = kind not in ("weight", "scratch") or offset % 16 == 0
        self.need(aligned, f"{what} is not aligned")
        zero = b.get("zero", False)
        self.need(type(zero) is bool, f"{what}: 'zero' is no truth value")
        return Buffer(str(name), str(kind), str(dtype), size, offset, zero)

    def launch(self, x: Mapping[str, Any]) -> Launch:
        name = x.get("kernel")
        self.need(isinstance(name, str) and NAME.fullmatch(name), "a launch has no kernel")
        what = f"launch of {name}"
        grid = self.triple(x.get("grid"), MAX_GRID, f"{what}: its grid")
        self.need(math.prod(grid) <= MAX_BLOCKS, f"{what} has too many blocks")
        block = self.triple(x.get("block"), (MAX_THREADS, MAX_THREADS, 64), f"{what}: its block")
        self.need(math.prod(block) <= MAX_THREADS, f"{what} has too many threads")
        shared = self.integer(x.get("shared", 0), 0, MAX_SHARED, f"{what}: its shared memory")
        flags = x.get("cooperative", False), x.get("overlap", False)
        self.need(all(type(f) is bool for f in flags), f"{what}: a switch is no truth value")
        args = x.get("args")
        self.need(isinstance(args, list) and len(args) <= MAX_ARGS, f"{what} has no arguments")
        indices = [self.integer(i, 0, MAX_LISTED, f"{what}: an argument") for i in args or ()]
        return Launch(str(name), grid, block, shared, flags[0], flags[1], tuple(indices))

    def triple(self, value: Any, most: tuple[int, int, int], what: str) -> tuple[int, int, int]:
        self.need(isinstance(value, list) and len(value) == 3, f"{what} has not three sizes")
        x, y, z = (self.integer(v, 1, m, what) for v, m in zip(value, most, strict=True))
        return x, y, z

    def fits(
        self, buffers: list[Buffer], used: set[int], spec: Mapping[str, Any], states: Any,
        batch: int,
    ) -> None:  # fmt: skip
        """Need that what the caller binds is what the manifest says, and that launches make it."""
        want, made = self.bound(spec, states, batch)
        for b in buffers:
            if b.kind in ("input", "output", "state"):
                same = want.get(b.name) == (b.kind, b.dtype, b.bytes)
                self.need(same, f"{b.name[:60]!r} is not what the manifest says")
        there = {buffers[i].name for i in used if buffers[i].kind in ("output", "state")}
        lost = sorted(made - there)
        self.need(not lost, f"no launch writes {(lost or [''])[0][:60]!r}")

    def bound(
        self, spec: Mapping[str, Any], states: Any, batch: int
    ) -> tuple[dict[str, tuple[str, str, int]], set[str]]:
        """Return kind, type and bytes of what the caller binds, and the names of what is made."""
        want: dict[str, tuple[str, str, int]] = {}
        whole = {s["name"] for s in states if s["rows_axis"] is not None}
        sizes = {s["name"]: s["shape"] for s in states}
        made, given = set(), {i["name"] for i in spec["inputs"]}
        for name, io in arrays(spec):
            shape, is_input = io["shape"], name in given
            role, _, state = name.partition(".")
            kind = "input" if is_input else "output"
            if role in ("past", "present") and state in sizes:
                name, kind = state if state in whole else name, "state"
                shape = ["B", *sizes[state]]
            size = math.prod(fixed({"shape": shape}, batch)) * ITEM[io["dtype"]]
            self.need(want.get(name, (kind, io["dtype"], size)) == (kind, io["dtype"], size),
                      f"{name[:60]!r} is two things in the manifest")  # fmt: skip
            want[name] = kind, io["dtype"], size
            if not is_input:
                made.add(name)
        return want, made
