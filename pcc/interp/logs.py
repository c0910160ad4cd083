"""Tensor and circuit expressions evaluated in logarithms: no product leaves float64's range.

Wherever E is read by a `t.log`, log E is computed from E's definition: log(a b) = log a + log b,
log sum_i a_i b_i = log-sum-exp_i(log a_i + log b_i), and so on; E itself is never formed. All else
is computed as it stands. It shares no code with the pass `numerics`, which it judges.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TypeAlias

import numpy as np

from pcc.circuit.ops import Categorical, CircuitOp, Gaussian
from pcc.errors import PccError
from pcc.interp.run import gaussian
from pcc.ir.core import Op, Values, tensor
from pcc.ir.semiring import LogReal, Semiring, log_einsum
from pcc.ir.types import Units
from pcc.tensor import ops as t

Goal: TypeAlias = tuple[bool, Op]  # (in logs?, node)
Step: TypeAlias = Generator[Goal, Values, Values]
REAL = Semiring()


class Logs(LogReal):
    """Unit values *and* weights in logarithms: a weight of e^-2000 still counts."""

    name = "logs"

    def einsum(self, eq: str, *xs: Values) -> Values:
        plain = eq.replace("...", "")
        return log_einsum(plain, None, *xs)

    def contract(self, eq: str, w: Values | None, *xs: Values) -> Values:
        return log_einsum(eq, None, *([] if w is None else [w]), *xs)

    def unit(self, p: Values) -> Values:
        return p


class LogRun:
    """Evaluates one module on one set of inputs; `leaves` gives logs of nodes, by node."""

    def __init__(self, inputs: Mapping[str, Values], leaves: Mapping[Op, Values]) -> None:
        self.inputs, self.leaves = inputs, leaves
        self.memo: dict[Goal, Values] = {}

    def root(self, n: Op) -> Values:
        """Return an output: circuit units in logs, tensors as they are."""
        return self.solve((isinstance(n.type, Units), n))

    def solve(self, goal: Goal) -> Values:
        if goal in self.memo:
            return self.memo[goal]
        stack = [(goal, self._step(goal))]
        answer: Values | None = None
        while stack:  # graphs are deep: suspended steps instead of recursion
            key, step = stack[-1]
            try:
                want = next(step) if answer is None else step.send(answer)
            except StopIteration as stop:
                answer = self.memo[key] = np.asarray(stop.value)
                stack.pop()
                continue
            answer = self.memo.get(want)
            if answer is None:
                stack.append((want, self._step(want)))
        assert answer is not None
        return answer

    def _step(self, goal: Goal) -> Step:
        logs, n = goal
        if n in self.leaves:
            return _known(self.leaves[n] if logs else np.exp(self.leaves[n]))
        if isinstance(n, CircuitOp):
            return self._circuit(n)
        return self._log(n) if logs else self._linear(n)

    def _linear(self, n: Op) -> Step:
        if isinstance(n, t.Log):
            return (yield True, n.x)
        if isinstance(n, t.Input):
            return self._input(n)
        args = []
        for a in n.args:
            args.append((yield False, a))
        if not isinstance(n, t.TensorOp):
            raise PccError("E402", f"'{n.name}' has no evaluator", at=n.loc)
        return n.eval(REAL, *args)

    def _input(self, n: t.Input) -> Values:
        if n.key not in self.inputs:
            raise PccError("E403", f"input {n.key!r} is missing")
        return REAL.const(np.asarray(self.inputs[n.key]), n.key)

    def _circuit(self, n: CircuitOp) -> Step:
        if isinstance(n, Gaussian):
            mu = yield False, n.mu
            return gaussian(n, mu, (yield False, n.sigma), self.inputs, Logs(), {})
        args = []
        for a in n.args:
            args.append((yield True, a))
        if isinstance(n, Categorical):
            return log_categorical(n, args[0], self.inputs)
        return n.eval(Logs(), *args)

    def _log(self, n: Op) -> Step:
        match n:
            case t.Exp(x=x):
                return (yield False, x)
            case t.Softmax(x=x):
                y = np.maximum((yield False, x), t.LOWEST)
                return y - log_sum(y, -1)[..., None]
            case t.Mul(a=a, b=b):
                left = yield True, a
                return left + (yield True, b)
            case t.Div(a=a, b=b):
                left, right = (yield True, a), (yield True, b)
                never = np.isneginf(left) | np.isneginf(right)
                return np.where(never, -np.inf, left - np.where(np.isneginf(right), 0.0, right))
            case t.Add(a=a, b=b):
                left = yield True, a
                return np.logaddexp(left, (yield True, b))
            case t.Contract(a=a, b=b, eq=eq):
                left = yield True, a
                return log_einsum(eq, None, left, (yield True, b))
            case t.ReduceSum(x=x):
                return log_sum((yield True, x), n.at)
            case t.ReduceProd(x=x):
                return np.asarray(np.sum((yield True, x), axis=n.at))
            case t.CumProd(x=x, axis=axis):
                y = np.moveaxis((yield True, x), axis - len(tensor(x).shape), 0)
                y = np.concatenate([np.zeros_like(y[:1]), y[:-1]]).cumsum(axis=0)
                return np.moveaxis(y, 0, axis - len(tensor(x).shape))
            case t.Reshape() | t.Transpose() | t.Take() | t.Concat() | t.ReduceMax():
                return (yield from self._moved(n, len(n.args)))
            case t.Lookup() | t.SelectRow() | t.Expand():
                return (yield from self._moved(n, 1))
            case t.Where(cond=cond, a=a, b=b):
                test = yield False, cond
                left = yield True, a
                return np.where(test, left, (yield True, b))
            case _:
                with np.errstate(divide="ignore", invalid="ignore"):
                    return np.log((yield False, n))

    def _moved(self, n: t.TensorOp, values: int) -> Step:
        """Evaluate an op that only moves its first `values` operands: they are taken in logs."""
        args = []
        for i, a in enumerate(n.args):
            args.append((yield i < values, a))
        return n.eval(REAL, *args)


def _known(value: Values) -> Step:
    return value
    yield  # pragma: no cover  (makes this a generator)


def log_sum(x: Values, axis: int) -> Values:
    """Log-sum-exp over an axis; all -inf gives -inf."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(x - top).sum(axis=axis)) + np.squeeze(top, axis=axis))


def log_categorical(n: Categorical, p: Values, inputs: Mapping[str, Values]) -> Values:
    """Input units from a table in logs: the entry where observed, the row total where not."""
    x = np.asarray(inputs["x"])[:, list(n.vars)]
    observed = np.asarray(inputs["observed"])[:, list(n.vars), None]
    card = p.shape[-1]
    index = np.clip(np.nan_to_num(x), 0, card - 1).astype(np.int64)
    inside = ((x >= 0) & (x < card) & (x == index))[..., None]
    wide = np.broadcast_to(p, (len(x), *p.shape[-3:]))
    at = np.broadcast_to(index[..., None, None], (*wide.shape[:-1], 1))
    seen = np.where(inside, np.take_along_axis(wide, at, axis=-1)[..., 0], -np.inf)
    return np.where(observed, seen, log_sum(p, -1))


def run_logs(
    roots: tuple[Op, ...],
    inputs: Mapping[str, Values],
    leaves: Mapping[Op, Values] | None = None,
) -> list[Values]:
    """Evaluate `roots`: tensors as they are, circuit units as logarithms."""
    with np.errstate(invalid="ignore", over="ignore"):
        work = LogRun(inputs, leaves or {})
        return [work.root(r) for r in roots]
