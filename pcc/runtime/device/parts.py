"""A query as several TensorRT engines, one after the other (`parts` of the manifest).

The verifier's pass is one engine for every query, with an optimisation profile for each number of
tokens; what follows the pass is the query's own. What one hands to the next lies in buffers that
the query owns. A *table* is an input that depends on the profile only; the bundle has its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pcc.errors import PccError
from pcc.knobs import MAX_ROW_ELEMENTS
from pcc.runtime.device.executor import arrays, bytes_of
from pcc.runtime.device.handles import Memory
from pcc.runtime.dtypes import STORED
from pcc.variants import TABLE_ALIGN

if TYPE_CHECKING:
    from pcc.runtime.device.driver import Device
    from pcc.runtime.device.tensorrt import Opener, TensorRtExecutor

MAX_PARTS, MAX_TABLES, MAX_PROFILES = 1024, 256, 256
MAX_TABLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    """One engine of a query. `profile`: None where its shapes are fixed.

    `spec` has inputs and outputs as a query has; `names`: the query's name of an array, by the
    engine's; `tables`: offset in `file` and bytes, by name.
    """

    graph: str
    profile: int | None
    spec: Mapping[str, Any]
    names: Mapping[str, str]
    tables: Mapping[str, tuple[int, int]]
    file: str


def parts_of(spec: Mapping[str, Any], query: str, manifest: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a query, none where it is one engine. Errors: B215."""
    listed = spec.get("parts")
    if listed is None:
        return []
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_PARTS:
        raise _malformed(query, "'parts' is no list")
    return [_part(p, query, spec, manifest["files"]) for p in listed]


def _malformed(query: str, what: str) -> PccError:
    hint = "it is damaged, or was not written by pcc"
    return PccError("B215", f"the manifest's parts of {query[:60]!r}: {what}", hint=hint)


def _part(p: Any, query: str, whole: Mapping[str, Any], files: Mapping[str, str]) -> Part:
    def need(ok: object, what: str) -> None:
        if not ok:
            raise _malformed(query, what)

    need(isinstance(p, dict), "one is no object")
    need(isinstance(p.get("graph"), str) and p["graph"] in files, "an engine is no file of it")
    profile = p.get("profile")
    known = profile is None or (type(profile) is int and 0 <= profile < MAX_PROFILES)
    need(known, "a profile is out of range")
    for key in ("inputs", "outputs"):
        values = p.get(key)
        need(isinstance(values, list) and all(_plain(v, key) for v in values), f"its {key}")
    names = p.get("arrays")
    texts = isinstance(names, dict) and all(isinstance(v, str) for v in names.values())
    need(texts, "'arrays' is no table of names")
    tables, file = p.get("tables", []), p.get("file", "")
    need(isinstance(tables, list) and len(tables) <= MAX_TABLES, "'tables' is no list")
    need(not tables or (isinstance(file, str) and file in files), "tables have no file")
    need(all(_is_table(t) for t in tables), "a table is out of range, or not aligned")
    spec = {"inputs": p["inputs"], "outputs": p["outputs"], "batch": whole.get("batch", 1)}
    placed = {t["name"]: (t["offset"], t["bytes"]) for t in tables}
    each = [name for name, _ in arrays(spec)] + list(placed)
    need(len(set(each)) == len(each) == len(arrays(spec)) + len(tables), "two arrays have one name")
    return Part(p["graph"], profile, spec, names, placed, str(file))


def _plain(v: Any, key: str) -> bool:
    """Whether an input or output has name, type and sizes."""
    if not isinstance(v, dict) or not isinstance(v.get("name"), str):
        return False
    shape = v.get("shape")
    if key == "outputs" and not isinstance(v.get("onnx"), str):
        return False
    if v.get("dtype") not in tuple(STORED) or not isinstance(shape, list) or len(shape) > 16:
        return False
    sizes = [d for d in shape if d not in ("B", "Bc")]
    plain = all(type(d) is int and d >= 0 for d in sizes)
    return plain and math.prod(sizes) <= MAX_ROW_ELEMENTS


def _is_table(t: Any) -> bool:
    if not isinstance(t, dict) or not isinstance(t.get("name"), str):
        return False
    at, size = t.get("offset"), t.get("bytes")
    inside = all(type(x) is int and 0 <= x <= MAX_TABLE_BYTES for x in (at, size))
    return inside and int(at or 0) % TABLE_ALIGN == 0


