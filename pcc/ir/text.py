"""The canonical text form `.pcir`: printer and parser, side by side so that they change together.

    circuit @m {cards=[5 5]} {
      %0 = t.const {value=#sha256-3f9c...} : f32[2,3,5]
      %1 = c.categorical %0 {vars=[0 1]} : units<2x3>[{0} {1}]
      return p = %1
    }

One node a line, numbered in post-order, with its type, which the parser checks. Operand lists are
in brackets. Small arrays are inline, `f32[2](0.5 0.5)`; others are named by content hash and their
bytes come from a resource table. Equal modules print identically and parse to the same objects.
Text is hostile input: no evaluation, bounded sizes, one error line with file and line number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import KINDS, OPS, Op, Values
from pcc.ir.module import Module

Resources = Mapping[str, Values]
INLINE = 16  # elements
MAX_LINE, MAX_LINES, MAX_ITEMS = 8_000_000, 4_000_000, 4_000_000
_HEAD = re.compile(r"circuit @([A-Za-z_][\w.-]{0,200}) \{cards=(\[[^\]]*\])\} \{")
_NODE = re.compile(r"(%[0-9]+) = ([a-z]\.[a-z_]+)(?: ([%\[].*?))?(?: (\{.*\}))? : ([^:]+)")
_ARRAY = re.compile(r"(f32|i64|bool)\[([0-9,]*)\]\(([^()]*)\)")


def show(module: Module) -> str:
    """Return the module's text."""
    names: dict[Op, str] = {}
    cards = " ".join(map(str, module.cards))
    lines = [f"circuit @{module.name} {{cards=[{cards}]}} {{"]
    for i, n in enumerate(module.nodes()):
        names[n] = f"%{i}"
        operands, attrs = [], []
        for f, k in zip(n.fields, n.kinds, strict=True):
            v = getattr(n, f)
            if k == "Op":
                operands.append(names[v])
            elif k == "tuple[Op, ...]":
                operands.append("[" + ", ".join(names[a] for a in v) + "]")
            else:
                attrs.append(f"{f}={_show(v, k)}")
        args = " " + ", ".join(operands) if operands else ""
        body = " {" + ", ".join(attrs) + "}" if attrs else ""
        lines.append(f"  {names[n]} = {n.name}{args}{body} : {n.type}")
    outs = ", ".join(f"{k} = {names[v]}" for k, v in module.outputs)
    return "\n".join([*lines, f"  return {outs}", "}"]) + "\n"


def _show(v: Any, kind: str) -> str:
    if kind == "str":
        return json.dumps(v)
    if kind == "bool":
        return "true" if v else "false"
    if kind == "float":
        return repr(v)
    if kind == "tuple[int, ...]":
        return "[" + " ".join(map(str, v)) + "]"
    if kind == "Array":
        if v.value.size > INLINE:
            return f"#{v.ref}"
        items = " ".join(_item(x, v.dtype) for x in v.value.ravel())
        return f"{v.dtype}[{','.join(map(str, v.shape))}]({items})"
    return str(v)


def _item(x: Any, dtype: str) -> str:
    if dtype == "bool":
        return "true" if x else "false"
    return str(int(x)) if dtype == "i64" else repr(float(x))


def resources(module: Module) -> dict[str, Values]:
    """Return the arrays that the module's text names by hash."""
    arrays = (
        getattr(n, f)
        for n in module.nodes()
        for f, k in zip(n.fields, n.kinds, strict=True)
        if k == "Array"
    )
    return {a.ref: a.value for a in arrays if a.value.size > INLINE}


def parse(text: str, file: str = "<text>", have: Resources | None = None) -> Module:
    """Return the module that `text` describes; arrays by hash come from `have`."""
    return _Parser(file, have or {}).module(text)


