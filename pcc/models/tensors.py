"""The tensors of a model folder: `model.safetensors`, or shards behind an index. One at a time.

Large matrices are not read here: they stay places in their file (`pcc.models.matrix`).

The files are hostile until proven otherwise: headers are bounded, extents are checked against the
file, shard names may not leave the folder, nothing is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.frontends.coded import STREAMS, Streams
from pcc.frontends.rows import BITS, SCALE, integers, packed_width, restore
from pcc.frontends.state import one_line, read_header, read_tensor
from pcc.ir.recipe import named
from pcc.knobs import LAZY_ELEMENTS, MAX_CONFIG_BYTES
from pcc.models.matrix import Matrix

Values = np.ndarray[Any, Any]
FLOATS = ("F64", "F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY = "copy the model folder again"


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a JSON mapping of bounded size. Errors: M101 (missing), M102 (not such a file)."""
    try:
        found = json.loads(read_bounded(path, limit, "M102").decode("utf-8"))
    except FileNotFoundError:
        hint = "a model folder holds config.json beside model.safetensors or its shards"
        raise PccError("M101", "the file is missing", at=str(path), hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        what = f"not readable as JSON: {one_line(error)}"
        raise PccError("M102", what, at=str(path), hint=COPY) from None
    if not isinstance(found, dict):
        raise PccError("M102", "does not hold a mapping", at=str(path), hint=COPY)
    return found


class Source(Protocol):
    """Where a reader takes a model's tensors from, by name."""

    @property
    def folder(self) -> Path:
        """What errors call it."""
        ...

    @property
    def left(self) -> set[str]:
        """Tensors that nothing has taken yet."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str, *shape: int) -> Values:
        """Return a tensor of this shape as f32."""
        ...

    def matrix(self, name: str, *shape: int) -> Values | Matrix:
        """Return a tensor `[K, D]`, unread if it is large."""
        ...

    def skip(self, *names: str) -> None:
        """Let tensors go unread."""
        ...

    def close(self) -> None:
        """Refuse what was not taken."""
        ...


class Tensors:
    """Named tensors of a folder, read when taken; `close` says which were left.

    Errors: M103 (missing shard), M104 (tensor missing), M105 (shape), M106 (extra tensors),
    M107 (NaN or infinity), F104 and F106 (broken file), F113 (scales or streams that do not fit).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, int, tuple[str, tuple[int, ...], int]]] = {}
        self.left: set[str] = set()
        self.coded: dict[str, Streams] = {}  # each said once: it may be as long as its rows
        listed = self._listed()
        for file in sorted(set(listed.values())) if listed else [SINGLE]:
            self._open(folder / file, {k for k, v in listed.items() if v == file})

    def _listed(self) -> dict[str, str]:
        """Return which file holds which tensor, by the index; empty without one."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise PccError("M102", "the index has no weight_map", at=str(path), hint=COPY)
        for name, file in listed.items():
            plain = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
            if not plain:
                what = f"{name!r} is said to be in {file!r}, no file name"
                raise PccError("M102", what, at=str(path), hint=COPY)
        return listed

    def _open(self, path: Path, expected: set[str]) -> None:
        if not path.is_file():
            some = f"; it holds {len(expected)} tensors" if expected else ""
            what = f"the weight file {path.name!r} is missing{some}"
            raise PccError("M103", what, at=str(self.folder), hint=COPY)
        base, entries = read_header(path)
        if gone := sorted(expected - set(entries)):
            what = f"the index says it holds {gone[0]!r}, but it does not"
            raise PccError("M104", what, at=str(path), hint=COPY)
        for name, entry in entries.items():
            if name in self.places:
                other = self.places[name][0].name
                what = f"{name!r} is also in {other}"
                raise PccError("M106", what, at=str(path), hint=COPY)
            self.places[name] = (path, base, entry)
            self.left.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it (of rows of integers: of what they hold)."""
        self._require(name)
        dtype, shape, _ = self.places[name][2]
        if self._coded(name):
            return self._streams(name).shape
        if dtype != "U8" or not self._rows(name) or not shape:
            return shape
        return (*shape[:-1], packed_width(shape[-1], self._bits(name)))

    def _rows(self, name: str) -> bool:
        """Report whether a tensor is stored as rows of integers with scales."""
        return self.places[name][2][0] in ("I8", "U8") and name + SCALE in self.places

    def _coded(self, name: str) -> bool:
        """Report whether these rows are streams."""
        coded = self.places[name][2][0] == "U8" and name + STREAMS in self.places
        return coded and self._rows(name)

    def _beside(self, name: str) -> list[str]:
        """Return the names of what belongs to a tensor's rows of integers."""
        if not self._rows(name):
            return []
        packed = self.places[name][2][0] == "U8"
        ends = (SCALE, STREAMS) if self._coded(name) else (SCALE, BITS) if packed else (SCALE,)
        return [name + end for end in ends if name + end in self.places]

    def _bits(self, name: str) -> int:
        """Return `T.bits`, 0 where there is no such scalar."""
        path, base, entry = self.places.get(name + BITS, (self.folder, 0, ("", (1,), 0)))
        return int(read_tensor(path, base, *entry).item()) if entry[:2] == ("U8", ()) else 0

    def _streams(self, name: str) -> Streams:
        """Return how coded rows are stored. Errors: F113."""
        if name not in self.coded:
            path, _, (_, stored, _) = self.places[name]
            scales, fields = self.places[name + SCALE][2][1], self._stored(name + STREAMS)
            self.coded[name] = Streams.of(stored, scales, fields, f"{path}:{name}")
        return self.coded[name]

    def _value(self, name: str, start: int = 0, stop: int | None = None) -> Values:
        """Return a tensor, or some of its rows, read; rows of integers times their scales."""
        if not self._rows(name):
            return self._stored(name, start, stop)
        at = f"{self.places[name][0]}:{name}"
        if self._coded(name):
            streams = self._streams(name)
            rows = streams.rows(lambda i, j: self._stored(name, i, j), start, stop)
        else:
            bits = np.array(self._bits(name), np.uint8)
            rows = integers(self._stored(name, start, stop), bits, at)
        return restore(rows, self._stored(name + SCALE, start, stop), at)

    def _stored(self, name: str, start: int = 0, stop: int | None = None) -> Values:
        """Return what lies in the file, or the part of it along the first axis."""
        path, base, (dtype, shape, begin) = self.places[name]
        if stop is None:
            return read_tensor(path, base, dtype, shape, begin)
        return read_tensor(path, base, dtype, shape, begin, start, stop)

    def take(self, name: str, *shape: int) -> Values:
        """Return a tensor as f32, which must have this shape. Every call reads it anew."""
        self._check(name, shape)
        return self._finite(name, self._value(name))

    def matrix(self, name: str, *shape: int) -> Values | Matrix:
        """Return a tensor `[K, D]` as `take` does, or as its place in the file where it is large.

        What it holds is then checked while it is read (M107).
        """
        rows, width = shape
        self._check(name, shape)
        if rows * width < LAZY_ELEMENTS:
            return self._finite(name, self._value(name))

        def read(start: int, stop: int) -> Values:
            return self._finite(name, self._value(name, start, stop))

        path = self.places[name][0]
        return Matrix(self._identity(name), (rows, width), read, f"{path}:{name}")

    def _identity(self, name: str) -> str:
        """Name a tensor by its file, as it is now, and the tensor's place there."""
        parts: list[object] = []
        for key in (name, *self._beside(name)):
            path, base, entry = self.places[key]
            now = path.stat()
            parts += [str(path.resolve()), now.st_size, now.st_mtime_ns, base, entry]
        return named("tensor", *parts)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is missing or other than asked for; else count it as used."""
        self._require(name)
        path, _, entry = self.places[name]
        found = self.shape(name)
        if found != shape:
            what = f"{name!r} has shape {list(found)}, but config.json asks for {list(shape)}"
            hint = "the configuration and the weights belong to different models"
            raise PccError("M105", what, at=str(path), hint=hint)
        if entry[0] not in FLOATS and not self._rows(name):
            what = f"{name!r} holds {entry[0]}, not floating-point numbers"
            hint = f"read are fp32, fp16, bf16, and rows of integers with {name + SCALE!r}"
            raise PccError("M105", what, at=str(path), hint=hint)
        self.left -= {name, *self._beside(name)}

    def _finite(self, name: str, found: Values) -> Values:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            value = np.asarray(found, np.float32)
        if not np.isfinite(value).all():
            what, path = f"{name!r} holds NaN or infinity", self.places[name][0]
            raise PccError("M107", what, at=str(path), hint="get the weights from their publisher")
        return value

    def skip(self, *names: str) -> None:
        """Let tensors go unread: they hold nothing that is not in config.json."""
        self.left.difference_update(names)

    def close(self) -> None:
        """Refuse a folder with tensors that the architecture does not have."""
        if self.left:
            some = ", ".join(sorted(self.left)[:4])
            what = f"{len(self.left)} tensors are not part of this architecture: {some}"
            hint = "config.json names another model type or fewer layers than the weights have"
            raise PccError("M106", what, at=str(self.folder), hint=hint)

    def _require(self, name: str) -> None:
        if name not in self.places:
            hint = "config.json and the weights belong to different models, or a shard is missing"
            what = f"the tensor {name!r} is missing"
            raise PccError("M104", what, at=str(self.folder), hint=hint)