class PartsExecutor:
    """The engines of a query in their order (`pcc.runtime.device.executor.Executor`)."""

    def __init__(
        self, opener: Opener, query: str, spec: Mapping[str, Any], parts: Sequence[Part]
    ) -> None:
        self.opener, self.query = opener, query
        self.runs: list[TensorRtExecutor] = []
        self.takes: dict[str, list[tuple[TensorRtExecutor, str]]] = {}
        self.between: dict[str, tuple[Memory, str]] = {}  # with their types
        self.spec, self.own = spec, dict(arrays(spec))
        self.given = {i["name"] for i in spec["inputs"]}  # grows by what each part gives
        for part in parts:
            self._add(part)
        if lost := sorted({o["onnx"] for o in spec["outputs"]} - self.given):
            raise _malformed(query, f"none gives {lost[0][:60]!r}")

    def _add(self, part: Part) -> None:
        """Open an engine, and bind what is not the caller's."""
        run = self.opener.part(part, self.query)
        reads = {i["name"] for i in part.spec["inputs"]}
        for local, io in arrays(part.spec):
            name = part.names.get(local, local)
            self._once(name, reads=local in reads)
            if name in self.own:
                self._fitting(name, io["dtype"], run.sizes[local])
                self.takes.setdefault(name, []).append((run, local))
            else:
                run.bind(local, self._between(name, io["dtype"], run.sizes[local]))
        for local, (offset, size) in part.tables.items():
            memory = self.opener.tables(part.file)
            if offset + size > memory.bytes:
                raise _malformed(self.query, f"table {local[:60]!r} lies outside its file")
            run.bind(local, memory.address + offset)
        self.runs.append(run)

    def _once(self, name: str, *, reads: bool) -> None:
        """Need that what a part reads is there, and that what it gives is given once."""
        if reads != (name in self.given):
            what = "nothing gives" if reads else "something else gives"
            raise _malformed(self.query, f"{what} {name[:60]!r}")
        self.given.add(name)

    def _fitting(self, name: str, dtype: str, size: int) -> None:
        """Need that an engine takes of the caller's array what the query says that it is."""
        io, batch = self.own[name], int(self.spec.get("batch", 1))
        if (io["dtype"], bytes_of(io, batch, self.opener.manifest)) != (dtype, size):
            what = f"{name[:60]!r} is not of the query's type and size"
            raise _malformed(self.query, what)

    def _between(self, name: str, dtype: str, size: int) -> int:
        """Return where what one engine hands to the next lies."""
        if name not in self.between:
            self.between[name] = Memory(self.opener.device, size), dtype
        memory, kind = self.between[name]
        if (memory.bytes, kind) != (size, dtype):
            raise _malformed(self.query, f"{name[:60]!r} has unlike sizes")
        return memory.address

    def bind(self, name: str, address: int) -> None:
        """Say where an array lies on the device; inputs that no engine reads are of no meaning."""
        if name not in self.own:
            raise PccError("R102", f"'{self.query}' has no array {name[:60]!r}")
        for run, local in self.takes.get(name, ()):
            run.bind(local, address)

    def enqueue(self, stream: int) -> None:
        """Enqueue the engines."""
        for run in self.runs:
            run.enqueue(stream)


def select(
    engine: Any, context: Any, profile: int, device: Device, stream: int, query: str
) -> None:
    """Give a context its profile, of which every input has one shape, and let it infer the rest.

    A context's shapes are known once those of all inputs are. Errors: X334.
    """
    count = int(engine.num_optimization_profiles)
    if profile >= count:
        what = f"the engine of '{query}' has {count} profiles, not number {profile}"
        raise PccError("X334", what)
    if not context.set_optimization_profile_async(profile, stream):
        raise PccError("X334", f"the engine of '{query}' refuses profile {profile}")
    device.wait(stream)  # what the profile needs may be copied there
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        if not is_input or all(d >= 0 for d in engine.get_tensor_shape(name)):
            continue
        least, best, most = map(tuple, engine.get_tensor_profile_shape(name, profile))
        if not least == best == most:
            what = f"{name!r} of '{query}' has sizes {least} to {most} in profile {profile}"
            raise PccError("X334", what)
        if not context.set_input_shape(name, best):
            raise PccError("X334", f"the engine of '{query}' refuses the shape of {name!r}")
    _infer(context, profile, query)


def _infer(context: Any, profile: int, query: str) -> None:
    """Let a context infer its shapes. Errors: X334 where they do not follow from the inputs'."""
    try:
        lacking = list(context.infer_shapes())
    except RuntimeError as e:
        why = " ".join(str(e).split())[:200]
        what = f"the engine of '{query}' has no shapes in profile {profile}: {why}"
        raise PccError("X334", what) from None
    if lacking:
        what = f"the engine of '{query}' wants more of {lacking[0]!r} than its shape"
        raise PccError("X334", what)
