"""Options of a target's own, as `--engine NAME=VALUE` gives them."""

from __future__ import annotations

from collections.abc import Sequence

from pcc.errors import PccError


def engine_options(given: Sequence[str] | None) -> dict[str, str]:
    """Return the options by name. Errors: E430 where one has no value, or comes twice."""
    out: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PccError("E430", f"--engine {text[:40]!r}", hint="NAME=VALUE, e.g. level=1")
        if name in out:
            raise PccError("E430", f"--engine {name[:40]} is given twice")
        out[name] = value
    return out
