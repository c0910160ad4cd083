"""Session files from strangers: every array has its one shape, type and range, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifiers

from pcc.errors import PccError
from pcc.runtime.session import Session

Arrays = dict[str, np.ndarray[Any, Any]]
KINDS = ("byte-llama", "evabyte")


@pytest.fixture(scope="module")
def engines_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Caches with recent ids, rings with summaries; small buffers and larger ones."""
    how = {"max_seq": 700}
    return {k: verifiers.engine(k, tmp_path_factory.mktemp(k), **how) for k in KINDS}


def saved(engine: Any, path: Path, **options: Any) -> Arrays:
    session = engine.session(**options)
    session.generate_ids([[70, 71, 72], [80]], 12)
    session.save(path)
    with np.load(path) as z:
        return dict(z)


def load(engine: Any, path: Path, arrays: Arrays) -> Session:
    np.savez(path, **arrays)
    return Session.load(engine, path)


def cache(kind: str) -> str:
    return {"byte-llama": "past.key.0", "evabyte": "past.summary_key.1"}[kind]


CUTS: dict[str, Callable[[Any], Any]] = {
    "no rows": lambda x: x[:, :, :0],
    "one row less": lambda x: x[:, :, :-1],
    "one row more": lambda x: np.concatenate([x, x[:, :, :1]], 2),
    "no batch": lambda x: x[:0],
    "one of two": lambda x: x[:1],
    "narrow heads": lambda x: x[..., :3],
    "one head": lambda x: x[:, :1],
    "flat": lambda x: x.reshape(-1),
    "doubles": lambda x: x.astype(np.float64),
    "other end": lambda x: x.astype(x.dtype.newbyteorder()),
    "not a number": lambda x: np.where(x == x.max(), np.float32(np.nan), x),
    "infinite": lambda x: np.where(x == x.max(), np.float32(np.inf), x),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_caches_have_their_one_shape(
    kind: str, cut: str, engines_of: dict[str, Any], tmp_path: Path
) -> None:
    arrays = saved(engines_of[kind], tmp_path / "s.npz", seed=3)
    name = cache(kind)
    with pytest.raises(PccError, match=r"s\.npz: error\[S141\]"):
        load(engines_of[kind], tmp_path / "s.npz", arrays | {name: CUTS[cut](arrays[name])})


def test_all_caches_cut_alike_are_refused(engines_of: dict[str, Any], tmp_path: Path) -> None:
    engine = engines_of["byte-llama"]
    arrays = saved(engine, tmp_path / "s.npz", seed=3)
    half = {k: v[:, :, :256] if v.ndim == 4 else v for k, v in arrays.items()}
    with pytest.raises(PccError, match="S141"):
        load(engine, tmp_path / "s.npz", half)


FAULTS: dict[str, Callable[[Arrays], Arrays]] = {
    "negative laws": lambda a: {"draft_q": -a["draft_q"]},
    "scaled laws": lambda a: {"draft_q": a["draft_q"] * np.float32(1.01)},
    "no laws": lambda a: {"draft_q": a["draft_q"] * np.float32(np.nan)},
    "a law with signs": lambda a: {
        "draft_q": a["draft_q"] + np.resize(np.float32([0.5, -0.5]), a["draft_q"].shape)
    },
    "laws of a slot less": lambda a: {"draft_q": a["draft_q"][:, 1:]},
    "an id too large": lambda a: {"window": a["window"] + 300},
    "an id below 0": lambda a: {"window": np.where(a["window"] > 0, -1, 0)},
    "another carry": lambda a: {"window": np.roll(a["window"], 1, 0)},
    "windows of floats": lambda a: {"window": a["window"].astype(np.float32)},
    "longer": lambda a: {"length": a["length"] + 1},
    "lengths in one": lambda a: {"length": a["length"][:1]},
    "active as numbers": lambda a: {"active": a["active"].astype(np.int64)},
    "recent ids": lambda a: {"past.recent_ids": a["past.recent_ids"] - 1000},
    "one array more": lambda a: {"past.key.9": a["past.key.0"]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_values_are_checked(fault: str, engines_of: dict[str, Any], tmp_path: Path) -> None:
    engine = engines_of["byte-llama"]
    arrays = saved(engine, tmp_path / "s.npz", seed=3)
    load(engine, tmp_path / "s.npz", arrays)
    with pytest.raises(PccError, match=r"S141"):
        load(engine, tmp_path / "s.npz", arrays | FAULTS[fault](arrays))


@pytest.mark.parametrize("missing", ["draft_q", "window", "past.recent_ids", "meta"])
def test_missing_arrays(missing: str, engines_of: dict[str, Any], tmp_path: Path) -> None:
    arrays = saved(engines_of["byte-llama"], tmp_path / "s.npz", seed=3)
    arrays.pop(missing)
    with pytest.raises(PccError, match="S141"):
        load(engines_of["byte-llama"], tmp_path / "s.npz", arrays)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "ids", 0), "97"), (("rows", 0, "ids", 0), 97.5), (("rows", 0, "ids"), "abc"),
        (("rows", 0, "prompt"), []), (("rows", 0, "done_ids"), True), (("rows",), []),
        (("rows", 0, "floor"), -1), (("rows", 0, "log_probs"), []), (("stream",), (1 << 32) - 1),
        (("sampling", "top_k"), 10**30), (("sampling", "seed"), None), (("sampling",), [1]),
        (("version",), "x" * 1000), (("engine",), 3),
    ],
)  # fmt: skip
def test_what_describes_a_session_is_checked(
    place: tuple[Any, ...], value: object, engines_of: dict[str, Any], tmp_path: Path
) -> None:
    engine = engines_of["byte-llama"]
    arrays = saved(engine, tmp_path / "s.npz", seed=3)
    meta = json.loads(arrays["meta"].tobytes())
    at = meta
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with pytest.raises(PccError, match="S141") as caught:
        load(engine, tmp_path / "s.npz", arrays)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 2, "draft_top_p": 0.1}])
@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_larger_buffers_go_on(
    kind: str, options: dict[str, Any], engines_of: dict[str, Any], tmp_path: Path
) -> None:
    """A session may hold larger buffers than its length needs: it was longer once."""
    engine = engines_of[kind]
    session = engine.session(**options)
    session.generate_ids([*range(70, 90)] * 27, 10)
    session.rewind_to(33)
    assert session.rounds.bucket == 1
    session.save(tmp_path / "s.npz")
    later = Session.load(engine, tmp_path / "s.npz")
    assert session.generate(None, 40).ids == later.generate(None, 40).ids


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "."])
def test_what_is_no_file(path: str, engines_of: dict[str, Any]) -> None:
    with pytest.raises(PccError, match="C111"):
        Session.load(engines_of["evabyte"], path)
