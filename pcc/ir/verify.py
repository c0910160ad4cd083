"""The verifier: what must hold of every module, whatever pass made it.

V1   A node's type is the one that its op infers from its operands (E211).
V2   The graph is acyclic (E212). Its nodes are those reachable from the outputs, by construction.
V3   Attributes are canonical: ints are ints, lists are tuples, arrays are interned (E213).
V4   A node's operands are those that its fields hold, in field order (E214).
V5   Weights are `[F, Ko, *Ki]` for inputs with those fold and unit counts (E102, through V1).
V6   Operands of one layer have equal fold counts (E107, through V1).
V7   Operands of unit-wise layers have equal unit counts (E108, through V1).
V8   Input layers read variables that the module has; categorical ones finite variables, with a
     table at least as wide as the variable's cardinality; Gaussian ones continuous ones (E216).
V9   Products multiply disjoint scopes, per fold: decomposable (E201, through V1).
V10  Mixtures add equal scopes, per fold: smooth (E202, through V1).
V11  Gathers and takes select folds that exist (E109, through V1).
V12  Stages: after `to-tensor` (stage "tensor") no `c.*` or `q.*` op is left (E217).
V13  A value has a batch axis only if an operand has one, or it is an input or a query (E218).
V14  Trained tables and weights that a circuit layer reads directly are finite and, other than the
     parameters of Gaussians, non-negative (E219).
V15  An input's name has one type (E220).
V16  A module has outputs, each with a name of its own, and cardinalities of 0 or more (E221).

Not checked: that tables are normalised, that a circuit is deterministic, that computed weights are
non-negative. Those are analyses. That the bytes of an array have its hash is checked where bytes
come in (E008). All findings are collected; the first ten are printed in place, inside the module.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import KINDS, Op
from pcc.ir.module import Module
from pcc.ir.text import Lines
from pcc.ir.types import Tensor, Units, runs_of
from pcc.knobs import SHOWN_FINDINGS, SHOWN_OPERANDS

Finding = tuple[str, Op, str]
BROKEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class InvalidModuleError(PccError):
    """A module that breaks rules: `findings` lists (code, node, what); the text shows them."""

    def __init__(self, code: str, what: str, at: str, findings: list[Finding], text: str) -> None:
        super().__init__(code, what, at=at)
        self.findings = findings
        self.args = (f"{self.args[0]}\n{text}" if text else self.args[0],)


def verify(module: Module, stage: str = "") -> None:
    """Raise one `InvalidModuleError` that lists what is wrong with the module, or return."""
    wrong = list(_module(module))
    if wrong:
        raise InvalidModuleError("E221", f"module '{module.name}': " + "; ".join(wrong), "", [], "")
    order = _acyclic(module)
    sound: set[Op] = set()  # constants that hold only finite, non-negative numbers
    found = [f for n in order for f in _node(module, n, stage, sound)]
    found += _inputs(order)
    if found:
        code, n, what = found[0]
        lines = Lines(order)
        rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        head = f"module '{module.name}': {lines.names[n]} ('{n.name}') {what}{rest}"
        raise InvalidModuleError(code, head, n.loc, found, _excerpt(module, order, lines, found))


def _excerpt(module: Module, order: list[Op], lines: Lines, found: list[Finding]) -> str:
    """Return the module's text around the first findings, each below the node that it is about."""
    notes: dict[Op, list[str]] = {}
    for code, n, what in found[:SHOWN_FINDINGS]:
        notes.setdefault(n, []).append(f"error[{code}]: {what}")
    kept = set(notes)
    for n in notes:
        kept.update(n.args[:SHOWN_OPERANDS])
    out, last = [f"  circuit @{module.name} {{"], -1
    for i, n in enumerate(order):
        if n in kept:
            out += ["    ..."] if i > last + 1 else []
            out.append("    " + _line(lines, n))
            out += [f"    ^ {note}" for note in notes.get(n, ())]
            last = i
    out += ["    ..."] if last < len(order) - 1 else []
    more = len(found) - SHOWN_FINDINGS
    return "\n".join([*out, "  }", *([f"  {more} more findings"] if more > 0 else [])])


def _line(lines: Lines, n: Op) -> str:
    try:
        return lines.line(n)
    except BROKEN:  # an ill node may hold what cannot be printed
        return f"{lines.names[n]} = {n.name} <cannot be printed>"


