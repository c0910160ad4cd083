"""Engines of the tiny verifiers of `pcc.conformance`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pcc
from pcc.conformance.models import (
    HEADS,
    INNER,
    LAYERS,
    WIDTH,
    Values,
    codes,
    decoder_tensors,
    head,
    llama_folder,
    outputs,
    settings,
    write_folder,
)

__all__ = [
    "HEADS", "INNER", "LAYERS", "WIDTH", "Values", "codes", "decoder_tensors", "engine", "head",
    "llama_folder", "outputs", "settings", "write_folder",
]  # fmt: skip


def engine(path: Path, kind: str = "hmm", n: int = 4, r: int = 3, **options: Any) -> Any:
    """Compile a tiny verifier and head below `path` and open the bundle with one thread."""
    folder = llama_folder(path / "model", **options.pop("config", {}))
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    how = {"max_seq": 256, "chunk": 8, "queries": ["draft"], **options}
    out = path / f"{kind}.pcc"
    pcc.compile(head(kind, n, r, vocab=vocab), verifier=folder, out=out, **how)
    return pcc.load(out, threads=1)
