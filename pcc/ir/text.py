"""The canonical text form `.pcir`: printer and parser, side by side so that they change together.

    circuit @m {cards=[5 5]} {
      %0 = t.const {value=#sha256-3f9c...} : f32[2,3,5]
      %1 = c.categorical %0 {vars=[0 1]} : units<2x3>[{0} {1}]
      return p = %1
    }

One node a line, numbered in post-order, with its type, which the parser checks. `Op` fields are
bare names, `tuple[Op, ...]` fields are in brackets, in field order. Arrays of at most 16 elements
are inline and exact, `f32[2](0.5 -inf)`; others are named by content hash and their bytes come from
a resource table. `show(parse(s)) == s` for printed text; `parse(show(m))` has the roots of `m`.

Text is hostile input: nothing is evaluated, nothing recurses, sizes are bounded before memory is
taken, and each fault is one line with file, line number and remedy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array, kind_of
from pcc.ir.budget import Budget
from pcc.ir.core import KINDS, OPS, Op, Values
from pcc.ir.literals import TRUTH, read_array, read_float, show_array, show_ints
from pcc.ir.module import Module
from pcc.ir.places import place
from pcc.ir.scan import Cursor, is_comment, quote
from pcc.ir.types import NARROW, Type, Units, show_scope
from pcc.knobs import INLINE_ELEMENTS, MAX_LINE, MAX_LINES, MAX_SCOPE_RUNS

# By hash: numbers, or a lazy array whose hash is known.
Resources: TypeAlias = Mapping[str, Values] | Callable[[str], "Values | Array | None"]

# ---------------------------------------------------------------- printer


def show(module: Module, *, loc: bool = False) -> str:
    """Return the module's text, with `loc("file":line)` on request."""
    lines = Lines(module.nodes(), loc)
    outs = ", ".join(f"{_name(k)} = {lines.names[v]}" for k, v in module.outputs)
    head = f"circuit @{_name(module.name)} {{cards={show_ints(module.cards)}}} {{"
    body = (f"  {lines.line(n)}" for n in lines.names)
    return "\n".join([head, *body, f"  return {outs}".rstrip(), "}"]) + "\n"


class Lines:
    """Prints nodes, named by their place in an order in which operands come first."""

    def __init__(self, order: Iterable[Op], loc: bool = False) -> None:
        self.names = {n: f"%{i}" for i, n in enumerate(order)}
        self.loc = loc

    def line(self, n: Op) -> str:
        """Return the line of a node."""
        operands, attrs = [], []
        for f, k in zip(n.fields, n.kinds, strict=True):
            v = getattr(n, f)
            if k == "Op":
                operands.append(self.name(v))
            elif k == "tuple[Op, ...]":
                operands.append("[" + ", ".join(map(self.name, v)) + "]")
            else:
                attrs.append(f"{f}={_show(v, k)}")
        args = " " + ", ".join(operands) if operands else ""
        body = " {" + ", ".join(attrs) + "}" if attrs else ""
        where = f" loc({_place(n.loc)})" if self.loc and n.loc else ""
        return f"{self.names[n]} = {n.name}{args}{body} : {show_type(n.type)}{where}"

    def name(self, n: Op) -> str:
        """Return an operand's name; `%?` for one that the order does not hold."""
        return self.names.get(n, "%?")


def show_type(t: Type) -> str:
    """Return `str(t)`, except that a scope of many runs is its size and a digest."""
    if not isinstance(t, Units):
        return str(t)
    names: dict[int, str] = {}  # equal scopes are one string: there may be very many folds
    words = (names.get(s) or names.setdefault(s, _scope(s)) for s in t.scopes)
    return f"units<{t.folds}x{t.k}>[{' '.join(words)}]"


def _declares(text: str, t: Type) -> bool:
    """Whether `text` is the printed type; a text too short for the folds is not compared."""
    least = 4 * t.folds if isinstance(t, Units) else 0
    return len(text) >= least and text == show_type(t)


