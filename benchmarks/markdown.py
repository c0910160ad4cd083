"""Tables of results as Markdown, and their places in pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table: a line of columns, one of rules, one for each row."""
    lines = [columns, *rows]
    out = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([out[0], "|" + "---|" * len(columns), *out[1:]])


def placed(text: str, start: str, stop: str, made: str) -> str:
    """Return a page with `made` between its markers. A page without them is a ValueError."""
    before, rest = text.split(start)
    return f"{before}{start}{made}\n{stop}{rest.split(stop)[1]}"
