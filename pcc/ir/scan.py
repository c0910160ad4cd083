"""A cursor over one line of hostile text: tokens = runs of one character class, nothing nested.

Every step looks at each character a bounded number of times, so reading a line is linear. Errors
say where they are, quote the text at the cursor and keep to one line.
"""

from __future__ import annotations

import json
import re

from pcc.errors import PccError
from pcc.knobs import MAX_QUOTED

_SPACE = re.compile(r"[ \t]*")
_WORD = re.compile(r"[A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"[A-Za-z0-9_.+-]*")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"')
_INTS = re.compile(r"[0-9 -]*")
_DIGITS = 19
HINT = "one node a line: %1 = op %0, [%2, %3] {key=value} : type"
REMEDY = {  # where the place of an error does not say more
    "E001": HINT,
    "E005": "define a node on a line above its first use",
    "E007": "an inline array is dtype[shape](elements), such as f32[2](0.5 0.5)",
    "E009": "give each output a name of its own",
    "E010": "docs/ir.md lists the limits of the text form",
    "E105": "check the trained weights",
}


def quote(s: str, most: int = 40) -> str:
    """Return text in quotes for a message: ASCII, no control characters, not longer than `most`."""
    return ascii(s[:most] + ("..." if len(s) > most else ""))


class Cursor:
    """A position in one line, for errors `file:line`."""

    __slots__ = ("at", "file", "line", "text")

    def __init__(self, file: str, line: int, text: str) -> None:
        self.file, self.line, self.text, self.at = file, line, text, 0

    def error(self, code: str, what: str, hint: str = "") -> PccError:
        """Return an error at this line; callers raise it."""
        short = what if len(what) <= MAX_QUOTED else what[:MAX_QUOTED] + "..."
        remedy = hint or REMEDY.get(code, "docs/ir.md says what this op takes")
        return PccError(code, " ".join(short.split()), at=f"{self.file}:{self.line}", hint=remedy)

    def expected(self, what: str, hint: str = "") -> PccError:
        """Return a syntax error that quotes the text at the cursor."""
        rest = self.text[self.at : self.at + 41]
        found = quote(rest) if rest else "the end of the line"
        return self.error("E001", f"expected {what}, got {found}", hint or HINT)

    def space(self) -> None:
        """Skip blanks."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def eat(self, token: str) -> bool:
        """Skip blanks and `token` if it is next, and say whether it was."""
        self.space()
        found = self.text.startswith(token, self.at)
        if found:
            self.at += len(token)
        return found

    def need(self, token: str, hint: str = "") -> None:
        """Skip `token` or fail."""
        if not self.eat(token):
            raise self.expected(f"'{token}'", hint)

    def word(self, what: str, number: bool = False) -> str:
        """Read a run of name (or number) characters."""
        self.space()
        end = (_NUMBER if number else _WORD).match(self.text, self.at).end()  # type: ignore[union-attr]
        if end == self.at or end - self.at > 200:
            raise self.expected(what)
        out, self.at = self.text[self.at : end], end
        return out

    def string(self) -> str:
        """Read a JSON string."""
        self.space()
        m = _STRING.match(self.text, self.at)
        if m is None:
            raise self.expected("a quoted string")
        try:
            out = json.loads(m[0])
        except ValueError:
            raise self.expected("a quoted string") from None
        self.at = m.end()
        return str(out)

    def name(self, what: str) -> str:
        """Read a plain or quoted name."""
        self.space()
        return self.string() if self.text.startswith('"', self.at) else self.word(what)

    def integer(self, what: str) -> int:
        """Read an integer of 64 bits."""
        start, s = self.at, self.word(what)
        digits = s.removeprefix("-")
        if not digits.isdecimal() or len(digits) > _DIGITS or not -(1 << 63) <= int(s) < 1 << 63:
            self.at = start
            raise self.expected(f"{what} (a 64-bit integer)")
        return int(s)

    def inside(self, closing: str) -> str:
        """Return the text up to a closing bracket, and skip both."""
        end = self.text.find(closing, self.at)
        if end < 0:
            raise self.error("E001", f"'{closing}' is missing after {quote(self.text[self.at :])}")
        out, self.at = self.text[self.at : end], end + 1
        return out

    def ints(self, most: int) -> tuple[int, ...]:
        """Read a list such as `[3 0-7]`; a-b stands for a, a+1, ..., b."""
        self.need("[")
        start, body = self.at, self.inside("]")
        if not _INTS.fullmatch(body):
            self.at = start
            raise self.expected("integers separated by spaces")
        out: list[int] = []
        for item in body.split():
            first, dash, last = item.partition("-") if item[0] != "-" else (item, "", "")
            if not first.removeprefix("-").isdigit() or (dash and not last.isdigit()):
                raise self.error("E001", f"{quote(item)} is not an integer or a range a-b")
            if max(len(first), len(last)) > _DIGITS:
                raise self.error("E010", f"{quote(item)} has too many digits")
            a, b = int(first), int(last) if dash else int(first)
            if b < a:
                raise self.error("E001", f"the range {quote(item)} is empty")
            if len(out) + b - a >= most:
                raise self.error("E010", "the lists in this file have too many elements")
            out.extend(range(a, b + 1)) if dash else out.append(a)
        return tuple(out)

    def end(self) -> None:
        """Fail unless only a comment is left."""
        self.space()
        if self.at < len(self.text) and not is_comment(self.text[self.at : self.at + 2]):
            raise self.expected("the end of the line")


def is_comment(s: str) -> bool:
    """Whether text is a comment: `// ...` or `# ...` (an array's name has no blank after #)."""
    return s.startswith(("//", "# ")) or s == "#"
