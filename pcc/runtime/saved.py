"""Sessions on disk: an `.npz` of plain arrays, tied to the engine that made it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.arrays import read_npz
from pcc.runtime.rounds import Rounds
from pcc.runtime.rows import Row
from pcc.runtime.session import Session, streams_of

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

VERSION = 1


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
            raise PccError("S141", f"the session has version {meta['version']}", at=str(path))
        if meta["engine"] != _identity(engine):
            raise PccError(
                "S141", "the session was made by another engine", at=str(path),
                hint="load it with the bundle that it was saved from",
            )  # fmt: skip
        session = Session(engine, stream=meta["stream"], **meta["sampling"])
        session.rows = [_row(session, r) for r in meta["rows"]]
        streams = streams_of(session.stream_id, len(session.rows))
        session.rounds = Rounds(engine, session.sampling, streams)
        window = arrays["window"]
        if ((window < 0) | (window >= session.vocabulary.size)).any():
            raise PccError("S141", "the saved window holds no token ids", at=str(path))
        session.rounds.restore(arrays)
        for row, length in zip(session.rows, session.rounds.length, strict=True):
            if int(length) != len(row.prompt) + len(row.ids) - 1:
                raise PccError("S141", "lengths and tokens of the session differ", at=str(path))
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as e:
        what = f"not a saved session: {type(e).__name__} {e}"
        raise PccError("S141", what, at=str(path)) from None
    return session


def _row(session: Session, saved: Any) -> Row:
    size = session.vocabulary.size
    ids = [int(t) for t in saved["ids"]]
    prompt = [int(t) for t in saved["prompt"]]
    if not all(0 <= t < size for t in [*prompt, *ids]) or not ids:
        raise ValueError("a token is outside the vocabulary")
    row = Row(session.vocabulary, prompt)
    logs = [float(v) for v in saved["log_probs"]]
    if len(logs) != len(ids):
        raise ValueError("tokens and log-probabilities differ in number")
    row.decide(ids, logs)
    done, text = int(saved["done_ids"]), int(saved["done_bytes"])
    row.floor = int(saved["floor"])
    if not (
        0 <= done <= len(ids) and 0 <= row.floor <= len(row.text) and 0 <= text <= len(row.text)
    ):
        raise ValueError("delivered more than was decided")
    row.finish(done, text)
    return row


def _identity(engine: Engine) -> str:
    """Return what ties a session to a bundle: the hash of its weights and graphs."""
    import hashlib

    files = engine.manifest["files"]
    graphs = sorted((k, v) for k, v in files.items() if k.startswith("graphs/"))
    return hashlib.sha256(json.dumps(graphs).encode()).hexdigest()
