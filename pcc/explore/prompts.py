"""The prompts of an exploration, and what identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pcc import prompts
from pcc.explore.config import Prompts


def read(p: Prompts) -> list[bytes]:
    """Return at most `limit` prompts, spread evenly over what is there. Errors: G106."""
    return prompts.read(Path(p.path), limit=p.limit, most=p.bytes, code="G106")


def digest(texts: list[bytes]) -> str:
    """Return the hash of the prompts that are used, in order."""
    h = hashlib.sha256()
    for p in texts:
        h.update(len(p).to_bytes(8, "little") + p)
    return h.hexdigest()
