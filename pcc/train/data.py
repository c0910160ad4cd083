"""Bytes of documents, packed: [BOS doc EOS BOS doc EOS ..], and the rows that training draws.

A row is BOS and T - 1 consecutive ids from anywhere in the stream; what it holds depends on (seed,
step) alone, so that a resumed run reads what the uninterrupted one would have read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.arrays import read_npz
from pcc.train.backbone import BOS, EOS

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Packed:
    """The stream u16[M] and the document each position belongs to, i32[M]."""

    stream: Ids
    document: Ids
    names: tuple[str, ...]
    sha256: str

    def rows(self, seed: int, step: int, count: int, length: int) -> tuple[Ids, Ids]:
        """Return ids i64[count, length] and documents i64; a pure function of its arguments."""
        rng = np.random.default_rng([seed, step])
        room = len(self.stream) - (length - 1)
        if room < 1:
            what = f"{len(self.stream)} ids are too few for rows of {length}"
            raise PccError("N140", what, hint="train on more text, or set data.length lower")
        at = rng.integers(room, size=count)[:, None] + np.arange(length - 1)
        ids = np.concatenate([np.full((count, 1), BOS), self.stream[at]], 1)
        documents = self.document[at]
        return ids, np.concatenate([documents[:, :1], documents], 1).astype(np.int64)


def pack(documents: Mapping[str, bytes]) -> Packed:
    """Join documents in the given order."""
    parts, owner = [], []
    for i, data in enumerate(documents.values()):
        body = np.frombuffer(data, np.uint8).astype(np.uint16)
        parts.append(np.concatenate([[BOS], body, [EOS]]).astype(np.uint16))
        owner.append(np.full(len(parts[-1]), i, np.int32))
    if not parts:
        raise PccError("N140", "there is no text to train on")
    stream = np.concatenate(parts)
    mark = hashlib.sha256(stream.tobytes()).hexdigest()
    return Packed(stream, np.concatenate(owner), tuple(documents), mark)


def read_paths(paths: Iterable[str], suffix: str = "") -> dict[str, bytes]:
    """Return name -> bytes of files, and of all files below folders that end in `suffix`."""
    out: dict[str, bytes] = {}
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise PccError("N141", "the file or folder does not exist", at=text)
        found = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
        for file in found:
            if file.is_file():
                data = file.read_bytes()
                if data:
                    out[str(file)] = data
    return out


def save_packed(path: Path, train: Mapping[str, bytes], heldout: Mapping[str, bytes]) -> None:
    """Write documents as plain arrays (no pickles): bytes, lengths, names."""
    arrays: dict[str, Ids] = {}
    for part, documents in (("train", train), ("heldout", heldout)):
        arrays[f"{part}.bytes"] = np.frombuffer(b"".join(documents.values()), np.uint8)
        arrays[f"{part}.lengths"] = np.array([len(d) for d in documents.values()], np.int64)
        arrays[f"{part}.names"] = np.array(list(documents), np.str_)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_packed(path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Read (train, held out) documents. Errors: C110, C111, N142."""
    arrays = read_npz(path)
    out = []
    for part in ("train", "heldout"):
        try:
            raw = arrays[f"{part}.bytes"].tobytes()
            ends = np.cumsum(arrays[f"{part}.lengths"]).tolist()
            names = [str(v) for v in arrays[f"{part}.names"]]
        except KeyError as e:
            raise PccError("N142", f"not a packed data file: no {e}", at=str(path)) from None
        starts = [0, *ends[:-1]]
        if len(names) != len(ends) or (ends and ends[-1] != len(raw)):
            raise PccError("N142", "lengths do not fit the bytes", at=str(path))
        out.append({n: raw[a:b] for n, a, b in zip(names, starts, ends, strict=True)})
    return out[0], out[1]


# --- near duplicates ---------------------------------------------------------------------------

_BASE = np.uint64(0x9E3779B97F4A7C15)