def _scope(mask: int) -> str:
    if (mask & ~(mask << 1)).bit_count() <= MAX_SCOPE_RUNS:
        return show_scope(mask)
    data = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    return f"{{{mask.bit_count()} variables {hashlib.sha256(data).hexdigest()[:16]}}}"


def _name(s: str) -> str:
    plain = s.isascii() and s.replace("_", "a").replace("-", "a").replace(".", "a").isalnum()
    return s if plain and len(s) <= 200 else json.dumps(s)


def _place(loc: str) -> str:
    file, colon, line = loc.rpartition(":")
    return f"{json.dumps(file)}:{line}" if colon and line.isdecimal() else json.dumps(loc)


def _show(v: Any, kind: str) -> str:
    match kind:
        case "str":
            return json.dumps(v)
        case "bool":
            return "true" if v else "false"
        case "tuple[int, ...]":
            return show_ints(v)
        case "Array":
            return show_array(v)
        case _:
            return repr(v)


def large_arrays(module: Module) -> dict[str, Array]:
    """Return the arrays that the module's text names by hash."""
    arrays = (
        getattr(n, f)
        for n in module.nodes()
        for f, k in zip(n.fields, n.kinds, strict=True)
        if k == "Array"
    )
    return {a.ref: a for a in arrays if a.size > INLINE_ELEMENTS}


def resources(module: Module) -> dict[str, Values]:
    """Return the numbers of the arrays that the module's text names by hash."""
    return {ref: a.value for ref, a in large_arrays(module).items()}


# ---------------------------------------------------------------- parser


def parse(text: str, file: str = "<text>", resources: Resources | None = None) -> Module:
    """Return the module that `text` describes; arrays by hash come from `resources`."""
    table = {} if resources is None else resources
    return _Parser(file, table if callable(table) else table.get).module(text)


