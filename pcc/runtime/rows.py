"""What one sequence has decided, delivered and kept pending, and where its output must end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pcc.runtime.vocabulary import Vocabulary, find_stop, whole_characters, withheld


@dataclass(frozen=True)
class Goal:
    """When a call ends: bytes, ids, stop strings, end ids."""

    max_bytes: int | None = None
    max_ids: int | None = None
    stops: tuple[bytes, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    keep_stop: bool = False


@dataclass
class Row:
    """One sequence. Decided ids may run ahead of what was delivered: the rest is pending."""

    vocabulary: Vocabulary
    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # decided after the prompt
    log_probs: list[float] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)  # their bytes
    owner: list[int] = field(default_factory=list)  # index into ids of each byte
    done_ids: int = 0  # delivered
    done_bytes: int = 0
    first_id: int = 0  # where this call began
    first_byte: int = 0
    shown: int = 0  # bytes streamed in this call
    next_id: int = 0  # ids and bytes from here on were not searched for an end yet
    next_byte: int = 0
    floor: int = 0  # bytes before this belong to a stop string that ended a call

    def decide(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Append what a round has decided."""
        for t in tokens:
            b = self.vocabulary.byte(t)
            if b is not None:
                self.text.append(b)
                self.owner.append(len(self.ids))
            self.ids.append(int(t))
        self.log_probs.extend(log_probs)

    def begin(self) -> None:
        """Start a call: pending tokens come first."""
        self.first_id, self.first_byte = self.done_ids, self.done_bytes
        self.shown = self.next_byte = self.done_bytes
        self.next_id = self.done_ids

    def bytes_before(self, index: int) -> int:
        """Return how many bytes the first `index` ids make."""
        low, high = 0, len(self.owner)
        while low < high:
            mid = (low + high) // 2
            low, high = (mid + 1, high) if self.owner[mid] < index else (low, mid)
        return low

    def end(self, goal: Goal, capacity: int) -> tuple[str, int, int, int] | None:
        """Return (reason, id end, byte end, byte end shown) once the goal is met, else None.

        The earliest reason counts: an end id, a stop string, the limits, the buffer's end.
        """
        found: list[tuple[int, int, str, int, int]] = []

        def note(rank: int, reason: str, ids: int, shown: int | None = None) -> None:
            stop = self.bytes_before(ids)
            found.append((ids, rank, reason, stop, stop if shown is None else shown))

        ends = self.vocabulary.eos if not goal.stop_ids else ()
        for i in range(self.next_id, len(self.ids)):
            if self.ids[i] in goal.stop_ids or self.ids[i] in ends:
                note(1, "end", i + 1)
                break
        hit = find_stop(self.text, goal.stops, self.next_byte, self.floor)
        if hit is not None:
            shown = hit[1] if goal.keep_stop else max(hit[0], self.first_byte)
            note(0, "stop", self.owner[hit[1] - 1] + 1, shown)
        if goal.max_bytes is not None:
            last = self.first_byte + goal.max_bytes
            if goal.max_bytes == 0:
                note(2, "length", self.first_id)
            elif len(self.text) >= last:
                note(2, "length", self.owner[last - 1] + 1)
        if goal.max_ids is not None and len(self.ids) >= self.first_id + goal.max_ids:
            note(2, "length", self.first_id + goal.max_ids)
        room = capacity - len(self.prompt)
        if len(self.ids) >= room:
            note(3, "full", max(self.first_id, room))
        if not found:
            self.next_id, self.next_byte = len(self.ids), len(self.text)
            return None
        ids, _, reason, stop, shown = min(found)
        return reason, ids, stop, shown

    def finish(self, ids: int, stop: int, reason: str = "") -> None:
        """Deliver up to these ids and bytes; what was decided beyond stays pending."""
        self.done_ids, self.done_bytes = ids, stop
        if reason == "stop":
            self.floor = stop

    @property
    def pending(self) -> bytes:
        """Bytes that are decided and were not delivered."""
        return bytes(self.text[self.done_bytes :])

    def fresh(self, upto: int | None, goal: Goal, *, text: bool) -> bytes:
        """Return bytes to stream now: whole characters, no beginning of a stop string."""
        data = bytes(self.text[self.shown : upto])
        if upto is None:
            last = len(self.text) if goal.max_bytes is None else self.first_byte + goal.max_bytes
            data = data[: max(0, last - self.shown)]
            data = data[: len(data) - withheld(data, goal.stops)]
            if text:
                data = data[: whole_characters(data)]
        self.shown += len(data)
        return data
