"""The statements of one job: nested scopes, each value computed once and as far out as it may be.

A name is one declaration (`const float v3 = ..`). Equal text in a scope that is still open is the
same name. A value is declared in the outermost scope that has all it reads, but never outside a
branch, whose condition may be what keeps an index inside its array.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

Ix: TypeAlias = int | str  # an index: a number, or a name
NAME = re.compile(r"\b[a-z]\d+\b")
ATOM = re.compile(r"[a-z]\d+|-?\d+|-?[\dx.a-f]+p[+-]?\d+f|true|false|-?INFINITY|lane")
ROOT, LOOP, BRANCH = "root", "loop", "branch"


@dataclass
class Scope:
    """An open block."""

    kind: str
    lines: list[str] = field(default_factory=list)
    known: dict[object, str] = field(default_factory=dict)


class Body:
    """Builds the text of a job."""

    def __init__(self) -> None:
        self.stack = [Scope(ROOT)]
        self.level: dict[str, int] = {}
        self.count = 0
        self.size = 0

    def name(self, letter: str) -> str:
        """Return a fresh name."""
        self.count += 1
        return f"{letter}{self.count}"

    def depth(self, text: object) -> int:
        """Return the index of the innermost scope that `text` reads from."""
        return max((self.level.get(x, 0) for x in NAME.findall(str(text))), default=0)

    @property
    def floor(self) -> int:
        """Index of the innermost open branch."""
        return max((i for i, s in enumerate(self.stack) if s.kind == BRANCH), default=0)

    def emit(self, line: str) -> None:
        """Add a statement to the innermost scope."""
        self.stack[-1].lines.append(line)
        self.size += 1

    def declare(self, ctype: str, value: str) -> str:
        """Return a variable that changes."""
        name = self.name("v")
        self.level[name] = len(self.stack) - 1
        self.emit(f"{ctype} {name} = {value};")
        return name

    def let(self, ctype: str, value: str) -> str:
        """Return the name of a value."""
        if ATOM.fullmatch(value):
            return value
        at = max(self.depth(value), self.floor)
        key = (ctype, value)
        found = self.recall(key)
        if found is not None:
            return found
        name = self.name("v")
        self.level[name] = at
        self.stack[at].lines.append(f"const {ctype} {name} = {value};")
        self.stack[at].known[key] = name
        self.size += 1
        return name

    def recall(self, key: object) -> str | None:
        """Return what `key` was remembered as in a scope that is open."""
        return next((s.known[key] for s in reversed(self.stack) if key in s.known), None)

    def remember(self, key: object, text: str) -> str:
        """Remember a text as long as the scope of what it reads is open."""
        self.stack[max(self.depth(text), self.floor)].known[key] = text
        return text

    @contextmanager
    def block(
        self, kind: str, head: str, variables: tuple[str, ...] = (), tail: str = "}"
    ) -> Iterator[None]:
        """Open a scope `head` { .. }; `variables` are declared by its head."""
        for v in variables:
            self.level[v] = len(self.stack)
        self.stack.append(Scope(kind))
        try:
            yield
        finally:
            done = self.stack.pop()
            self.stack[-1].lines += [head, *("  " + x for x in done.lines), tail]

    @contextmanager
    def within(self, at: int) -> Iterator[None]:
        """Work in scope `at` while inner ones stay open."""
        inner = self.stack[at + 1 :]
        del self.stack[at + 1 :]
        try:
            yield
        finally:
            self.stack += inner

    def loop(self, size: int) -> tuple[str, str]:
        """Return a fresh index and the head of its loop."""
        i = self.name("i")
        return i, f"for (int {i} = 0; {i} < {size}; ++{i}) {{"

    def either(self, ctype: str, parts: Sequence[tuple[str, Callable[[], str]]]) -> str:
        """Return a value by cases: the first condition that holds ("" for the last) decides."""
        out = self.declare_empty(ctype)
        for k, (condition, value) in enumerate(parts):
            head = f"if ({condition}) {{" if condition else "{"
            with self.block(BRANCH, ("else " if k else "") + head):
                self.emit(f"{out} = {value()};")
        return out

    def declare_empty(self, ctype: str) -> str:
        """Return a variable that a branch gives its value."""
        name = self.name("v")
        self.level[name] = len(self.stack) - 1
        self.emit(f"{ctype} {name};")
        return name


DECLARED = re.compile(r" *const (?:int|float|bool|long long) ([a-z]\d+) = ")


def alive(lines: list[str]) -> list[str]:
    """Return the statements without declarations that nothing reads."""
    used: set[str] = set()
    out = []
    for line in reversed(lines):  # a name is read after its declaration only
        found = DECLARED.match(line)
        if found and found[1] not in used:
            continue
        used.update(NAME.findall(line[found.end() :] if found else line))
        out.append(line)
    return out[::-1]


# ---------------------------------------------------------------- indices


def total(b: Body, terms: list[tuple[Ix, int]], base: int = 0) -> Ix:
    """Return base + sum of index times size, as a number or a name."""
    parts = []
    for i, k in terms:
        if isinstance(i, int):
            base += i * k
        elif k:
            parts.append(i if k == 1 else f"{i} * {k}")
    if not parts:
        return base
    return b.let("int", " + ".join([*parts, *([str(base)] if base else [])]))


def split(b: Body, flat: Ix, sizes: tuple[int, ...]) -> tuple[Ix, ...]:
    """Return the indices of an array of these sizes at a flat position."""
    out: list[Ix] = []
    for k in reversed(range(len(sizes))):
        if sizes[k] == 1:
            out.append(0)
            continue
        first = all(s == 1 for s in sizes[:k])
        if isinstance(flat, int):
            out.append(flat if first else flat % sizes[k])
            flat //= sizes[k]
        else:
            out.append(flat if first else b.let("int", f"{flat} % {sizes[k]}"))
            if not first:
                flat = b.let("int", f"{flat} / {sizes[k]}")
    return tuple(reversed(out))