class _Parser:
    def __init__(self, file: str, find: Callable[[str], Values | Array | None]) -> None:
        self.file, self.find = file, find
        self.env: dict[str, Op] = {}
        self.arrays: dict[str, Array] = {}
        self.cards: tuple[int, ...] = ()
        self.budget = Budget()

    def module(self, text: str) -> Module:
        start = Cursor(self.file, 1, "")
        if text.count("\n") > MAX_LINES:
            raise start.error("E010", f"the text has more than {MAX_LINES} lines")
        name, outputs, closed, number = None, None, False, 0
        for number, raw in enumerate(text.split("\n"), 1):
            s = raw.strip()
            if not s or is_comment(s):
                continue
            c = Cursor(self.file, number, s)
            if len(s) > MAX_LINE:
                raise c.error("E010", f"the line is longer than {MAX_LINE} characters")
            if name is None:
                name = self.head(c)
            elif outputs is None:
                outputs = self.statement(c)
            elif not closed:
                c.need("}", "the text ends with '}' after 'return'")
                c.end()
                closed = True
            else:
                raise c.error("E001", f"{quote(s)} comes after the end of the circuit")
        if name is None or outputs is None:
            last = Cursor(self.file, number, "")
            what = "'circuit @name {cards=[..]} {'" if name is None else "'return name = %0'"
            raise last.error("E004", f"the text ends without {what}", "the file may be cut off")
        if not closed:
            raise Cursor(self.file, number, "").expected("'}' after 'return'")
        return Module(name, self.cards, outputs)

    def head(self, c: Cursor) -> str:
        form = "the first line is: circuit @name {cards=[2 3]} {"
        c.need("circuit", form)
        c.need("@", form)
        name = c.name("the circuit's name")
        for token in ("{", "cards", "="):
            c.need(token, form)
        self.cards = self.budget.ints(c)
        for token in ("}", "{"):
            c.need(token, form)
        c.end()
        if any(not 0 <= n < 1 << 31 for n in self.cards):
            raise c.error("E001", "a cardinality is below 0 or above 2^31", "0 means continuous")
        return name

    def statement(self, c: Cursor) -> tuple[tuple[str, Op], ...] | None:
        if c.text.startswith("%"):
            self.node(c)
            return None
        c.need("return", "a line defines a node, '%0 = ..', or is 'return name = %0'")
        outs: dict[str, Op] = {}
        while not outs or c.eat(","):
            name = c.name("an output's name")
            if name in outs:
                raise c.error("E009", f"the output {quote(name)} is named twice")
            c.need("=")
            outs[name] = self.ref(c)
        c.end()
        return tuple(outs.items())

    def node(self, c: Cursor) -> None:
        c.need("%")
        name = c.word("a node's name")
        if name in self.env:
            raise c.error("E009", f"%{name[:40]} is defined twice", "give each node its own name")
        c.need("=")
        op = c.word("an op")
        if op not in OPS:
            near = difflib.get_close_matches(op[:40], OPS, 1)
            hint = f"did you mean '{near[0]}'?" if near else "docs/ir.md lists them"
            raise c.error("E002", f"unknown op {quote(op)}", hint)
        cls = OPS[op]
        values = self.operands(c, cls)
        self.attributes(c, cls, values)
        c.need(":")
        c.space()
        rest = c.text[c.at :]
        plain = not (" loc(" in rest or " //" in rest or " #" in rest)
        type_, loc = (rest, "") if plain else self.tail(c, rest)
        node = self.build(c, cls, values, loc or f"{self.file}:{c.line}")
        if not _declares(type_, node.type):
            raise c.error(
                "E003",
                f"'{op}' has type {str(node.type)[:90]}, but the text says {quote(type_, 90)}",
                "correct the type, or the operands that it follows from",
            )
        self.env[name] = node

    def tail(self, c: Cursor, rest: str) -> tuple[str, str]:
        """Split the end of a line into type and `loc(..)`; drop the comment."""
        marks = (" loc(", " //", " # ")
        at = min((i for m in marks if (i := rest.find(m)) >= 0), default=len(rest))
        c.at += at
        loc = ""
        if c.eat("loc("):
            loc = c.string()
            if c.eat(":"):
                loc += f":{c.integer('a line number')}"
            c.need(")")
        c.end()
        return rest[:at].rstrip(), loc

    def build(self, c: Cursor, cls: type[Op], values: dict[str, Any], loc: str) -> Op:
        fields = zip(cls.fields, cls.kinds, strict=True)
        self.budget.read(c, [values[f] for f, k in fields if KINDS[k][1]])
        try:
            node = cls(**values, loc=loc)  # type: ignore[call-arg]
            place(node, loc, again=True)  # an equal node may come from another file
        except PccError as e:
            raise c.error(e.code, e.what, e.hint) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            hint = "check its operands and attributes"
            raise c.error("E006", f"'{cls.name}' cannot be built: {e}", hint) from None
        self.budget.take(c, node)
        return node

    def ref(self, c: Cursor) -> Op:
        c.need("%", "an operand is the name of a node, '%0'")
        name = c.word("a node's name")
        node = self.env.get(name)
        if node is None:
            raise c.error(
                "E005",
                f"%{name[:40]} is used before it is defined",
                "list operands first; a cycle cannot be written",
            )
        return node

    def operands(self, c: Cursor, cls: type[Op]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f, k in zip(cls.fields, cls.kinds, strict=True):
            if not KINDS[k][1]:
                continue
            if out:
                c.need(",", f"'{cls.name}' takes {_signature(cls)}")
            if k == "Op":
                c.space()
                if not c.text.startswith("%", c.at):
                    raise c.error("E006", f"'{cls.name}' needs {f!r}", _signature(cls))
                out[f] = self.ref(c)
                continue
            if not c.eat("["):
                raise c.error("E006", f"'{cls.name}' needs the list {f!r}", _signature(cls))
            many: list[Op] = []
            while not c.eat("]"):
                if many:
                    c.need(",")
                many.append(self.ref(c))
            out[f] = tuple(many)
        c.space()
        if c.text[c.at : c.at + 1] in (",", "%", "["):
            raise c.error("E006", f"'{cls.name}' has too many operands", _signature(cls))
        return out

    def attributes(self, c: Cursor, cls: type[Op], out: dict[str, Any]) -> None:
        kinds = {f: k for f, k in zip(cls.fields, cls.kinds, strict=True) if not KINDS[k][1]}
        if c.eat("{"):
            first = True
            while first or c.eat(","):
                first = False
                key = c.word("an attribute")
                if key not in kinds or key in out:
                    why = "is given twice" if key in kinds else "is unknown"
                    hint = f"'{cls.name}' has {', '.join(kinds) or 'no attributes'}"
                    raise c.error("E006", f"attribute {quote(key)} {why}", hint)
                c.need("=")
                out[key] = self.value(c, kinds[key], key)
            c.need("}")
        for key in kinds:
            if key not in out and not hasattr(cls, key):
                raise c.error("E006", f"'{cls.name}' lacks the attribute {key!r}", _signature(cls))

    def value(self, c: Cursor, kind: str, key: str) -> Any:
        match kind:
            case "int":
                return c.integer(f"{key} as an integer")
            case "float":
                return read_float(c, c.word(f"{key} as a number", number=True))
            case "str":
                return c.string()
            case "bool":
                word = c.word(f"{key} as true or false")
                if word not in TRUTH:
                    raise c.error("E001", f"{key} is true or false, not {quote(word)}")
                return TRUTH[word]
            case "Array":
                return self.array(c)
            case _:
                return self.int_list(c, key)

    def int_list(self, c: Cursor, key: str) -> tuple[int, ...]:
        values = self.budget.ints(c)
        if key in ("shape", "perm"):
            self.budget.rank(c, len(values))
        if key == "vars" and values:
            if not 0 <= min(values) <= max(values) < len(self.cards):
                what = f"the variables {show_ints(values)[:60]} are not below {len(self.cards)}"
                raise c.error("E106", what, "cards lists one number for each variable")
            self.budget.mask(c, sum(values))
        return values

    def array(self, c: Cursor) -> Array:
        if c.eat("#"):
            return self.resource(c, c.word("an array's hash"))
        return self.intern(c, read_array(c))

    def intern(self, c: Cursor, value: object) -> Array:
        try:
            a = np.asarray(value)
            return Array.of(a, kind_of(a) if kind_of(a) in NARROW else "")
        except PccError as e:
            raise c.error(e.code, e.what, e.hint) from None

    def resource(self, c: Cursor, ref: str) -> Array:
        if ref not in self.arrays:
            value = self.find(ref)
            if value is None:
                hint = "keep the .safetensors file beside the .pcir file"
                raise c.error("E008", f"there are no bytes for the array #{ref[:60]}", hint)
            if isinstance(value, Array):  # lazy, from a file that was checked as a whole
                a, same = value, True
            else:
                a = self.intern(c, value)
                same = a.dtype == kind_of(np.asarray(value))
            if a.ref != ref or not same:
                hint = "the arrays belong to another version of this file"
                raise c.error("E008", f"the bytes of #{ref[:60]} have the hash {a.ref}", hint)
            self.arrays[ref] = a
        return self.arrays[ref]


def _signature(cls: type[Op]) -> str:
    shape = {"Op": "%{}", "tuple[Op, ...]": "[{}, ..]"}
    fields = list(zip(cls.fields, cls.kinds, strict=True))
    operands = ", ".join(shape[k].format(f) for f, k in fields if k in shape)
    attrs = ", ".join(f"{f}=.." for f, k in fields if k not in shape)
    return f"{cls.name} {operands}" + (f" {{{attrs}}}" if attrs else "")