def shingles(data: bytes, size: int) -> Ids:
    """Return a 64-bit hash of each run of `size` bytes, at every offset."""
    x = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    count = len(x) - size + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    # Doubling: the hash of 2^k bytes comes from two of 2^(k-1); the rest is put together likewise.
    with np.errstate(over="ignore"):
        whole, done, power, width = np.zeros(count, np.uint64), 0, _BASE, 1
        while True:
            if size & width:
                whole = whole * power + x[done : done + count]
                done += width
            if done == size:
                return whole ^ (whole >> np.uint64(29))
            x = x[:-width] * power + x[width:]
            power, width = power * power, 2 * width


def blocks(data: bytes) -> list[bytes]:
    """Cut a file before each line that begins a top-level def, class or decorator."""
    out: list[bytes] = []
    current: list[bytes] = []
    for line in data.splitlines(keepends=True):
        if line.startswith((b"def ", b"class ", b"@", b"async def ")) and current:
            if not current[-1].startswith(b"@"):
                out.append(b"".join(current))
                current = []
        current.append(line)
    return [*out, b"".join(current)] if current else out


def remove_near_duplicates(
    heldout: Mapping[str, bytes], train: Iterable[bytes], size: int = 48, share: float = 0.25
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Drop each top-level block of which `share` or more of the shingles occur in `train`.

    Returns what is left, and how many bytes of each file went.
    """
    cut = {name: blocks(data) for name, data in heldout.items()}
    each = [shingles(b, size) for bs in cut.values() for b in bs]
    mine, seen = _found(np.concatenate([*each, np.zeros(0, np.uint64)]), train, size)
    kept: dict[str, bytes] = {}
    gone: dict[str, int] = {}
    for name, bs in cut.items():
        stay = [b for b in bs if _share(b, size, mine, seen) < share]
        kept[name] = b"".join(stay)
        gone[name] = len(heldout[name]) - len(kept[name])
    return {k: v for k, v in kept.items() if v}, {k: v for k, v in gone.items() if v}


def shared(rows: Iterable[bytes], train: Iterable[bytes], size: int = 48) -> Ids:
    """Return the share of each text's shingles that occur in `train`, f64 in 0..1."""
    mine = [shingles(row, size) for row in rows]
    known, seen = _found(np.concatenate([*mine, np.zeros(0, np.uint64)]), train, size)
    at = (np.searchsorted(known, m) for m in mine)
    return np.array([seen[i].mean() if len(i) else 0.0 for i in at])


def _found(mine: Ids, train: Iterable[bytes], size: int) -> tuple[Ids, Ids]:
    """Return the distinct hashes in order, and which of them occur in `train`."""
    mine = np.unique(mine)
    seen = np.zeros(len(mine), bool)
    for data in train:
        theirs = shingles(data, size)
        if len(mine) and len(theirs):
            at = np.minimum(np.searchsorted(mine, theirs), len(mine) - 1)
            seen[at[mine[at] == theirs]] = True
    return mine, seen


def _share(block: bytes, size: int, known: Ids, seen: Ids) -> float:
    mine = shingles(block, size)
    return float(seen[np.searchsorted(known, mine)].mean()) if len(mine) else 0.0


def prompts(documents: Mapping[str, bytes], count: int, length: int, seed: int) -> Ids:
    """Return `count` rows [BOS, length - 1 bytes] of held-out text that start at a line's start.

    Offsets are spread evenly over all documents, then moved to the next line.
    """
    pieces = [d for d in documents.values() if len(d) >= 2 * length]
    total = sum(len(d) - 2 * length + 1 for d in pieces)
    if total < count:
        what = f"the held-out text has room for {total} prompts of {length} bytes, not {count}"
        raise PccError("N143", what, hint="hold out more text, or set run.eval_prompts lower")
    shift = np.random.default_rng(seed).random()
    rows = []
    for i in range(count):
        at = int((i + shift) * total / count)
        for d in pieces:
            room = len(d) - 2 * length + 1
            if at < room:
                line = d.find(b"\n", at, at + length) + 1
                rows.append([BOS, *d[line or at :][: length - 1]])
                break
            at -= room
    return np.array(rows, np.int64)
