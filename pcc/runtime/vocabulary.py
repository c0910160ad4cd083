"""Model token ids and bytes, and streams that never cut a UTF-8 character in half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcc.errors import PccError
from pcc.runtime.arguments import text as read_text


@dataclass(frozen=True)
class Vocabulary:
    """Byte b is the id b + byte_offset; every other id is special and stands for no byte.

    `byte_offset` None: the ids are not bytes, and only calls that take ids can be used.
    """

    size: int
    byte_offset: int | None
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
            int(offset) if offset is not None else None,
            v.get("bos"),
            tuple(int(i) for i in v.get("eos") or ()),
            v.get("pad"),
        )

    def encode(self, text: bytes | str, *, bos: bool = True) -> list[int]:
        """Return the ids of a prompt, with BOS in front where the model has one."""
        if self.byte_offset is None:
            what = f"the model's {self.size} ids are not bytes"
            raise PccError("S111", what, hint="use generate_ids")
        data = read_text("the prompt", text)
        ids = [b + self.byte_offset for b in data]
        if data and max(ids) >= self.size:
            at = next(i for i, t in enumerate(ids) if t >= self.size)
            what = f"byte {data[at]} at {at} is outside the model's {self.size} tokens"
            raise PccError("S110", what)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def byte(self, token: int) -> int | None:
        """Return the byte of an id, or None for a special token."""
        if self.byte_offset is None:
            return None
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
    data: bytes | bytearray, stops: Sequence[bytes], start: int, floor: int = 0
) -> tuple[int, int] | None:
    """Return (begin, end) of the stop string that ends first after `start`, or None.

    Of several that end there, the longest. So the answer is the same whether the bytes come one at
    a time or many in a round. Nothing before `floor` counts.
    """
    best: tuple[int, int] | None = None
    for s in stops:
        at = data.find(s, max(floor, start - len(s) + 1))
        if at >= 0 and (best is None or (at + len(s), at) < (best[1], best[0])):
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
