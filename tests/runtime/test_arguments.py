"""What callers pass: read as it is meant, or refused with a code; never converted silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest

from pcc.errors import PccError
from pcc.runtime.session import Session

LAST = (1 << 32) - 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engines.engine(tmp_path_factory.mktemp("arguments"), "cp", max_seq=64, chunk=4)


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda s: s.generate([3, 1]), "S104"),  # bytes(3) would be three NULs
        (lambda s: s.generate(5, 5), "S104"),
        (lambda s: s.generate([None]), "S104"),
        (lambda s: s.generate(Nameless()), "S104"),
        (lambda s: s.generate({b"a": 1, 2: 3}), "S104"),
        (lambda s: s.generate("\ud800"), "S104"),
        (lambda s: s.generate(b"a", 5, stop=[5]), "S104"),
        (lambda s: s.generate(b"a", 5, stop=5), "S104"),
        (lambda s: s.generate(b"a", 5, stop=None), "S104"),
        (lambda s: s.generate(b"a", 5, stop=bytearray()), "S104"),
        (lambda s: s.generate(b"a", 2.5), "S104"),
        (lambda s: s.generate(b"a", "x"), "S104"),
        (lambda s: s.generate(b"a", None), "S104"),
        (lambda s: s.generate(b"a", True), "S104"),
        (lambda s: s.generate(b"a", 5, bos="no"), "S104"),
        (lambda s: s.generate(b"a", 5, keep_stop=1), "S104"),
        (lambda s: s.generate(b"a", 5, logprobs="yes"), "S104"),
        (lambda s: list(s.stream(b"a", 5, text=None)), "S104"),
        (lambda s: list(s.stream(5, 5)), "S104"),
        (lambda s: list(s.stream((p for p in [b"a", b"b"]), 5)), "S103"),
        (lambda s: s.generate_ids("abc"), "S104"),
        (lambda s: s.generate_ids(b"abc"), "S104"),
        (lambda s: s.generate_ids(["abc"]), "S104"),
        (lambda s: s.generate_ids(7), "S104"),
        (lambda s: s.generate_ids(np.array(7)), "S104"),
        (lambda s: s.generate_ids([1.5]), "S110"),
        (lambda s: s.generate_ids([True]), "S110"),
        (lambda s: s.generate_ids([[1], 2]), "S104"),
        (lambda s: s.generate_ids([1, [2]]), "S110"),
        (lambda s: s.generate_ids([1], stop_ids=None), "S104"),
        (lambda s: s.generate_ids([1], stop_ids=3), "S104"),
        (lambda s: s.generate_ids([1], stop_ids=["3"]), "S110"),
        (lambda s: s.generate_ids([1], 2.5), "S104"),
        (lambda s: s.generate_ids([1], -1), "S104"),
        (lambda s: s.memory(2.5), "S104"),
        (lambda s: s.memory(5, 0), "S104"),
        (lambda s: s.rewind_to("a"), "S105"),
        (lambda s: s.rewind_to(3.5), "S105"),
        (lambda s: s.rewind_to(True), "S105"),
        (lambda s: s.rewind_to(0), "S105"),
    ],
)
def test_calls_refuse(engine: Any, call: Callable[[Any], Any], code: str) -> None:
    """With a remedy; and the session goes on as if the call had not been."""
    session = engine.session(greedy=True)
    first = session.generate(b"ab", 6).ids
    with pytest.raises(PccError, match=code) as caught:
        call(session)
    assert caught.value.hint
    whole = engine.session(greedy=True).generate(b"ab", 12).ids
    assert first + session.generate(None, 12 - 6).ids == whole


@pytest.mark.parametrize(
    "options",
    [{"greedy": "no"}, {"greedy": 1}, {"top_k": 10**20}, {"top_k": 2.0}, {"top_k": True},
     {"temperature": True}, {"temperature": "1"}, {"temperature": None}, {"top_p": 10**400},
     {"temperature": float("nan")}, {"draft_top_p": "1"}, {"stream": 1 << 32}, {"stream": 1.0}],
)  # fmt: skip
def test_options_refuse(engine: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PccError, match="S102") as caught:
        engine.session(**options)
    assert caught.value.hint


def test_streams_end(engine: Any) -> None:
    session = engine.session(stream=LAST)
    assert len(session.generate(b"a", 5).bytes) == 5
    with pytest.raises(PccError, match="S102"):
        session.generate([b"a", b"b"], 5)


def test_what_is_meant_is_read(engine: Any) -> None:
    """Every form of a text and of ids gives the same; NumPy's numbers are numbers."""
    want = engine.session(seed=4, temperature=0.5).generate("abc", 9, stop="zz")
    for form in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        how = {"seed": np.int64(4), "temperature": np.float32(0.5), "greedy": np.bool_(False)}
        got = engine.session(**how).generate(form, np.int64(9), stop=bytearray(b"zz"))
        assert got.bytes == want.bytes
    ids = [1, 2, 3]
    session = engine.session(greedy=True)
    forms: list[Any] = [ids, tuple(ids), np.array(ids), range(1, 4), iter(ids)]
    assert len({tuple(session.generate_ids(f, 7)) for f in forms}) == 1
    two: list[Any] = [[ids, [4, 5, 6]], np.array([ids, [4, 5, 6]]), (iter_of(ids), (4, 5, 6))]
    first, *others = [session.generate_ids(f, 7) for f in two]
    assert all(o == first for o in others)


def iter_of(ids: list[int]) -> Any:
    return np.array(ids, np.int32)


def test_options_of_numpy_are_saved(engine: Any, tmp_path: Path) -> None:
    session = engine.session(seed=np.int64(3), top_p=np.float32(0.5), top_k=np.int64(3))
    session.generate(b"ab", 5)
    session.save(tmp_path / "s.npz")
    assert Session.load(engine, tmp_path / "s.npz").sampling == session.sampling