class _Parser:
    def __init__(self, file: str, have: Resources) -> None:
        self.file, self.have, self.line = file, have, 0
        self.env: dict[str, Op] = {}
        self.arrays: dict[str, Array] = {}

    def fail(self, code: str, what: str, hint: str = "") -> PccError:
        return PccError(code, what, at=f"{self.file}:{self.line}", hint=hint)

    def module(self, text: str) -> Module:
        lines = text.split("\n")
        if len(lines) > MAX_LINES:
            raise self.fail("E010", f"the text has more than {MAX_LINES} lines")
        head: re.Match[str] | None = None
        for self.line, raw in enumerate(lines, 1):
            s = raw.split("//", 1)[0].strip() if '"' not in raw else raw.strip()
            if not s:
                continue
            if len(s) > MAX_LINE:
                raise self.fail("E010", f"the line is longer than {MAX_LINE} characters")
            if head is None:
                if not (head := _HEAD.fullmatch(s)):
                    raise self.fail(
                        "E001", f"expected 'circuit @name {{cards=[..]}} {{', got {s[:60]!r}"
                    )
            elif s.startswith("return "):
                return self.finish(head, s, lines)
            else:
                self.node(s)
        raise self.fail("E004", "the text ends without 'return'")

    def finish(self, head: re.Match[str], s: str, lines: list[str]) -> Module:
        outs: list[tuple[str, Op]] = []
        for part in s.removeprefix("return ").split(", "):
            name, eq, ref = part.partition(" = ")
            if not eq or not name.isidentifier() or name in dict(outs):
                raise self.fail("E001", f"cannot read the output {part[:60]!r}")
            outs.append((name, self.ref(ref)))
        rest = [x.strip() for x in lines[self.line :] if x.strip()]
        if rest != ["}"]:
            raise self.fail("E001", "expected a single '}' after 'return'")
        cards = self.ints(head[2])
        if any(c < 0 or c == 1 or c > 1 << 31 for c in cards):
            raise self.fail("E001", "a cardinality is 0 (continuous) or at least 2")
        return Module(head[1], cards, tuple(outs))

    def node(self, s: str) -> None:
        m = _NODE.fullmatch(s)
        if not m:
            raise self.fail(
                "E001", f"cannot read {s[:80]!r}", "one node a line: '%1 = op %0 {..} : type'"
            )
        dst, op, operands, attrs, type_ = m.groups()
        if op not in OPS:
            raise self.fail("E002", f"unknown op {op!r}")
        if dst in self.env:
            raise self.fail("E005", f"{dst} is defined twice")
        cls = OPS[op]
        groups = self.operands(operands or "")
        given = self.attributes(attrs or "", cls)
        kw: dict[str, Any] = {}
        for f, k in zip(cls.fields, cls.kinds, strict=True):
            if KINDS[k][1]:
                if not groups or isinstance(groups[0], tuple) != (k != "Op"):
                    raise self.fail("E006", f"'{op}' does not have the operands {operands!r}")
                kw[f] = groups.pop(0)
        if groups:
            raise self.fail("E006", f"'{op}' has {len(groups)} operands too many")
        try:
            node = cls(**kw, **given, loc=f"{self.file}:{self.line}")  # type: ignore[call-arg]
        except PccError as e:
            raise self.fail(e.code, e.what, e.hint) from None
        if str(node.type) != type_:
            raise self.fail(
                "E003", f"'{op}' has type {str(node.type)[:200]}, but the text says {type_[:200]}"
            )
        self.env[dst] = node

    def operands(self, s: str) -> list[Any]:
        out: list[Any] = []
        for part in re.findall(r"\[[^\]]*\]|[^,\s][^,]*", s):
            if part.startswith("["):
                inner = part[1:-1].strip()
                out.append(tuple(self.ref(x.strip()) for x in inner.split(",")) if inner else ())
            else:
                out.append(self.ref(part.strip()))
        return out

    def ref(self, name: str) -> Op:
        if name not in self.env:
            raise self.fail(
                "E005",
                f"{name[:40]!r} is used before it is defined",
                "nodes are listed operands first; a cycle cannot be written",
            )
        return self.env[name]

    def attributes(self, s: str, cls: type[Op]) -> dict[str, Any]:
        kinds = {f: k for f, k in zip(cls.fields, cls.kinds, strict=True) if not KINDS[k][1]}
        out: dict[str, Any] = {}
        body = s[1:-1]
        at = 0
        while at < len(body):
            m = re.compile(
                r'(\w+)=("(?:[^"\\]|\\.)*"|[^,\[\]()]*\[[^\]]*\](?:\([^()]*\))?|[^,]*)(?:, |$)'
            ).match(body, at)
            if not m or m.end() == at:
                raise self.fail("E001", f"cannot read the attributes at {body[at : at + 40]!r}")
            key, text = m[1], m[2]
            if key not in kinds or key in out:
                raise self.fail("E006", f"'{cls.name}' has no free attribute {key!r}")
            out[key] = self.value(text, kinds[key], key)
            at = m.end()
        if missing := [k for k in kinds if k not in out]:
            raise self.fail("E006", f"'{cls.name}' lacks {missing}")
        return out

    def value(self, s: str, kind: str, key: str) -> Any:
        try:
            if kind == "int":
                return int(s)
            if kind == "float":
                return float(s)
            if kind == "str":
                return json.loads(s) if s.startswith('"') else _refuse(s)
            if kind == "bool":
                return {"true": True, "false": False}[s]
            if kind == "tuple[int, ...]":
                return self.ints(s)
        except (ValueError, KeyError):
            raise self.fail(
                "E001", f"attribute {key!r}: cannot read {s[:60]!r} as {kind}"
            ) from None
        return self.array(s)

    def ints(self, s: str) -> tuple[int, ...]:
        items = s[1:-1].split()
        if not s.startswith("[") or not s.endswith("]") or len(items) > MAX_ITEMS:
            raise self.fail("E001", f"expected a list of integers, got {s[:60]!r}")
        try:
            return tuple(map(int, items))
        except ValueError:
            raise self.fail("E001", f"expected a list of integers, got {s[:60]!r}") from None

    def array(self, s: str) -> Array:
        if s.startswith("#"):
            return self.resource(s[1:])
        m = _ARRAY.fullmatch(s)
        if not m:
            raise self.fail("E001", f"cannot read the array {s[:60]!r}")
        dtype, dims, items = m[1], m[2], m[3].split()
        shape = tuple(int(d) for d in dims.split(",") if d)
        if math.prod(shape) != len(items) or len(items) > INLINE:
            raise self.fail(
                "E007", f"{len(items)} elements for the shape {shape} (at most {INLINE})"
            )
        try:
            if dtype == "bool":
                flat: list[Any] = [{"true": True, "false": False}[x] for x in items]
            else:
                flat = [int(x) if dtype == "i64" else float(x) for x in items]
            kind = {"f32": np.float32, "i64": np.int64, "bool": np.bool_}[dtype]
            return Array.of(np.array(flat, kind).reshape(shape))
        except (ValueError, KeyError, OverflowError):
            raise self.fail("E007", f"cannot read the array {s[:60]!r}") from None
        except PccError as e:
            raise self.fail(e.code, e.what, e.hint) from None

    def resource(self, ref: str) -> Array:
        if ref not in self.arrays:
            if ref not in self.have:
                raise self.fail(
                    "E008",
                    f"no bytes for the array #{ref[:60]}",
                    "keep the .safetensors file beside the .pcir file",
                )
            a = Array.of(self.have[ref])
            if a.ref != ref:
                raise self.fail("E008", f"the bytes of #{ref[:60]} have another hash")
            self.arrays[ref] = a
        return self.arrays[ref]


def _refuse(s: str) -> Any:
    raise ValueError(s)
