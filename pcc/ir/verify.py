"""The verifier: what must hold of every module, whatever pass made it.

V1  A node's type is the one that its op infers from its operands (E211).
V2  The graph is acyclic (E212); it is a set of nodes reachable from the outputs by construction.
V3  Attributes are canonical: ints are ints, lists are tuples, arrays are interned (E213).
V4  Weights are `[F, Ko, *Ki]` for inputs with those fold and unit counts (E102, through V1).
V5  Operands of one layer have equal fold counts (E107, through V1).
V6  Input layers read variables that the module has (E216); categorical ones finite variables, with
    a table at least as wide as the variable's cardinality; Gaussian ones continuous variables.
V7  Products multiply disjoint scopes, per fold: decomposable (E201, through V1).
V8  Mixtures add equal scopes, per fold: smooth (E202, through V1).
V9  Gathers and takes select folds that exist (E109, through V1).
V10 Stages: after `to-tensor` (stage "tensor") no `c.*` or `q.*` op is left (E217).
V11 A value has a batch axis only if an operand has one, or it is an input (E218).
V12 Trained tables and weights of circuit layers are finite and non-negative (E219).
V13 Equal inputs are one node: an input's name has one type (E220).

Not checked: that tables are normalised, that a circuit is deterministic. Those are analyses.
All violations are collected; the first ten are printed in one error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import KINDS, Op
from pcc.ir.module import Module
from pcc.ir.types import Tensor, Units, runs_of

Finding = tuple[str, Op, str]


def verify(module: Module, stage: str = "") -> None:
    """Raise one `PccError` that lists what is wrong with the module, or return."""
    order = _acyclic(module)
    found = [f for n in order for f in _node(module, n, stage)]
    found += _inputs(order)
    if found:
        lines = [f"[{code}] {n.loc or n.name}: {what}" for code, n, what in found[:10]]
        more = f" (and {len(found) - 10} more)" if len(found) > 10 else ""
        raise PccError(found[0][0], f"module '{module.name}': " + "; ".join(lines) + more)


def _acyclic(module: Module) -> list[Op]:
    """Return the nodes operands first; raise on a cycle, which only a corrupted node can make."""
    state: dict[Op, int] = {}
    order: list[Op] = []
    stack: list[tuple[Op, bool]] = [(r, False) for r in module.roots]
    while stack:
        n, done = stack.pop()
        if done:
            state[n] = 2
            order.append(n)
        elif n not in state:
            state[n] = 1
            stack.append((n, True))
            for a in n.args:
                if state.get(a) == 1:
                    raise PccError("E212", f"'{n.name}' takes part in a cycle", at=n.loc)
                if a not in state:
                    stack.append((a, False))
    return order


def _node(m: Module, n: Op, stage: str) -> Iterator[Finding]:
    try:
        inferred = n.infer()
        if inferred != n.type:
            yield "E211", n, f"has type {n.type}, its operands give {inferred}"
    except PccError as e:
        yield e.code, n, e.what
    for f, k in zip(n.fields, n.kinds, strict=True):
        yield from _attribute(n, f, k)
    if stage == "tensor" and not n.name.startswith("t."):
        yield "E217", n, f"'{n.name}' is left after to-tensor"
    t = n.type
    if isinstance(t, Tensor) and t.batch and n.name != "t.input" and not n.name.startswith("q."):
        if not any(isinstance(a.type, Tensor) and a.type.batch for a in n.args):
            yield "E218", n, "has a batch axis that no operand has"
    if isinstance(t, Units):
        yield from _layer(m, n, t)


def _attribute(n: Op, field: str, kind: str) -> Iterator[Finding]:
    v = getattr(n, field)
    try:
        same = KINDS[kind][0](v)
        if type(same) is not type(v) or (not isinstance(v, Array | Op) and same != v):
            yield "E213", n, f"attribute '{field}' is not canonical: {v!r}"
    except PccError as e:
        yield "E213", n, f"attribute '{field}': {e.what}"


def _layer(m: Module, n: Op, t: Units) -> Iterator[Finding]:
    variables = getattr(n, "vars", None)
    if variables is not None:
        yield from _input_layer(m, n, variables)
    for s in t.scopes if variables is not None else ():
        if s.bit_length() > m.n:
            yield "E216", n, f"reads variable {runs_of(s)[-1][1]} of {m.n}"
    for a in n.args:
        if a.name == "t.const" and isinstance(a.type, Tensor):
            value = a.value.value  # type: ignore[attr-defined]
            if value.dtype.kind == "f" and (not np.isfinite(value).all() or (value < 0).any()):
                if n.name != "c.gaussian":
                    yield "E219", n, "a trained weight is negative or not finite"
                elif not np.isfinite(value).all():
                    yield "E219", n, "a trained parameter is not finite"


def _input_layer(m: Module, n: Op, variables: tuple[int, ...]) -> Iterator[Finding]:
    for v in variables:
        if v >= m.n:
            continue
        card = m.cards[v]
        if n.name == "c.gaussian" and card:
            yield "E216", n, f"variable {v} has {card} values, it is not continuous"
        if n.name == "c.categorical":
            width = n.args[0].type.shape[2]  # type: ignore[union-attr]
            if card == 0 or width < card:
                yield "E216", n, f"a table of {width} values cannot hold variable {v} with {card}"


def _inputs(order: list[Op]) -> Iterator[Finding]:
    seen: dict[str, Op] = {}
    for n in order:
        if n.name == "t.input":
            first = seen.setdefault(n.key, n)  # type: ignore[attr-defined]
            if first is not n:
                yield "E220", n, f"input {n.key!r} has two types"  # type: ignore[attr-defined]
