"""Sessions at their limits: ends of buffers, failing rounds, unlike rows, ids that are no bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest

from pcc.errors import PccError
from pcc.runtime.measure import compare_greedy
from pcc.runtime.session import Session

PROMPT = b"\x07\x50ab"
SEQ = 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short buffer, windows wider than the chunks of a prompt, other graphs for one row."""
    folder = tmp_path_factory.mktemp("short")
    return engines.engine(folder, "cp", n=6, r=4, max_seq=SEQ, chunk=3)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engines.engine(tmp_path_factory.mktemp("long"), "cp", max_seq=1100)


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 3}])
def test_a_full_row_waits_while_others_go_on(engine: Any, options: dict[str, Any]) -> None:
    prompts = [b"a" * 60, b"x", b"b" * 63, b"c" * 40]
    together = engine.session(**options).generate(prompts, 1000)
    for i, p in enumerate(prompts):
        alone = engine.session(stream=i, **options).generate(p, 1000)
        assert (alone.reason, alone.ids) == ("full", together[i].ids)
        assert 1 + len(p) + len(alone.ids) == SEQ


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 3}])
def test_buffers_grow_under_rows_of_unlike_lengths(growing: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.bytes(k) for k in (1, 700, 480, 30)]
    together = growing.session(**options)
    first = together.generate(prompts, 40)
    rest = together.generate(None, 30)
    for i, p in enumerate(prompts):
        alone = growing.session(stream=i, **options).generate(p, 70)
        assert first[i].bytes + rest[i].bytes == alone.bytes, i


def test_growing_changes_no_text(growing: Any) -> None:
    prompt = np.random.default_rng(1).integers(0, 256, 495).tolist()
    compared, _ = compare_greedy(growing, [[256, *prompt]], 40, lambda _: None)
    assert compared.identical + compared.near_ties == 1
    session = growing.session(greedy=True)
    session.generate_ids(prompt, 1)
    assert session.rounds.bucket == 0
    session.generate(None, 30)
    assert session.rounds.bucket == 1
    small = session.memory(100)
    assert small < session.memory(600) < session.memory(600, rows=2)
    held = sum(b.array.nbytes for b in session.rounds.states.past.values())
    assert held <= session.memory(600) < held * 1.1


def test_a_saved_batch_goes_on(engine: Any, tmp_path: Path) -> None:
    for options in ({"greedy": True}, {"seed": 6, "top_p": 0.9}):
        prompts = [PROMPT, b"x", b"y" * 20]
        whole = engine.session(**options).generate(prompts, 30)
        session = engine.session(**options)
        first = session.generate(prompts, 11)
        session.save(tmp_path / "s.npz")
        rest = Session.load(engine, tmp_path / "s.npz").generate(None, 19)
        for a, b, c in zip(first, rest, whole, strict=True):
            assert a.bytes + b.bytes == c.bytes


def test_windows_of_saved_sessions_are_checked(engine: Any, tmp_path: Path) -> None:
    session = engine.session(greedy=True)
    session.generate(PROMPT, 5)
    session.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as z:
        arrays = dict(z)
    arrays["window"] = arrays["window"] + (1 << 40)
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(PccError, match="S141"):
        Session.load(engine, tmp_path / "wrong.npz")


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 2}])
def test_a_failed_round_changes_nothing(engine: Any, options: dict[str, Any]) -> None:
    whole = engine.session(**options).generate(PROMPT, 40).bytes
    session = engine.session(**options)
    first = session.generate(PROMPT, 9).bytes
    cache = session.rounds.states.past["value.1"].array
    kept = cache.copy()
    cache[:] = np.nan
    with pytest.raises(PccError, match=r"S130.*layer"):
        session.generate(None, 31)
    assert first + session.pending[0] == whole[: 9 + len(session.pending[0])]
    cache[:] = kept
    assert first + session.generate(None, 31).bytes == whole


def test_a_prompt_that_is_refused_leaves_the_session_alone(engine: Any) -> None:
    whole = engine.session(greedy=True).generate(PROMPT, 30).bytes
    session = engine.session(greedy=True)
    first = session.generate(PROMPT, 10).bytes
    for prompt, code in ((b"a" * SEQ, "S121"), ([b"a", b"b" * 100], "S121"), ([], "S106")):
        with pytest.raises(PccError, match=code):
            session.generate(prompt, 5)
    assert first + session.generate(None, 20).bytes == whole


