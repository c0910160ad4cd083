"""Coded rows against a decoder of their own in plain Python, and files that must be refused."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pcc.errors import PccError
from pcc.frontends import coded
from pcc.frontends.coded import DENSEST, Streams, encode

pytestmark = pytest.mark.wheel
Array = np.ndarray[Any, Any]
SIDES = array_shapes(min_dims=2, max_dims=4, max_side=7)


def decoded(stored: Array, fields: Array, leading: tuple[int, ...]) -> list[list[int]]:
    """Return the rows of q in order, one number at a time."""
    width, lead, many, *sizes = fields.tolist()
    numbers, at = [], 0
    for size in sizes:
        made = list(zlib.decompress(stored[at : at + size].tobytes()))
        assert len(made) % (lead * width) == 0
        assert 0 < len(made) <= many * lead * width
        numbers += made
        at += size
    assert at == len(stored)
    inner = int(np.prod(leading)) // lead
    rows: list[list[int]] = [[] for _ in range(lead * inner)]
    for m in range(inner):
        before = [0] * width
        for f in range(lead):
            begin = (m * lead + f) * width
            before = [(before[k] + numbers[begin + k]) % 256 for k in range(width)]
            rows[f * inner + m] = [v - 256 if v > 127 else v for v in before]
    return rows


def read(stored: Array, fields: Array, leading: tuple[int, ...], *part: int) -> Array:
    """Return rows as the module reads them."""
    return Streams.of(stored.shape, leading, fields, "T").rows(lambda i, j: stored[i:j], *part)


def slots(alike: bool) -> Array:
    """Return i8[4,6,32]: four tables that change little from one to the next, or four others."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-3, 4, (4, 6, 32)) if alike else rng.integers(-60, 61, (4, 6, 32))
    steps[0] = rng.integers(-50, 51, (6, 32))
    return (np.cumsum(steps, 0) if alike else steps).astype(np.int8)


@settings(deadline=None)
@given(q=arrays(np.int8, SIDES))
def test_rows_are_read_back(q: Array) -> None:
    stored, fields = encode(q)
    assert (stored.dtype, fields.dtype) == (np.uint8, np.int32)
    assert decoded(stored, fields, q.shape[:-1]) == q.reshape(-1, q.shape[-1]).tolist()
    np.testing.assert_array_equal(read(stored, fields, q.shape[:-1]), q)


@settings(deadline=None)
@given(data=st.data(), shape=st.sampled_from([(9, 40_000), (700, 300), (3, 70, 1000)]))
def test_parts_of_several_streams(data: st.DataObject, shape: tuple[int, ...]) -> None:
    q = np.random.default_rng(1).integers(-63, 64, shape).astype(np.int8)
    stored, fields = encode(q)
    assert len(fields) > 3 + 2
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    np.testing.assert_array_equal(read(stored, fields, shape[:-1], start, stop), q[start:stop])


def test_only_the_streams_of_some_rows_are_read() -> None:
    q = np.random.default_rng(1).integers(-63, 64, (1000, 256)).astype(np.int8)  # 256 rows each
    stored, fields = encode(q)
    ends = np.cumsum([0, *fields[3:]]).tolist()
    asked: list[tuple[int, int]] = []

    def some(i: int, j: int) -> Array:
        asked.append((i, j))
        return stored[i:j]

    rows = Streams.of(stored.shape, (1000,), fields, "T")
    np.testing.assert_array_equal(rows.rows(some, 300, 600), q[300:600])
    assert asked == [(ends[1], ends[2]), (ends[2], ends[3])]


@contextmanager
def inflated() -> Iterator[list[int]]:
    """Collect the size of each stream that is inflated."""
    sizes: list[int] = []
    inflate = coded._inflate

    def counted(data: Array, size: int, at: str) -> Array:
        sizes.append(size)
        return inflate(data, size, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded, "_inflate", counted)
        yield sizes


