"""Runs straight PTX for all threads at once in numpy: the instructions that pcc writes itself."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters by name, and its instructions."""

    parameters: tuple[str, ...]
    lines: tuple[str, ...]

    def run(self, args: list[int], blocks: int, threads: int) -> None:
        """Run every thread; a branch leaves the program for those that take it."""
        given = dict(zip(self.parameters, args, strict=True))
        index = np.arange(blocks * threads, dtype=np.uint64)
        r: dict[str, Values] = {
            "%ctaid.x": index // np.uint64(threads), "%tid.x": index % np.uint64(threads),
            "%ntid.x": np.full_like(index, threads),
        }  # fmt: skip
        on = np.ones(len(index), bool)
        for line in self.lines:
            guard, line = re.fullmatch(r"(?:@(%p\d+) )?(.*)", line).groups()  # type: ignore[union-attr]
            op, _, rest = line.partition(" ")
            to, *source = [x.strip() for x in re.split(r",(?![^\[]*\])", rest)]
            if op == "bra":
                on = on & ~r[guard]
            elif op == "ret":
                return
            elif op == "ld.param.u64":
                r[to] = np.full_like(index, given[source[0].strip("[]")])
            elif op.startswith("st.global"):
                _store(r, to, source[0], on)
            elif op.startswith("ld.global"):
                r[to] = _load(r, source[0], on)
            else:
                r[to] = _compute(op, [_operand(r, s) for s in source])


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
            case "cvt.rn.f32.u32":
                return np.asarray(x[0], np.float32)
            case "mul.f32":
                return np.asarray(x[0] * x[1], np.float32)
    raise NotImplementedError(op)


def _place(r: dict[str, Values], text: str) -> Values:
    base, _, more = text.strip("[]").partition("+")
    return np.asarray(r[base] + np.uint64(int(more or 0)))


def _load(r: dict[str, Values], text: str, on: Values) -> Values:
    at = _place(r, text)
    found = [
        ctypes.c_uint32.from_address(int(a)).value if o else 0 for a, o in zip(at, on, strict=True)
    ]
    return np.array(found, np.uint64)


def _store(r: dict[str, Values], to: str, source: str, on: Values) -> None:
    for a, v, o in zip(_place(r, to), r[source], on, strict=True):
        if o:
            ctypes.c_float.from_address(int(a)).value = float(v)


def parse(text: str) -> Program:
    """Return the kernel of a PTX text."""
    parameters = tuple(re.findall(r"\.param \.u64 (\w+)", text))
    body = text[text.index("{") + 1 : text.rindex("}")]
    lines = [x.strip() for x in body.replace("DONE:", "").split(";")]
    return Program(parameters, tuple(x for x in lines if x and not x.startswith(".reg")))