def test_streams_are_of_one_sequence(engine: Any) -> None:
    whole = engine.session(greedy=True).generate(PROMPT, 30).bytes
    session = engine.session(greedy=True)
    first = session.generate(PROMPT, 10).bytes
    with pytest.raises(PccError, match="S103"):
        session.stream([b"a", b"b"])
    assert first + session.generate(None, 20).bytes == whole
    old = session.stream(PROMPT, 30, text=False)
    next(old)
    session.generate(b"another", 3)
    with pytest.raises(PccError, match="S108"):
        next(old)


def test_an_early_cancel_counts(engine: Any) -> None:
    session = engine.session(greedy=True)
    chunks = session.stream(PROMPT, 40, text=False)
    session.cancel()
    out = b"".join(chunks)
    assert session.reasons == ["cancelled"]
    whole = engine.session(greedy=True).generate(PROMPT, 40).bytes
    assert out + session.generate(None, 40 - len(out)).bytes == whole


def test_end_ids_and_special_ids(tmp_path: Path) -> None:
    """An id that stands for no byte adds none; an end id ends the text, and is among the ids."""
    engine = engines.engine(
        tmp_path, config={"vocab": 290, "eos_token_id": 270, "bos_token_id": None, "noise": 0.1}
    )
    session = engine.session(seed=1, temperature=2.0)
    results = [session.generate(bytes([b]), 200) for b in range(12)]
    ended = [r for r in results if r.reason == "end"]
    assert ended
    for r in results:
        assert r.bytes == bytes(t for t in r.ids if t < 256)
        assert 270 not in r.ids[:-1]
        assert (r.ids[-1] == 270) == (r.reason == "end")
        assert r.reason != "length" or len(r.bytes) == 200
    assert any(t >= 256 for r in results for t in r.ids[:-1])
    with pytest.raises(PccError, match="S106"):
        session.generate(b"")


def only_done(session: Any) -> Any:
    """Return the row of a session that has decided its first byte and no more."""
    session.generate(PROMPT, 1)
    (row,) = session.rows
    row.text[row.done_bytes :], row.ids[row.done_ids :] = b"", []
    row.owner = row.owner[: len(row.text)]
    return row


def test_streams_keep_cut_characters_whole(engine: Any) -> None:
    session = engine.session(greedy=True)
    row = only_done(session)
    row.decide(list("aéb".encode()), [0.0] * 4)
    assert b"".join(session.stream(None, 2)) == b"a"
    assert b"".join(session.stream(None, 3)) == "éb".encode()
    assert session.reasons == ["length"]


@pytest.mark.parametrize(
    "text", [b"a\xc0b", b"a\xe2\x82b", b"a\xed\xa0b", b"a\xc3(", b"a\xf5\x80\x80b"]
)
def test_broken_characters_are_let_through_at_the_limit(engine: Any, text: bytes) -> None:
    """What follows, decided but beyond the limit, shows that they are no cut characters."""
    for most in range(len(text) + 1):
        session = engine.session(greedy=True)
        row = only_done(session)
        row.decide(list(text), [0.0] * len(text))
        assert b"".join(session.stream(None, most)) == text[:most]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_whether_a_character_is_cut_does_not_depend_on_the_rounds(engine: Any, cut: int) -> None:
    """A beginning of a character is decided last: further rounds say what follows it."""
    for seed in range(6):
        session = engine.session(seed=seed)
        row = only_done(session)
        begun = b"a" + "\U0001f600".encode()[:cut]
        row.decide(list(begun), [0.0] * len(begun))
        out = b"".join(session.stream(None, len(begun)))
        after = bytes(row.text[-len(session.pending[0]) :] if session.pending[0] else b"")
        assert out + after == bytes(row.text[1:])
        assert len(row.text) > 1 + len(begun)  # it was found out
        whole = begun + bytes(row.text[1 + len(begun) :])
        broken = "\ufffd" in whole[1:5].decode("utf-8", "replace")[0]
        assert out == (begun if broken else b"a")


def test_ids_that_are_not_bytes(tmp_path: Path) -> None:
    engine = engines.engine(
        tmp_path, config={"vocab": 40, "bos_token_id": None, "byte_offset": None}
    )
    session = engine.session(greedy=True)
    both = session.generate_ids([[1, 2], [3]], 20)
    assert [engine.session(greedy=True).generate_ids(p, 20) for p in ([1, 2], [3])] == both
    assert session.reasons == ["length", "length"]
    for call in (lambda: session.generate(b"ab"), lambda: session.generate(None)):
        with pytest.raises(PccError, match="S111"):
            call()
