"""Model token ids and bytes, and streams that never cut a UTF-8 character in half."""

from __future__ import annotations

import bisect
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

    The bytes beyond, at most three, are the beginning of a character in UTF-8. What cannot become
    one (a lone C0, E0 80, half of a surrogate pair) is let through, so that nothing ever stalls.
    """
    held = (k for k in (1, 2, 3) if k <= len(data) and _begins(data[-k:]))
    return len(data) - next(held, 0)


LEADS = (0xC2, 0xE0, 0xF0, 0xF5)  # of 2, 3, 4 bytes; of none
SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


def _begins(tail: bytes) -> bool:
    """Return whether bytes can follow that make one character of `tail` (Unicode, table 3-7)."""
    lead, rest = tail[0], tail[1:]
    size = (0, 2, 3, 4, 0)[bisect.bisect(LEADS, lead)]
    low, high = SECOND.get(lead, (0x80, 0xBF))
    return len(tail) < size and all(0x80 <= b < 0xC0 for b in rest) and (
        not rest or low <= rest[0] <= high
    )  # fmt: skip


def cut_by(tail: bytes, following: bytes) -> bool:
    """Return whether `tail`, the beginning of a character, is one as far as `following` tells."""
    for k in range(1, len(following) + 1):
        if not _begins(tail + following[:k]):
            return _whole(tail + following[:k])
    return True


def _whole(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


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