@pytest.mark.parametrize("step", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("many", [1, 3, 64, 100, 1 << 30])
def test_each_stream_is_inflated_once_in_order(many: int, step: int) -> None:
    q = np.random.default_rng(1).integers(-63, 64, (1000, 8)).astype(np.int8)
    streams = [zlib.compress(q[i : i + many].tobytes()) for i in range(0, 1000, many)]
    stored = np.frombuffer(b"".join(streams), np.uint8)
    fields = np.array([8, 1, many, *map(len, streams)], np.int32)
    rows = Streams.of(stored.shape, (1000,), fields, "T")
    for _ in range(2):
        with inflated() as sizes:
            parts = [rows.rows(lambda i, j: stored[i:j], i, min(i + step, 1000))
                     for i in range(0, 1000, step)]  # fmt: skip
        np.testing.assert_array_equal(np.concatenate(parts), q)
        assert sizes == [8 * min(many, 1000 - i) for i in range(0, 1000, many)]
        assert not rows.kept  # nothing is held once the last row was read


def test_rows_in_any_order() -> None:
    q = np.random.default_rng(1).integers(-63, 64, (1000, 200)).astype(np.int8)
    stored, fields = encode(q)
    rows = Streams.of(stored.shape, (1000,), fields, "T")
    for start, stop in ((300, 310), (310, 700), (0, 5), (699, 1000), (4, 4), (5, 6), (0, 1000)):
        found = rows.rows(lambda i, j: stored[i:j], start, stop)
        np.testing.assert_array_equal(found, q[start:stop])
        assert len(rows.kept) <= 1


def test_a_stream_of_many_groups_is_bounded() -> None:
    """Else each block of rows would inflate the whole matrix."""
    q = np.zeros(((1 << 20) // 16, 16), np.int8)
    for rows, fits in ((len(q), True), (len(q) + 1, False)):
        data = coded._deflate(bytes(rows * 16))
        fields = np.array([16, 1, rows, len(data)], np.int32)
        if fits:
            assert not read(np.frombuffer(data, np.uint8), fields, (rows,)).any()
            continue
        with pytest.raises(PccError, match=r"T\.streams.*F113.*1048592 numbers in a stream"):
            read(np.frombuffer(data, np.uint8), fields, (rows,))
    data = coded._deflate(bytes(3 << 20))  # one row is longer: then a stream is a row
    fields = np.array([3 << 20, 1, 1, len(data)], np.int32)
    assert read(np.frombuffer(data, np.uint8), fields, (1,)).shape == (1, 3 << 20)


def test_a_matrix_has_no_groups_of_all_its_rows() -> None:
    q = np.arange(12, dtype=np.uint8).reshape(4, 3)
    steps = np.diff(q, axis=0, prepend=np.uint8(0))
    data = zlib.compress(steps.tobytes())
    fields = np.array([3, 4, 1, len(data)], np.int32)
    with pytest.raises(PccError, match=r"T\.streams.*F113.*groups of 4 rows"):
        read(np.frombuffer(data, np.uint8), fields, (4,))
    np.testing.assert_array_equal(read(np.frombuffer(data, np.uint8), fields, (4, 1))[:, 0], q)


@pytest.mark.parametrize("alike", [True, False])
def test_slots_that_are_alike_are_stored_as_differences(alike: bool) -> None:
    q = slots(alike)
    stored, fields = encode(q)
    assert fields[1] == (4 if alike else 1)
    np.testing.assert_array_equal(read(stored, fields, (4, 6)), q)
    np.testing.assert_array_equal(read(stored, fields, (4, 6), 1, 3), q[1:3])
    assert len(stored) < q.size


def test_differences_wrap() -> None:
    q = np.array([[[127, -128]], [[-128, 127]], [[127, -1]]], np.int8)
    data = zlib.compress(bytes([127, 128, 1, 255, 255, 128]))
    fields = np.array([2, 3, 1, len(data)], np.int32)
    np.testing.assert_array_equal(read(np.frombuffer(data, np.uint8), fields, (3, 1)), q)


def test_numbers_take_a_bit_or_more() -> None:
    """Else rows that this module writes would be refused as a bomb."""
    q = np.zeros((3, 100, 700), np.int8)
    stored, fields = encode(q)
    assert q.size <= DENSEST * len(stored)
    np.testing.assert_array_equal(read(stored, fields, (3, 100)), q)


BROKEN = {
    "wide fields": lambda s, f, n: (s, f.astype(np.int64), n),
    "a scalar": lambda s, f, n: (s, np.array(4, np.int32), n),
    "no streams": lambda s, f, n: (s, f[:3], n),
    "no fields": lambda s, f, n: (s, f[:0], n),
    "no scales": lambda s, f, n: (s, f, ()),
    "no rows": lambda s, f, n: (s, f, (0, 6)),
    "other scales": lambda s, f, n: (s, f, (4, 6 << 20)),
    "of two axes": lambda s, f, n: (s[:, None], f, n),
    "cut off": lambda s, f, n: (s[:-1], f, n),
    "one stream more": lambda s, f, n: (s, np.append(f, np.int32(1)), n),
    "width 0": lambda s, f, n: (s, put(f, 0, 0), n),
    "a negative width": lambda s, f, n: (s, put(f, 0, -32), n),
    "a width of 2^31 - 1": lambda s, f, n: (s, put(f, 0, 2**31 - 1), n),
    "groups of two": lambda s, f, n: (s, put(f, 1, 2), n),
    "no groups": lambda s, f, n: (s, put(f, 2, 0), n),
    "fewer groups": lambda s, f, n: (s, put(f, 2, 1), n),
    "a negative size": lambda s, f, n: (s, np.append(f, np.int32([-5, 5])), n),
    "a larger size": lambda s, f, n: (s, put(f, 3, len(s) + 1), n),
}


def put(fields: Array, at: int, value: int) -> Array:
    """Return fields with one replaced."""
    fields = fields.copy()
    fields[at] = value
    return fields


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("alike", [True, False])
def test_streams_that_do_not_fit(name: str, alike: bool) -> None:
    q = slots(alike)
    with pytest.raises(PccError) as caught:
        read(*BROKEN[name](*encode(q), q.shape[:-1]))
    assert caught.value.code == "F113", caught.value
    assert caught.value.at == "T.streams"


def test_every_damaged_byte_is_found() -> None:
    q = slots(True)
    stored, fields = encode(q)
    for at in range(len(stored)):
        bad = stored.copy()
        bad[at] ^= 1 << at % 8
        with pytest.raises(PccError) as caught:
            read(bad, fields, (4, 6))
        assert caught.value.code == "F104", at


def by_hand(data: bytes, count: int) -> tuple[Array, Array, tuple[int, ...]]:
    """Return one stream that is said to hold `count` numbers."""
    return np.frombuffer(data, np.uint8), np.array([count, 1, 1, len(data)], np.int32), (1,)


def primed() -> bytes:
    """Return a stream that needs a dictionary."""
    c = zlib.compressobj(zdict=b"abcdefgh")
    return c.compress(b"abcdefgh" * 8) + c.flush()


@pytest.mark.parametrize(
    "data",
    [
        zlib.compress(bytes(range(64)) + b"x"),  # a number more
        zlib.compress(bytes(range(63))),  # one fewer
        zlib.compress(bytes(range(64)))[:-2],  # cut off within its checksum
        zlib.compress(bytes(range(64))) + b"x",  # something behind it
        zlib.compress(bytes(range(64)))[2:],  # no header
        primed(),
        bytes(64),
    ],
)
def test_a_stream_of_another_kind_or_size(data: bytes) -> None:
    with pytest.raises(PccError) as caught:
        read(*by_hand(data, 64))
    assert (caught.value.code, caught.value.at) == ("F104", "T")
    good = zlib.compress(bytes(range(64)))
    np.testing.assert_array_equal(read(*by_hand(good, 64)), np.arange(64)[None])


def test_a_bomb_does_not_go_off() -> None:
    """Neither where its size is declared, nor where it is hidden."""
    bomb = zlib.compress(bytes(1 << 27), 9)
    tracemalloc.start()
    try:
        for count, code in ((1 << 27, "F113"), (len(bomb), "F104")):
            with pytest.raises(PccError) as caught:
                read(*by_hand(bomb, count))
            assert caught.value.code == code
        assert tracemalloc.get_traced_memory()[1] < 16 * len(bomb)
    finally:
        tracemalloc.stop()
