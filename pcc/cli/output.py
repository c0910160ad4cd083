"""What commands print: data on stdout; progress, logs and errors on stderr."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from pcc.files import finite

WIDEST = 200  # characters of a cell
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def printable(text: str) -> str:
    """Return a stranger's text without control characters: none reaches the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def say(line: str) -> None:
    """Print a line of the log on stderr; it may hold names from strangers' files."""
    print(printable(line), file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Say what is going on, where a person watches; files and pipes get warnings only."""
    if sys.stderr.isatty() or line.startswith("warning"):
        say(f"pcc: {line}")


def emit(value: Any) -> None:
    """Print JSON on stdout; it has no infinities and no NaN: they become null."""
    print(json.dumps(finite(value), indent=1, allow_nan=False))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout, as wide as it needs to be; long cells are cut."""
    rows = [[printable(v[:WIDEST]) for v in r] for r in rows]
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    print(printable(title))
    for r in [columns, *rows]:
        print("  " + "  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip())
