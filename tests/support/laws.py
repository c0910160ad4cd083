"""What the tests of passes share: short text of a module, symbolic proofs, small layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy

from pcc.circuit import ops as c
from pcc.circuit import text
from pcc.interp.run import categorical
from pcc.ir.core import Op, postorder
from pcc.ir.module import Module
from pcc.ir.semiring import Symbolic, split_equation
from pcc.passes.manager import Notes, Pass
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]


def const(*shape: int, seed: int = 0) -> Op:
    """Distinct positive numbers, hence distinct symbols."""
    rng = np.random.default_rng([seed, *shape])
    return t.Const(rng.uniform(0.1, 0.9, shape).astype(np.float32))  # type: ignore[arg-type]


def leaf(*variables: int, k: int = 2, v: int = 3, seed: int = 0) -> Op:
    """An input layer with one fold for each variable."""
    table = const(len(variables), k, v, seed=seed + 1 + 10 * variables[0])
    return c.Categorical(variables, table)


def module(root: Op, *cards: int) -> Module:
    return Module("circuit", cards, (("p", root),))


def outline(m: Module) -> list[str]:
    """The module's text, one op per line, without the numbers of its constants."""
    lines = [line.strip() for line in text.show(m).splitlines()[1:-1]]
    return [re.sub(r" \{value=.*\} :", " :", line) for line in lines]


def applied(p: Pass, m: Module) -> tuple[Module, list[str]]:
    """Return the module after a pass, and what the pass says about it."""
    notes = Notes()
    return p.run(m, notes), notes.lines


def prove(before: Module, after: Module) -> None:
    """Both modules are the same expressions, for every value of the constants and inputs."""
    env = symbols(before) | symbols(after)
    for a, b in zip(values(before, env), values(after, env), strict=True):
        a, b = np.broadcast_arrays(a, b)
        for x, y in zip(a.flat, b.flat, strict=True):
            assert _same(x, y), f"{x} is not {y}"


def _same(x: Any, y: Any) -> bool:
    if x == y or sympy.expand(x - y) == 0:
        return True
    ratio = sympy.exp(sympy.expand(sympy.expand_log(x - y, force=True)))
    return bool(sympy.simplify(ratio - 1) == 0)


def symbols(m: Module) -> dict[str, Values]:
    """Some states of the variables for circuits; symbols for the inputs of tensors."""
    states = np.array(list(itertools.product(*map(range, m.cards))), np.int64)
    rows = states[:: max(1, len(states) // 3)]
    seen = np.arange(rows.size).reshape(rows.shape) % 3 > 0
    env: dict[str, Values] = {"x": rows, "observed": seen} if m.cards else {}
    for n in m.nodes():
        if isinstance(n, t.Input) and n.key not in env:
            one = np.empty((1, *n.shape) if n.batch else n.shape, object)
            for i in np.ndindex(*one.shape):
                one[i] = sympy.Symbol(f"{n.key}{'_'.join(map(str, i))}", positive=True)
            env[n.key] = one
    return env


def values(m: Module, env: dict[str, Values]) -> list[Values]:
    """Evaluate with symbols; log, exp and what is made of them too."""
    s, value = Symbolic(), dict[Op, Values]()
    for n in postorder(*m.roots):
        args = [value[a] for a in n.args]
        if isinstance(n, t.Input):
            value[n] = env[n.key]
        elif isinstance(n, c.Categorical):
            value[n] = categorical(n, args[0], env, s)
        elif n.name in MEANING:
            value[n] = MEANING[n.name](n, *args)
        else:
            value[n] = n.eval(s, *args)  # type: ignore[attr-defined]
    return [value[r] for r in m.roots]


def _each(f: Callable[[Any], Any]) -> Callable[..., Values]:
    def over(n: Op, x: Values) -> Values:
        return np.asarray(np.vectorize(f, otypes=[object])(x))

    return over


def _softmax(n: Op, x: Values) -> Values:
    e = np.vectorize(sympy.exp, otypes=[object])(x)
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _log(x: Values) -> Values:
    return np.asarray(np.vectorize(sympy.log, otypes=[object])(x))


def _exp(x: Values) -> Values:
    return np.asarray(np.vectorize(sympy.exp, otypes=[object])(x))


def _contract(n: Op, x: Values, w: Values) -> Values:
    assert isinstance(n, t.LogContract)
    ins, out = split_equation(n.eq)
    eq = ",".join("..." + i for i in ins) + "->..." + out
    return _log(np.asarray(np.einsum(eq, _exp(x), w)))


def _first(n: Op, x: Values) -> Values:
    """Return the element that stands first for the largest: maxima only occur as shifts."""
    assert isinstance(n, t.ReduceMax)
    return np.take(x, 0, axis=n.at)


MEANING: dict[str, Callable[..., Values]] = {
    "t.log": _each(sympy.log),
    "t.exp": _each(sympy.exp),
    "t.sub": lambda n, a, b: np.asarray(a - b),
    "t.div": lambda n, a, b: np.asarray(a / b),
    "t.softmax": _softmax,
    "t.log_softmax": lambda n, x: _log(_softmax(n, x)),
    "t.reduce_max": _first,
    "t.reduce_lse": lambda n, x: _log(np.asarray(_exp(x).sum(axis=n.at))),
    "t.log_contract": _contract,
    "t.cumsum": lambda n, x, *_: t.Cumsum.eval(n, Symbolic(), x),
}
