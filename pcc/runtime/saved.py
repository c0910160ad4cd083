"""Sessions on disk: an `.npz` of plain arrays, tied to the engine that made it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError
from pcc.knobs import MAX_QUOTED
from pcc.runtime.arguments import integer, token_ids
from pcc.runtime.arrays import read_npz
from pcc.runtime.buffers import Values
from pcc.runtime.dtypes import STORED
from pcc.runtime.rounds import Rounds
from pcc.runtime.rows import Row
from pcc.runtime.session import Session, streams_of

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

VERSION = 1
LAW = 1e-3  # how far a row of float32 numbers may be from summing to one


def save(session: Session, path: Path) -> None:
    """Write a session; the file appears whole or not at all."""
    if session.rounds is None:
        raise PccError("S140", "the session has no sequence to save")
    meta = {
        "version": VERSION,
        "engine": _identity(session.engine),
        "sampling": dataclasses.asdict(session.sampling),
        "stream": session.stream_id,
        "rows": [
            {"prompt": r.prompt, "ids": r.ids, "log_probs": r.log_probs,
             "done_ids": r.done_ids, "done_bytes": r.done_bytes, "floor": r.floor}
            for r in session.rows
        ],
    }  # fmt: skip
    arrays = session.rounds.snapshot()
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    data = io.BytesIO()
    np.savez(data, **arrays)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data.getbuffer())
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as e:
        raise PccError("S142", f"cannot write the session: {e.strerror}", at=str(path)) from None


def load(engine: Engine, path: Path) -> Session:
    """Read a session that `save` wrote, for the same engine."""
    arrays = read_npz(path)
    try:
        meta = json.loads(bytes(arrays.pop("meta")).decode())
        if meta["version"] != VERSION:
            raise PccError("S141", f"the session has version {str(meta['version'])[:40]}")
        if meta["engine"] != _identity(engine):
            raise PccError(
                "S141", "the session was made by another engine",
                hint="load it with the bundle that it was saved from",
            )  # fmt: skip
        session = Session(engine, stream=meta["stream"], **meta["sampling"])
        session.rows = [_row(session, r) for r in meta["rows"]]
        if not session.rows:
            raise ValueError("there are no sequences")
        streams = streams_of(session.stream_id, len(session.rows))
        session.rounds = Rounds(engine, session.sampling, streams)
        session.rounds.restore(arrays, _check(session, arrays))
    except PccError as e:
        code = e.code if e.code.startswith("X") else "S141"
        raise PccError(code, e.what, at=str(path), hint=e.hint) from None
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError,
            OverflowError) as e:  # fmt: skip
        what = f"not a saved session: {type(e).__name__} {str(e)[:MAX_QUOTED]}"
        raise PccError("S141", what, at=str(path)) from None
    return session


def _check(session: Session, arrays: Mapping[str, Values]) -> int:
    """Return the number of the bucket whose sizes the arrays have; every value must be possible.

    Nothing is cut or filled up: a cache of other sizes would give another text without a word.
    """
    rounds, size = session.rounds, session.vocabulary.size
    assert rounds is not None
    batch, n = rounds.batch, rounds.n
    fixed: dict[str, tuple[type, tuple[int, ...]]] = {
        "length": (np.int64, (batch,)), "active": (np.bool_, (batch,)),
        "window": (np.int64, (batch, n)),
    }  # fmt: skip
    if not session.sampling.greedy:
        fixed["draft_q"] = (np.float32, (batch, n - 1, size))
    specs = [f"past.{s['name']}" for s in rounds.spec["states"]]
    if set(arrays) != {*fixed, *specs}:
        wrong = ", ".join(sorted(set(arrays) ^ {*fixed, *specs}))
        raise PccError("S141", f"missing or unknown in the saved session: {wrong[:MAX_QUOTED]}")
    for name, (dtype, shape) in fixed.items():
        _like(name, arrays[name], dtype, shape)
    ends = [len(row.prompt) + len(row.ids) - 1 for row in session.rows]
    if arrays["length"].tolist() != ends:
        raise PccError("S141", "lengths and tokens of the session differ")
    _ids("window", arrays["window"], size)
    if arrays["window"][:, 0].tolist() != [row.ids[-1] for row in session.rows]:
        raise PccError("S141", "the saved windows do not begin with the last tokens")
    if "draft_q" in fixed:
        _laws(arrays["draft_q"])
    return _states(session, {k: arrays[k] for k in specs}, max(ends))


def _states(session: Session, arrays: Mapping[str, Values], length: int) -> int:
    rounds = session.rounds
    assert rounds is not None
    bucket = _bucket(rounds, {k: v.shape for k, v in arrays.items()}, length)
    for spec in rounds.spec["states"]:
        name, value = spec["name"], arrays[f"past.{spec['name']}"]
        shape = (rounds.batch, *rounds.buckets[bucket]["states"][name])
        _like(name, value, STORED[spec["dtype"]], shape)
        if spec["dtype"] == "i64":
            _ids(name, value, session.vocabulary.size)
        elif not _finite(value, spec["dtype"]):
            raise PccError("S141", f"the saved '{name}' holds NaN or infinity")
    return bucket


def _finite(value: Values, dtype: str) -> bool:
    if dtype == "bf16":  # stored as its bits: no exponent may be all ones
        return not bool(((value & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(value).all())


def _bucket(rounds: Rounds, shapes: Mapping[str, tuple[int, ...]], length: int) -> int:
    """Return the smallest bucket with these shapes that holds another round."""
    for i, b in enumerate(rounds.buckets):
        full = {f"past.{k}": (rounds.batch, *v) for k, v in b["states"].items()}
        room = min(length, rounds.max_seq) + rounds.n <= b["rows"]
        if room and all(full[k] == s for k, s in shapes.items()):
            return i
    found = ", ".join(f"{k} {list(s)}" for k, s in shapes.items())
    what = f"the saved states fit no buffers of {length} tokens: {found}"
    raise PccError("S141", what[:MAX_QUOTED])


def _like(name: str, value: Values, dtype: Any, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or value.shape != shape:
        what = f"the saved '{name}' is {value.dtype}{list(value.shape)}"
        raise PccError("S141", what, hint=f"it must be {np.dtype(dtype)}{list(shape)}")


def _ids(name: str, value: Values, size: int) -> None:
    if ((value < 0) | (value >= size)).any():
        raise PccError("S141", f"the saved '{name}' holds no token ids")


def _laws(q: Values) -> None:
    """The test `u q < p` is exact only for laws: each row sums to one."""
    total = q.sum(-1, dtype=np.float64)
    if not ((q >= 0) & (q <= 1 + LAW)).all() or not (np.abs(total - 1) <= LAW).all():
        raise PccError("S141", "the saved 'draft_q' holds rows that are no laws")


def _row(session: Session, saved: Any) -> Row:
    size = session.vocabulary.size
    ids = token_ids("ids", saved["ids"], size)
    prompt = token_ids("prompt", saved["prompt"], size)
    if not ids or not 0 < len(prompt) <= session.max_seq:
        raise ValueError("a row has no tokens, or too many")
    row = Row(session.vocabulary, prompt)
    logs = [float(v) for v in saved["log_probs"]]
    if len(logs) != len(ids):
        raise ValueError("tokens and log-probabilities differ in number")
    row.decide(ids, logs)
    done = integer("done_ids", saved["done_ids"], 0, len(ids))
    text = integer("done_bytes", saved["done_bytes"], 0, len(row.text))
    row.floor = integer("floor", saved["floor"], 0, len(row.text))
    row.finish(done, text)
    return row


def _identity(engine: Engine) -> str:
    """Return what ties a session to a bundle: the hash of its weights and graphs."""
    import hashlib

    files = engine.manifest["files"]
    graphs = sorted((k, v) for k, v in files.items() if k.startswith(("graphs/", "engines/")))
    return hashlib.sha256(json.dumps(graphs).encode()).hexdigest()
