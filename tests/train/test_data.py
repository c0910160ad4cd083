"""Packing, rows that depend on the step alone, near-duplicates, prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

from pcc.errors import PccError
from pcc.train import data

DOCS = {"a": b"alpha beta\n" * 9, "b": bytes(range(256)), "c": b"x"}


def test_packed_stream() -> None:
    p = data.pack(DOCS)
    ends = np.cumsum([len(d) + 2 for d in DOCS.values()])
    assert len(p.stream) == ends[-1] == len(p.document)
    for (i, d), end in zip(enumerate(DOCS.values()), ends, strict=True):
        assert p.stream[end - len(d) - 2 : end].tolist() == [256, *d, 257]
        assert set(p.document[end - len(d) - 2 : end]) == {i}


def test_rows_are_a_function_of_seed_and_step() -> None:
    p = data.pack(DOCS)
    ids, owner = p.rows(1, 5, 8, 32)
    again, _ = p.rows(1, 5, 8, 32)
    other, _ = p.rows(1, 6, 8, 32)
    assert (ids == again).all()
    assert (ids != other).any()
    assert (ids[:, 0] == 256).all()
    text = p.stream.astype(np.int64)
    for row, o in zip(ids, owner, strict=True):
        at = [i for i in range(len(text) - 30) if (text[i : i + 31] == row[1:]).all()]
        assert any((p.document[i : i + 31] == o[1:]).all() for i in at)
    with pytest.raises(PccError, match="N140"):
        p.rows(0, 0, 1, 10_000)


def test_packed_file(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    data.save_packed(path, DOCS, {"h": b"held"})
    assert data.load_packed(path) == (DOCS, {"h": b"held"})
    np.savez(path, **{"train.bytes": np.zeros(3, np.uint8)})
    with pytest.raises(PccError, match="N142"):
        data.load_packed(path)
    path.write_bytes(b"no archive")
    with pytest.raises(PccError, match="C111"):
        data.load_packed(path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 48])
def test_shingles_tell_equal_runs_apart(size: int) -> None:
    rng = np.random.default_rng(size)
    text = bytes(rng.integers(97, 100, size=200).astype(np.uint8))
    got = data.shingles(text, size)
    runs = [text[i : i + size] for i in range(200 - size + 1)]
    assert len(got) == len(runs)
    assert len(set(got.tolist())) == len(set(runs))
    first = {r: h for r, h in zip(runs, got.tolist(), strict=True)}
    assert all(first[r] == h for r, h in zip(runs, got.tolist(), strict=True))


def test_near_duplicates_go_block_by_block() -> None:
    rng = np.random.default_rng(0)

    def body(n: int) -> bytes:
        return bytes(rng.integers(97, 123, size=n).astype(np.uint8)) + b"\n"

    copied, own = b"def f():\n    " + body(200), b"def g():\n    " + body(200)
    train = [b"import x\n" + copied.replace(b"def f", b"def renamed"), body(300)]
    kept, gone = data.remove_near_duplicates({"m": copied + own, "n": copied}, train)
    assert kept == {"m": own}
    assert gone == {"m": len(copied), "n": len(copied)}
    assert data.blocks(b"import a\n@d\ndef f(): pass\nclass C: pass\n") == [
        b"import a\n", b"@d\ndef f(): pass\n", b"class C: pass\n",
    ]  # fmt: skip


def test_prompts_start_lines_and_stay_inside() -> None:
    held = {"a": b"".join(b"line %d\n" % i for i in range(300)), "short": b"x" * 20}
    rows = data.prompts(held, 10, 64, 0)
    assert rows.shape == (10, 64)
    assert (rows[:, 0] == 256).all()
    for row in rows:
        piece = bytes(row[1:].astype(np.uint8))
        assert held["a"].find(b"\n" + piece) >= 0 or held["a"].startswith(piece)
    with pytest.raises(PccError, match="N143"):
        data.prompts({"short": b"x"}, 1, 64, 0)


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.py").write_bytes(b"a")
    (tmp_path / "d" / "b.txt").write_bytes(b"b")
    assert list(data.read_paths([str(tmp_path)], ".py").values()) == [b"a"]
    with pytest.raises(PccError, match="N141"):
        data.read_paths([str(tmp_path / "absent")])
