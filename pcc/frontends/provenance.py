"""Which verifier a head was trained for, as far as its checkpoint says.

`lm.backbone_sha256` of a head's configuration lists the SHA-256 of each weight file that holds the
backbone it was trained on: as trained, and in other storage. A head on another backbone of the same
sizes drafts badly, but what is emitted stays the verifier's: so this is a warning, no error.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pcc.files import open_regular
from pcc.frontends.state import lookup, read_config

KEY = "lm.backbone_sha256"
SINGLE = "model.safetensors"
Match = Literal["matches", "differs", "unknown"]


def sha256(path: Path) -> str:
    """Return the hash of a weight file's bytes. Errors: F104 (no regular file)."""
    with open_regular(path, "F104") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def backbone_of(head: Path, verifier: Path) -> Match:
    """Compare a verifier's weight file with those that a head folder names.

    Unknown: the head names none, or the verifier's weights are in several files.
    """
    config, weights = head / "config.yaml", verifier / SINGLE
    if not config.is_file() or not weights.is_file():
        return "unknown"
    named = lookup(read_config(config), KEY, at=str(config))
    if not isinstance(named, list) or not named:
        return "unknown"
    return "matches" if sha256(weights) in named else "differs"
