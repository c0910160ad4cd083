"""Bytes and ids: streams never cut a character, stops and limits end where they should."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcc.errors import PccError
from pcc.runtime.rows import Goal, Row
from pcc.runtime.vocabulary import Vocabulary, cut_by, find_stop, whole_characters, withheld

BYTES = Vocabulary(260, 0, bos=256, eos=(257,), pad=258)
SHIFTED = Vocabulary(320, 64, bos=1, eos=(2,), pad=0)


def test_ids_and_bytes() -> None:
    assert BYTES.encode(b"ab") == [256, 97, 98]
    assert BYTES.encode("é", bos=False) == [195, 169]
    assert SHIFTED.encode(b"\x00\xff") == [1, 64, 319]
    assert SHIFTED.decode([1, 64 + 104, 2, 64 + 105, 0, 5]) == b"hi"
    with pytest.raises(PccError, match="S110"):
        Vocabulary(64, 0).encode(b"a")


@given(st.text(max_size=12), st.integers(0, 40))
def test_whole_characters_cuts_only_between_them(text: str, at: int) -> None:
    data = text.encode()[:at]
    keep = whole_characters(data)
    assert data[:keep].decode() is not None  # decodes
    assert len(data) - keep <= 3


@given(st.binary(max_size=12))
def test_broken_bytes_never_stall(data: bytes) -> None:
    assert len(data) - whole_characters(data) <= 3
    assert whole_characters(data + b"aaaa") == len(data) + 4


def begins_a_character(data: bytes) -> bool:
    """Whether something can follow that makes one character of it, by trying."""
    lead = {n for n, k in ((2, 0xC0), (3, 0xE0), (4, 0xF0)) if data[0] >= k}
    for size in lead:
        for second in range(0x80, 0xC0):
            whole = (data + bytes([second]) + b"\x80\x80")[:size] if len(data) == 1 else (
                data + b"\x80\x80")[:size]  # fmt: skip
            with contextlib.suppress(UnicodeDecodeError):
                if len(data) < size and len(whole.decode()) == 1:
                    return True
    return False


def test_only_beginnings_of_characters_are_held_back() -> None:
    """Every one or two bytes after a letter, and some threes, against trying every way to go on."""
    tails = [bytes([a]) for a in range(256)]
    tails += [bytes([a, b]) for a in range(256) for b in range(0x70, 0xD0)]
    tails += [bytes([a, b, 0x80]) for a in range(0xE0, 256) for b in range(0x80, 0xC0, 5)]
    for tail in tails:
        held = next((k for k in (3, 2, 1) if len(tail) >= k and begins_a_character(tail[-k:])), 0)
        assert whole_characters(b"a" + tail) == 1 + len(tail) - held, tail


@pytest.mark.parametrize(
    ("tail", "following", "cut"),
    [("c3", "", True), ("c3", "a9", True), ("c3", "41", False), ("e282", "ac61ff", True),
     ("e282", "61", False), ("f09f98", "8041", True), ("f09f98", "c3a9", False),
     ("efbf", "bd", True), ("c3", "a9ff", True), ("ed", "a0", False), ("ed", "9fbf", True)],
)  # fmt: skip
def test_what_follows_tells_a_cut_character_from_a_broken_one(
    tail: str, following: str, cut: bool
) -> None:
    assert cut_by(bytes.fromhex(tail), bytes.fromhex(following)) == cut


@given(
    st.text("ab", max_size=10), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.integers(0, 9),
)  # fmt: skip
def test_stops_against_a_direct_search(text: str, stops: list[str], start: int) -> None:
    data, sought = text.encode(), [s.encode() for s in stops]
    hits = [
        (i, i + len(s)) for s in sought for i in range(len(data))
        if data[i : i + len(s)] == s and i + len(s) > start
    ]  # fmt: skip
    found = find_stop(data, sought, start)
    if found is None:
        assert not hits
    else:
        assert found == min(hits, key=lambda h: (h[1], h[0]))
    held = withheld(data, sought)
    longest = max((k for s in sought for k in range(1, len(s)) if data.endswith(s[:k])), default=0)
    assert held == longest


def drive(rounds: list[bytes], goal: Goal, row: Row | None = None) -> tuple[bytes, Row, str]:
    """Feed rounds of bytes to a row; return what is streamed."""
    row = row or Row(BYTES, [256])
    row.begin()
    out, feed = b"", iter(rounds)
    while True:
        end = row.end(goal, 10_000)
        out += row.fresh(end[3] if end else None, goal, text=True)
        if end:
            row.finish(end[1], end[2], end[0])
            return out, row, end[0]
        new = next(feed)
        row.decide(list(new), [0.0] * len(new))


@pytest.mark.parametrize("cut", range(1, 12))
def test_streams_withhold_stops_and_half_characters(cut: int) -> None:
    data = "aé\u20acstSTOPrest".encode()
    rounds = [data[i : i + cut] for i in range(0, len(data), cut)]
    out, row, reason = drive(rounds, Goal(100, stops=(b"STOP",)))
    assert (out, reason) == ("aé\u20acst".encode(), "stop")
    kept, _, _ = drive(rounds, Goal(100, stops=(b"STOP",), keep_stop=True))
    assert kept.endswith(b"STOP")
    rest = bytes(row.text[row.done_bytes :])
    assert b"rest".startswith(rest[:4])  # what was decided beyond the stop is pending


def test_where_a_text_stops_does_not_depend_on_the_rounds() -> None:
    """Of stop strings that overlap, the one that is complete first ends the text."""
    data, stops = b"xabcdefg", (b"abcde", b"bc", b"abc")
    ends = set()
    for cut in range(1, 9):
        rounds = [data[i : i + cut] for i in range(0, len(data), cut)]
        out, row, reason = drive(rounds, Goal(50, stops=stops))
        ends.add((out, row.done_bytes, reason))
    assert ends == {(b"x", 4, "stop")}


def test_a_stop_string_ends_one_call_only() -> None:
    goal = Goal(50, stops=(b"aa",))
    out, row, _ = drive([b"xaaab"], goal)
    assert out == b"x"
    out, row, _ = drive([b"aay"], goal, row)  # the third a is no half of another stop
    assert out == b"ab"
    out, _, _ = drive([b"zaa"], goal, row)
    assert out == b"yz"


def test_a_stop_string_may_span_two_calls() -> None:
    out, row, reason = drive([b"abST"], Goal(4, stops=(b"STOP",)))
    assert (out, reason) == (b"abST", "length")
    out, row, reason = drive([b"OPcd"], Goal(4, stops=(b"STOP",)), row)
    assert (out, reason) == (b"", "stop")
    assert row.pending == b"cd"


def test_two_calls_give_the_bytes_of_one() -> None:
    rounds = [b"abc", b"d", b"efgh", b"ij"]
    whole, _, _ = drive(rounds, Goal(9))
    for first in range(10):
        one, row, _ = drive(rounds, Goal(first))
        left = b"".join(rounds)[len(row.text) :]
        two, _, _ = drive([left[i : i + 1] for i in range(len(left))], Goal(9 - first), row)
        assert one + two == whole


def test_the_earliest_reason_counts() -> None:
    row = Row(BYTES, [256])
    row.decide([97, 98, 257, 99], [0.0] * 4)
    row.begin()
    assert row.end(Goal(10), 100) == ("end", 3, 2, 2)
    assert row.end(Goal(1), 100) == ("length", 1, 1, 1)
    row.begin()
    assert row.end(Goal(10, stops=(b"ab",)), 100) == ("stop", 2, 2, 0)
    row.begin()
    assert row.end(Goal(10), 3) == ("full", 2, 2, 2)
    row.begin()
    assert row.end(Goal(max_ids=4, stop_ids=frozenset({-1})), 100) == ("length", 4, 3, 3)


def test_special_ids_are_kept_and_add_no_bytes() -> None:
    row = Row(BYTES, [256])
    for ids in itertools.batched([97, 258, 98, 259], 2) if hasattr(itertools, "batched") else [
        (97, 258), (98, 259)]:  # fmt: skip
        row.decide(list(ids), [0.0, 0.0])
    assert bytes(row.text) == b"ab"
    assert row.ids == [97, 258, 98, 259]
    assert row.bytes_before(1) == 1
    assert row.bytes_before(3) == 2
