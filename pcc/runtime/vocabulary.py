"""Model token ids and bytes, and streams that never cut a UTF-8 character in half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcc.errors import PccError


@dataclass(frozen=True)
class Vocabulary:
    """Byte b is the id b + byte_offset; every other id is special and stands for no byte."""

    size: int
    byte_offset: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    @staticmethod
    def of(manifest: Mapping[str, Any], size: int) -> Vocabulary:
        """Return the vocabulary of a manifest."""
        v = manifest.get("vocabulary") or {}
        offset = v.get("byte_offset")
        return Vocabulary(
            size,
            int(offset) if offset is not None else 0,
            v.get("bos"),
            tuple(int(i) for i in v.get("eos") or ()),
            v.get("pad"),
        )

    def encode(self, text: bytes | str, *, bos: bool = True) -> list[int]:
        """Return the ids of a prompt, with BOS in front where the model has one."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        ids = [b + self.byte_offset for b in data]
        if data and max(ids) >= self.size:
            at = next(i for i, t in enumerate(ids) if t >= self.size)
            what = f"byte {data[at]} at {at} is outside the model's {self.size} tokens"
            raise PccError("S110", what)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def byte(self, token: int) -> int | None:
        """Return the byte of an id, or None for a special token."""
        b = token - self.byte_offset
        special = token == self.bos or token == self.pad or token in self.eos
        return b if 0 <= b < 256 and not special else None

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; special tokens add none."""
        return bytes(b for t in ids if (b := self.byte(t)) is not None)


def whole_characters(data: bytes) -> int:
    """Return how many leading bytes of `data` end on a character's edge.

    At most three trailing bytes can begin a character that is not finished; bytes that cannot
    become one are let through, so that a broken stream never stalls.
    """
    for back in range(1, min(3, len(data)) + 1):
        b = data[-back]
        if b < 0x80:
            break
        if b >= 0xC0:
            need = 2 if b < 0xE0 else 3 if b < 0xF0 else 4 if b < 0xF8 else 0
            return len(data) - back if need > back else len(data)
    return len(data)


def find_stop(
    data: bytes | bytearray, stops: Sequence[bytes], start: int
) -> tuple[int, int] | None:
    """Return (begin, end) of the earliest stop string that ends after `start`, or None."""
    best: tuple[int, int] | None = None
    for s in stops:
        at = data.find(s, max(0, start - len(s) + 1))
        if at >= 0 and (best is None or at < best[0]):
            best = (at, at + len(s))
    return best


def withheld(data: bytes, stops: Sequence[bytes]) -> int:
    """Return how many trailing bytes may be the beginning of a stop string."""
    longest = 0
    for s in stops:
        for k in range(min(len(s) - 1, len(data)), longest, -1):
            if data.endswith(s[:k]):
                longest = k
                break
    return longest
