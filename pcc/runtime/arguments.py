"""Arguments of calls, read strictly: what is not of the kind asked for is refused, never converted.

`bytes(3)` would be three NULs and `int(2.5)` two: both are surprises in a text that looks right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pcc.errors import PccError

TEXT = str | bytes | bytearray | memoryview


def shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    try:
        found = repr(value)
    except Exception:  # a stranger's class; its name says enough
        found = ""
    return found if 0 < len(found) <= 40 else f"of type {type(value).__name__}"


def integer(
    name: str, value: object, low: int = 0, high: int | None = None, *, code: str = "S104"
) -> int:
    """Return an integer in low .. high."""
    n = _whole(value)
    if n is not None and low <= n and (high is None or n <= high):
        return n
    span = f"{low} or more" if high is None else f"{low} .. {high}"
    raise PccError(code, f"{name} is {shown(value)}", hint=f"an integer, {span}")


def number(name: str, value: object, low: float, high: float, *, code: str = "S102") -> float:
    """Return a finite number in low .. high."""
    real = isinstance(value, int | float | np.integer | np.floating)
    if real and not isinstance(value, bool) and low <= value <= high:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise PccError(code, f"{name} is {shown(value)}", hint=f"a number in {low:g} .. {high:g}")


def flag(name: str, value: object, *, code: str = "S104") -> bool:
    """Return a truth value; the string 'no' is none."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise PccError(code, f"{name} is {shown(value)}", hint="True or False")


def text(name: str, value: object, *, code: str = "S104") -> bytes:
    """Return the bytes of a text; a `str` is written in UTF-8, escaped bytes as they were."""
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            what, hint = f"{name} holds half of a surrogate pair", "give bytes"
            raise PccError(code, what, hint=hint) from None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    hint = "text or bytes, or a list of them; ids go to generate_ids"
    raise PccError(code, f"{name} is {shown(value)}", hint=hint)


def texts(name: str, value: object, *, code: str = "S104") -> list[bytes]:
    """Return the bytes of one text or of several."""
    several = _listed(value)
    if several is None:
        return [text(name, value, code=code)]
    return [text(f"{name}[{i}]", v, code=code) for i, v in enumerate(several)]


def token_ids(name: str, value: object, size: int) -> list[int]:
    """Return token ids, each in 0 .. size - 1."""
    several, out = _listed(value), []
    if several is None:
        hint = "a list of integers; text goes to generate"
        raise PccError("S104", f"{name} is {shown(value)}", hint=hint)
    for i, t in enumerate(several):
        n = _whole(t)
        if n is None or not 0 <= n < size:
            what = f"{name}[{i}] is {shown(t)}, outside the model's {size} ids"
            raise PccError("S110", what, hint=f"integers in 0 .. {size - 1}")
        out.append(n)
    return out


def id_lists(name: str, value: object, size: int) -> tuple[list[list[int]], bool]:
    """Return the ids of one prompt or of several, and whether a list of prompts was given."""
    several = _listed(value)
    if several and isinstance(several[0], Sequence | np.ndarray):
        return [token_ids(f"{name}[{i}]", v, size) for i, v in enumerate(several)], True
    return [token_ids(name, value if several is None else several, size)], False


def _whole(value: object) -> int | None:
    """Return an integer; truth values and numbers with a fraction are none."""
    plain = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return int(value) if plain else None  # type: ignore[call-overload]


def _listed(value: object) -> list[object] | None:
    """Return the members of what is no text and can be listed."""
    if isinstance(value, TEXT) or not isinstance(value, Iterable):
        return None
    try:
        return list(value)
    except TypeError:  # an array without axes
        return None
