"""Pack the running Python's standard library: training text, and held-out modules without copies.

    python examples/train/stdlib.py .train/stdlib.npz

Training: every .py file below the library's root, tests included; not generated tables, vendored
packages, machine-dependent names, the held-out modules and their tests. Held out: the modules
below, without each top-level block of which a quarter or more of the 48-byte shingles occur in the
training text. Files come in the order of their paths; the SHA-256 of both parts is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

from pcc.train import data

HELD_OUT = (
    "argparse.py", "bisect.py", "calendar.py", "cmd.py", "configparser.py", "copy.py", "csv.py",
    "difflib.py", "filecmp.py", "fileinput.py", "fractions.py", "glob.py", "gzip.py", "heapq.py",
    "http/cookies.py", "json/encoder.py", "netrc.py", "pprint.py", "queue.py", "sched.py",
    "shelve.py", "smtplib.py", "statistics.py", "textwrap.py", "timeit.py", "zipapp.py",
)  # fmt: skip
SKIP_FOLDERS = {
    "__pycache__", "encodings", "ensurepip", "lib2to3", "pydoc_data", "site-packages",
    "_vendor", "turtledemo", "cjkencodings", "data",
}  # fmt: skip
SKIP_PREFIXES = ("_sysconfigdata", "config-")
MAX_BYTES = 400_000  # a longer file is a table


def skipped(parts: tuple[str, ...]) -> bool:
    """Report whether a path is generated, vendored, or about a held-out module."""
    if SKIP_FOLDERS & set(parts) or any(p.startswith(SKIP_PREFIXES) for p in parts):
        return True
    about = {f"test_{Path(h).stem}" for h in HELD_OUT} | {"test_json", "test_http_cookies"}
    return any(p.removesuffix(".py") in about for p in parts)


def read() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return (train, held out) files by path below the library's root."""
    root = Path(os.__file__).parent
    train: dict[str, bytes] = {}
    held: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        raw = path.read_bytes()
        if skipped(parts) or not raw or len(raw) > MAX_BYTES:
            continue
        (held if name in HELD_OUT else train)[name] = raw
    return train, held


def main() -> None:
    """Write the packed file given on the command line, and say what is in it."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ".train/stdlib.npz")
    train, held = read()
    kept, gone = data.remove_near_duplicates(held, train.values())
    data.save_packed(out, train, kept)
    card = {
        "python": platform.python_version(),
        "train": {"files": len(train), "bytes": sum(map(len, train.values()))},
        "heldout": {"files": len(kept), "bytes": sum(map(len, kept.values()))},
        "removed_as_near_duplicates": gone,
        "train_sha256": data.pack(train).sha256,
        "heldout_sha256": hashlib.sha256(b"".join(kept.values())).hexdigest(),
    }
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
