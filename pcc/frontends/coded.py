"""Rows of integers as an entropy code: q i8[F, .., K] in fewer bytes, and rows can be read alone.

q is R rows of K numbers. They lie in groups of `lead` rows, one group after another:
1  a group is a row of q, in order;
F  group m is q[0, m], .., q[F-1, m] (m: the axes between), each but the first less the one before,
   modulo 256: tables of neighbouring slots of a draft are alike.
Stored are `T` u8[bytes] and `T.streams` i32[3 + S] = K, lead, groups in a stream, bytes of each
stream. A stream is zlib's (RFC 1950, so with a checksum) of whole groups, a byte for each number,
literals alone: a number takes a bit or more, which is checked before anything is inflated. Tensors
of a file share no bytes (`pcc.frontends.state`), so all that comes out of it is at most 8 times as
large as the file, and 32 times as float32.
A stream holds 2^20 numbers at most, or one group, and lead is 1 for matrices: blocks of rows are
read in the memory of a stream, and each stream is inflated once while they are read in order.

Of weights there is no more to gain: over all shipped rows Huffman codes are within 2 % of the
entropy by rows and columns, and as small as LZMA, which takes ten times as long to read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcc.errors import PccError

Array = np.ndarray[Any, Any]
STREAMS = ".streams"
DENSEST = 8  # numbers in a byte of a Huffman code
_FIELDS = 3  # before the streams' sizes
_STREAM = 1 << 16  # numbers in a stream: few enough to read a matrix by blocks of rows
_LARGEST = 1 << 20  # numbers in a stream that is read, of more than one group
_MEMORY = (5, 7, 9)  # zlib's: how many numbers share a code; what is smallest depends on the rows


@dataclass(frozen=True)
class Streams:
    """How rows q i8[shape] are stored: groups of `lead` rows, `many` to a stream.

    Stream s takes bytes `ends[s]` to `ends[s+1]` of the stored tensor; `at` is what errors call it.
    `kept`: the stream within which the last rows ended, inflated; the next rows begin there.
    """

    shape: tuple[int, ...]
    lead: int
    many: int
    ends: Array
    at: str
    kept: dict[int, Array] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, stored: tuple[int, ...], scales: tuple[int, ...], fields: Array, at: str
    ) -> Streams:
        """Return what `T.streams` says of `T` u8[stored] with scales of this shape.

        Errors: F113 (streams that do not fit the tensor or its scales).
        """

        def bad(what: str) -> PccError:
            return PccError("F113", what, at=f"{at}{STREAMS}", hint="store the tensor again")

        if fields.dtype != np.int32 or fields.ndim != 1 or len(fields) <= _FIELDS:
            raise bad(f"{fields.dtype} {list(fields.shape)}, not I32 of more than {_FIELDS}")
        if len(stored) != 1 or not scales or not math.prod(scales):
            raise bad(f"streams {list(stored)} for scales {list(scales)}")
        if (fields < 1).any():
            raise bad("a number below 1")
        width, lead, many = (int(v) for v in fields[:_FIELDS])
        ends = np.concatenate([[0], np.cumsum(fields[_FIELDS:], dtype=np.int64)])
        if lead not in (1, scales[0] if len(scales) > 1 else 1):
            raise bad(f"groups of {lead} rows, of scales {list(scales)}")
        groups = math.prod(scales) // lead
        if (most := lead * min(many, groups) * width) > max(_LARGEST, lead * width):
            raise bad(f"{most} numbers in a stream, of at most {_LARGEST} or one group")
        if len(ends) - 1 != -(-groups // many) or ends[-1] != stored[0]:
            what = f"{len(ends) - 1} streams of {ends[-1]} bytes"
            raise bad(f"{what}, {groups} groups by {many} in {stored[0]} bytes")
        count = groups * lead * width
        if count > DENSEST * stored[0]:
            raise bad(f"{count} numbers in {stored[0]} bytes")
        return cls((*scales, width), lead, many, ends, at)

    def rows(
        self, read: Callable[[int, int], Array], start: int = 0, stop: int | None = None
    ) -> Array:
        """Return q[start:stop]; `read(i, j)` returns bytes i..j-1 of `T`. Errors: F104.

        Every reading of one `Streams` is of the same `T`.
        """
        inner = math.prod(self.shape[1:-1])
        stop = self.shape[0] if stop is None else stop
        groups = self.shape[0] * inner // self.lead
        first, last = (start * inner, stop * inner) if self.lead == 1 else (0, groups)
        begin, end = first // self.many, -(-last // self.many)
        base = begin * self.many
        held = np.empty((min(end * self.many, groups) - base, self.lead, self.shape[-1]), np.uint8)
        made = self.kept.copy()
        self.kept.clear()
        for s in range(begin, end):
            part = held[s * self.many - base : (s + 1) * self.many - base]
            if s not in made:
                data = read(int(self.ends[s]), int(self.ends[s + 1]))
                made = {s: _inflate(data, part.size, self.at)}
            part.reshape(-1)[:] = made[s]
        if begin < end and base + len(held) > last:
            self.kept[end - 1] = made[end - 1]
        held = held[first - base : last - base]
        if self.lead == 1:
            return held.view(np.int8).reshape(stop - start, *self.shape[1:])
        np.cumsum(held, axis=1, dtype=np.uint8, out=held)
        whole = np.moveaxis(held, 1, 0)[start:stop]
        return np.ascontiguousarray(whole).view(np.int8).reshape(stop - start, *self.shape[1:])


def encode(rows: Array) -> tuple[Array, Array]:
    """Return rows i8[F, .., K], not empty, as (`T` u8[bytes], `T.streams`): the smaller form."""
    leads = {1, len(rows)} if rows.ndim > 2 else {1}
    return min((_encoded(rows, lead) for lead in sorted(leads)), key=lambda made: len(made[0]))


def _encoded(rows: Array, lead: int) -> tuple[Array, Array]:
    """Return both tensors for groups of `lead` rows."""
    width = rows.shape[-1]
    held = np.moveaxis(rows.view(np.uint8).reshape(lead, -1, width), 0, 1)
    groups = np.diff(held, axis=1, prepend=np.uint8(0))  # modulo 256
    many = max(1, _STREAM // (lead * width))
    streams = [_deflate(groups[i : i + many].tobytes()) for i in range(0, len(groups), many)]
    fields = [width, lead, many, *map(len, streams)]
    return np.frombuffer(b"".join(streams), np.uint8), np.array(fields, np.int32)


def _deflate(data: bytes) -> bytes:
    """Return the smallest stream of literals."""
    made = []
    for memory in _MEMORY:
        c = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, memory, zlib.Z_HUFFMAN_ONLY)
        made.append(c.compress(data) + c.flush())
    return min(made, key=len)


def _inflate(data: Array, size: int, at: str) -> Array:
    """Return u8[size]; never more is made. Errors: F104 (a damaged stream, or of another size)."""
    stream, what = zlib.decompressobj(), f"a stream that does not hold {size} numbers"
    try:
        made = stream.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        made, what = b"", f"a damaged stream ({error})"
    if len(made) != size or not stream.eof or stream.unused_data:
        raise PccError("F104", what, at=at, hint="copy the file again")
    return np.frombuffer(made, np.uint8)
