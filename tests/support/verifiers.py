"""Engines of a tiny verifier and head of every kind (`pcc.conformance.verifiers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import pcc
from pcc.conformance.models import Values
from pcc.conformance.verifiers import (
    CHUNK,
    KINDS,
    LORA_RANK,
    SUBWORD,
    WINDOW,
    byte_llama,
    checkpoint,
    evabyte,
    gpt,
    llama,
    lora,
)

__all__ = [
    "CHUNK", "KINDS", "LORA_RANK", "SUBWORD", "WINDOW", "bundle", "byte_llama", "checkpoint",
    "engine", "evabyte", "gpt", "ids_of_bytes", "llama", "lora",
]  # fmt: skip


def bundle(kind: str, path: Path, **how: Any) -> Path:
    """Compile a verifier of a kind with its head below `path`."""
    source, folder = KINDS[kind](path)
    return pcc.compile(source, verifier=folder, out=path / "m.pcc", **how).path


def engine(kind: str, path: Path, *, threads: int = 1, **options: Any) -> Any:
    """Compile a verifier of a kind with its head below `path`, and open the bundle."""
    how = {"max_seq": 256, "chunk": 8, "queries": ["draft"], "validate": False, **options}
    made = pcc.load(bundle(kind, path, **how), threads=threads)
    assert {"byte-llama": "recent_ids", "evabyte": "summary_key.0"}.get(kind, "key.0") in {
        s["name"] for s in made.generation()["states"]
    }
    assert made.manifest["verifier"]["draft_layers"] == (kind == "lora")
    return made


def ids_of_bytes(engine: Any) -> Values:
    """Token ids of the 256 bytes."""
    offset = engine.manifest["vocabulary"]["byte_offset"]
    return np.arange(256) + offset
