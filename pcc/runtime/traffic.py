"""The bytes that a graph must move, read off the IR that its bundle holds.

Weights: every trained array that the graph reads whole, once. Tables of which only some rows are
read (embeddings, chosen experts) count nothing: a row is a few kilobytes. Keys and values: the rows
that each attention may read at a context. Nothing is parsed but the lines of `ir/*.pcir`, so that a
bundle of 13 GB is looked through in milliseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcc.bundle import inside
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.knobs import MAX_TEXT_BYTES
from pcc.runtime.dtypes import ITEM

LINE = re.compile(
    r"\s*%(?P<name>\w+) = (?P<op>[\w.]+)(?P<args>[^{:]*)(?:\{(?P<attrs>.*)\})?"
    r" : (?P<type>(?:f32|f16|bf16|i64|i8|bool)\[[^\]]*\])(?: loc\(.*\))?\s*"
)
WORD = re.compile(r"%(\w+)")
# Operands of which an op reads single rows: by position.
ROWS = {"t.embedding": (0,), "t.select_row": (0,), "t.lookup": (0,), "t.rotary": (2, 3)}
# Ops that show an array under another shape: what reads their result reads the array.
VIEWS = ("t.reshape", "t.transpose")


@dataclass(frozen=True)
class Attention:
    """One attention: bytes of a position's keys and values, and which positions it reads."""

    row: int
    window: int = 0
    chunk: int = 0

    def bytes(self, context: int) -> int:
        """Return what is read of the keys and values before `context`."""
        rows = context
        if self.chunk:  # exact keys of the current window, a summary for each older chunk
            rows = context % self.window + context // self.window * (self.window // self.chunk)
        elif self.window:
            rows = min(context, self.window)
        return rows * self.row


@dataclass(frozen=True)
class Traffic:
    """What one graph moves for one row: trained arrays by identity, and attentions."""

    weights: Mapping[str, int]
    attentions: tuple[Attention, ...]

    def kv(self, context: int) -> int:
        """Return the bytes of keys and values read for one row."""
        return sum(a.bytes(context) for a in self.attentions)


def traffic(engine_path: Path, files: Mapping[str, str], query: str) -> Traffic:
    """Return the traffic of a query's graph. Errors: B217 without the IR of the query."""
    names = [f for f in sorted(files) if Path(f).stem.partition("-")[2] == f"tensor-{query}"]
    if not names:
        what = f"the bundle holds no IR of '{query}'"
        raise PccError("B217", what, at=str(engine_path), hint="compile the bundle again")
    data = read_bounded(inside(engine_path, names[0]), MAX_TEXT_BYTES, "E010")
    return read(data.decode("utf-8", "replace"))


def read(text: str) -> Traffic:
    """Return the traffic of a module in text form."""
    types: dict[str, str] = {}
    arrays: dict[str, str] = {}  # node -> identity of the array that it shows
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    attentions = []
    for line in text.splitlines():
        if (m := LINE.fullmatch(line)) is None:
            continue
        name, op, args = m["name"], m["op"], WORD.findall(m["args"])
        types[name] = m["type"]
        if op == "t.const":
            value = re.search(r"value=(\S+?)(?:,|$)", m["attrs"] or "")
            identity = value[1] if value and value[1].startswith("#") else f"%{name}"
            arrays[name], sizes[identity] = identity, size_of(m["type"])
            continue
        if op in VIEWS and args and args[0] in arrays:
            arrays[name] = arrays[args[0]]
            continue
        skipped = ROWS.get(op, ())
        whole |= {arrays[a] for i, a in enumerate(args) if a in arrays and i not in skipped}
        if op in ("t.cached_attention", "t.eva_attention") and len(args) > 2:
            attentions.append(_attention(types, args, m["attrs"] or ""))
    return Traffic({k: sizes[k] for k in sorted(whole)}, tuple(attentions))


def _attention(types: Mapping[str, str], args: list[str], attrs: str) -> Attention:
    row = 0
    for a in args[1:3]:  # keys and values [H, rows, width]
        heads, _, width = dims_of(types[a])
        row += heads * width * ITEM[types[a].partition("[")[0]]
    numbers = dict(re.findall(r"(window|chunk)=(\d+)", attrs))
    return Attention(row, int(numbers.get("window", 0)), int(numbers.get("chunk", 0)))


def dims_of(kind: str) -> list[int]:
    """Return the sizes of a printed type, per row: `f16[b|2,3]` gives [2, 3]."""
    inside_ = kind.partition("[")[2].rstrip("]").rpartition("|")[2]
    return [int(d) for d in inside_.split(",") if d]


def size_of(kind: str) -> int:
    """Return the bytes of a printed type, per row."""
    return math.prod(dims_of(kind)) * ITEM[kind.partition("[")[0]]


def moved(
    engine_path: Path, manifest: Mapping[str, Any], query: str, context: int, batch: int
) -> dict[str, int]:
    """Return bytes by kind: weights of the verifier, weights of the head, keys and values.

    The head's weights are those that the graph `verify` does not read. Weights are read once for a
    batch, keys and values for each row.
    """
    files = manifest["files"]
    own = traffic(engine_path, files, query)
    body = set(own.weights)
    if query not in ("verify", "decode"):
        body &= set(traffic(engine_path, files, "verify").weights)
    return {
        "weights": sum(v for k, v in own.weights.items() if k in body),
        "head": sum(v for k, v in own.weights.items() if k not in body),
        "kv": batch * own.kv(context),
    }