def _module(m: Module) -> Iterator[str]:
    names = [name for name, _ in m.outputs]
    if not names:
        yield "it has no outputs"
    for name in sorted({k for k in names if names.count(k) > 1}):
        yield f"two outputs are named {name!r}"
    if any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in m.cards):
        yield "a cardinality is no integer of 0 or more"


def _acyclic(module: Module) -> list[Op]:
    """Return the nodes operands first; raise on a cycle, which only a corrupted node can make."""
    done: dict[Op, bool] = {}  # False: on the path from a root
    order: list[Op] = []
    stack: list[tuple[Op, bool]] = [(r, False) for r in reversed(module.roots)]
    while stack:
        n, left = stack.pop()
        if left:
            done[n] = True
            order.append(n)
        elif n not in done:
            done[n] = False
            stack.append((n, True))
            for a in reversed(n.args):
                if done.get(a) is False:
                    what = f"module '{module.name}': '{n.name}' reads '{a.name}', which reads it"
                    raise InvalidModuleError(
                        "E212", what, n.loc, [("E212", n, "is part of a cycle")], ""
                    )
                if a not in done:
                    stack.append((a, False))
    return order


def _node(m: Module, n: Op, stage: str, sound: set[Op]) -> Iterator[Finding]:
    try:
        inferred = n.infer()
        if inferred != n.type:
            yield "E211", n, f"has type {n.type}, its operands give {inferred}"
    except PccError as e:
        yield e.code, n, e.what
    except BROKEN as e:
        yield "E211", n, f"cannot be typed: {e}"
    for f, k in zip(n.fields, n.kinds, strict=True):
        yield from _attribute(n, f, k)
    if n.args != _operands(n):
        yield "E214", n, "has operands other than those that its fields hold"
    if stage == "tensor" and not n.name.startswith("t."):
        yield "E217", n, f"'{n.name}' is left after to-tensor"
    t = n.type
    if isinstance(t, Tensor) and t.batch and n.name != "t.input" and not n.name.startswith("q."):
        if not any(isinstance(a.type, Tensor) and a.type.batch for a in n.args):
            yield "E218", n, "has a batch axis that no operand has"
    if isinstance(t, Units):
        yield from _input_layer(m, n, t)
        yield from _weights(n, sound)


def _attribute(n: Op, field: str, kind: str) -> Iterator[Finding]:
    v = getattr(n, field)
    try:
        same = KINDS[kind][0](v)
        if type(same) is not type(v) or (not isinstance(v, Array | Op) and same != v):
            yield "E213", n, f"attribute '{field}' is not canonical: {v!r:.60}"
    except PccError as e:
        yield "E213", n, f"attribute '{field}': {e.what}"


def _operands(n: Op) -> tuple[Op, ...]:
    out: list[Op] = []
    for f, k in zip(n.fields, n.kinds, strict=True):
        if KINDS[k][1]:
            v = getattr(n, f)
            out.extend(v if isinstance(v, tuple | list) else (v,))
    return tuple(out)


def _weights(n: Op, sound: set[Op]) -> Iterator[Finding]:
    for a in n.args:
        if a.name != "t.const" or a in sound:
            continue
        value = getattr(a, "value").value  # noqa: B009 - the class is of a level above
        if value.dtype.kind != "f":
            continue
        if not np.isfinite(value).all():
            yield "E219", n, "a trained parameter is not finite"
        elif n.name != "c.gaussian":
            if (value < 0).any():
                yield "E219", n, "a trained weight is negative"
            else:
                sound.add(a)


def _input_layer(m: Module, n: Op, t: Units) -> Iterator[Finding]:
    if not hasattr(n, "vars"):
        return
    for s in t.scopes:
        if s.bit_length() > m.n:
            yield "E216", n, f"reads variable {runs_of(s)[-1][1]} of {m.n}"
            continue
        v = s.bit_length() - 1
        card = m.cards[v]
        if n.name == "c.gaussian" and card:
            yield "E216", n, f"variable {v} has {card} values, it is not continuous"
        table = n.args[0].type
        if n.name == "c.categorical" and isinstance(table, Tensor) and len(table.shape) == 3:
            width = table.shape[2]
            if card == 0 or width < card:
                yield "E216", n, f"a table of {width} values cannot hold variable {v} with {card}"


def _inputs(order: list[Op]) -> Iterator[Finding]:
    seen: dict[object, Op] = {}
    for n in order:
        if n.name == "t.input":
            key = getattr(n, "key")  # noqa: B009 - the class is of a level above
            if seen.setdefault(key, n) is not n:
                yield "E220", n, f"input {key!r} has two types"
