"""Runs straight PTX for all threads at once in numpy: the instructions that pcc writes itself."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
LOW = np.uint64(0xFFFFFFFF)
WORD = 4  # bytes
STORES: dict[str, Any] = {"st.global.f32": np.float32, "st.global.u32": np.uint32}


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters by name, and its instructions."""

    parameters: tuple[str, ...]
    lines: tuple[str, ...]

    def run(
        self, args: list[int], blocks: int, threads: int, order: Sequence[int] | None = None
    ) -> None:
        """Run every thread: all in step, or one after the other in the order given.

        Raises AssertionError where two threads touch a word that one of them writes: then the order
        of threads, which nobody promises, would decide.
        """
        given = dict(zip(self.parameters, args, strict=True))
        index = np.arange(blocks * threads, dtype=np.uint64)
        touched = Touched()
        for some in [index] if order is None else [index[[i]] for i in order]:
            self._some(given, some, threads, touched)
        touched.check()

    def _some(
        self, given: Mapping[str, int], index: Values, threads: int, touched: Touched
    ) -> None:
        """Run some threads in step; a branch leaves the program for those that take it."""
        r: dict[str, Values] = {
            "%ctaid.x": index // np.uint64(threads), "%tid.x": index % np.uint64(threads),
            "%ntid.x": np.full_like(index, threads),
        }  # fmt: skip
        on = np.ones(len(index), bool)
        for line in self.lines:
            guard, line = re.fullmatch(r"(?:@(%[a-z]+\d+) )?(.*)", line).groups()  # type: ignore[union-attr]
            does = on & r[guard] if guard else on
            op, _, rest = line.partition(" ")
            to, *source = [x.strip() for x in re.split(r",(?![^\[]*\])", rest)]
            if op == "bra":
                on = on & ~does
            elif op == "ret":
                return
            elif op == "ld.param.u64":
                r[to] = np.full_like(index, given[source[0].strip("[]")])
            elif op in STORES:
                touched.words(_place(r, to)[does], index[does], wrote=True)
                _store(_place(r, to)[does], r[source[0]][does].astype(STORES[op]))
            elif op == "ld.global.u32":
                touched.words(_place(r, source[0])[does], index[does], wrote=False)
                r[to] = np.zeros_like(index)  # of those that do not load: nobody reads it
                r[to][does] = _load(_place(r, source[0])[does])
            else:
                assert not guard, f"{op} under a guard"
                r[to] = _compute(op, [_operand(r, s) for s in source])


class Touched:
    """Which threads read and wrote which words."""

    def __init__(self) -> None:
        self.seen: list[tuple[Values, Values, bool]] = []

    def words(self, at: Values, threads: Values, *, wrote: bool) -> None:
        """Note a word for each thread, where it may lie."""
        assert not (at % np.uint64(WORD)).any(), "a word that is not aligned"
        self.seen.append((at, threads, wrote))

    def check(self) -> None:
        """Need that no thread touches a word that another one writes."""
        wrote = [a for a, _, w in self.seen if w]
        if not wrote:
            return
        at, threads = (np.concatenate([s[i] for s in self.seen]) for i in (0, 1))
        shared = np.isin(at, np.concatenate(wrote))
        pairs = np.unique(np.stack([at[shared], threads[shared]]), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1], "a race: the order of threads decides"


def _operand(r: dict[str, Values], text: str) -> Values:
    if text.startswith("%"):
        return r[text]
    if text.startswith("0f"):
        return np.array(int(text[2:], 16), np.uint32).view(np.float32)
    return np.uint64(int(text))  # type: ignore[return-value]


def _compute(op: str, x: list[Any]) -> Values:
    with np.errstate(over="ignore"):
        match op:
            case "cvta.to.global.u64" | "mov.u32" | "mov.b32":
                return np.asarray(x[0])
            case "mad.lo.u32":
                return np.asarray((x[0] * x[1] + x[2]) & LOW)
            case "mul.lo.u32":
                return np.asarray((x[0] * x[1]) & LOW)
            case "mul.hi.u32":
                return np.asarray((x[0] * x[1]) >> np.uint64(32))
            case "mul.wide.u32":
                return np.asarray(x[0] * x[1])
            case "add.u32":
                return np.asarray((x[0] + x[1]) & LOW)
            case "add.u64":
                return np.asarray(x[0] + x[1])
            case "div.u32":
                return np.asarray(x[0] // np.maximum(x[1], np.uint64(1)))
            case "rem.u32":
                return np.asarray(x[0] % np.maximum(x[1], np.uint64(1)))
            case "xor.b32":
                return np.asarray(x[0] ^ x[1])
            case "shr.u32":
                return np.asarray(x[0] >> x[1])
            case "setp.ge.u32":
                return np.asarray(x[0] >= x[1])
            case "setp.lt.u64":
                return np.asarray(x[0] < x[1])
            case "cvt.rn.f32.u32":
                return np.asarray(x[0], np.float32)
            case "mul.f32":
                return np.asarray(x[0] * x[1], np.float32)
    raise NotImplementedError(op)


def _place(r: dict[str, Values], text: str) -> Values:
    base, _, more = text.strip("[]").partition("+")
    return np.asarray(r[base] + np.uint64(int(more or 0)))


def _word(at: int) -> Values:
    return np.frombuffer((ctypes.c_uint32 * 1).from_address(at), np.uint32)


def _line(at: Values) -> Values | None:
    """Return the memory of words that lie one after the other, as those of a block mostly do."""
    if len(at) and (np.diff(at) == WORD).all():
        raw = (ctypes.c_uint32 * len(at)).from_address(int(at[0]))
        return np.frombuffer(raw, np.uint32)
    return None


def _load(at: Values) -> Values:
    line = _line(at)
    found = [_word(int(a))[0] for a in at] if line is None else line
    return np.array(found, np.uint64)


def _store(at: Values, values: Values) -> None:
    line, words = _line(at), values.view(np.uint32)
    if line is not None:
        line[:] = words
    else:
        for a, v in zip(at, words, strict=True):
            _word(int(a))[0] = v


def parse(text: str) -> Program:
    """Return the kernel of a PTX text."""
    parameters = tuple(re.findall(r"\.param \.u64 (\w+)", text))
    body = text[text.index("{") + 1 : text.rindex("}")]
    lines = [x.strip() for x in body.replace("DONE:", "").split(";")]
    return Program(parameters, tuple(x for x in lines if x and not x.startswith(".reg")))
