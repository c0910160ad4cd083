"""Every tensor op on edge inputs: sizes 1 and unequal, -inf rows, zero and one-hot masses.

A case builds one op from operands; the conformance tests give each operand every batch axis it can
have, so that one graph holds all combinations as outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
Operand = tuple[str, tuple[int, ...]]  # kind of values, per-row shape
DTYPE = {"index": "i64", "integer": "i64", "count": "i64", "bool": "bool"}


@dataclass(frozen=True)
class Case:
    """One op on operands of given kinds and shapes."""

    op: type[Op]
    operands: tuple[Operand, ...]
    make: Callable[..., Op]
    tolerance: float = 2e-6

    @property
    def name(self) -> str:
        """What the test is called."""
        shapes = ".".join("x".join(map(str, s)) or "scalar" for _, s in self.operands)
        attrs = [
            v
            for v in getattr(self.make, "__defaults__", ()) or ()
            if isinstance(v, int | str | tuple)
        ]
        return "-".join([self.op.name.removeprefix("t."), shapes, *map(str, attrs)])


def values(kind: str, rows: int, shape: tuple[int, ...], seed: int) -> Values:
    """Return `rows` arrays of a kind; the edge patterns come first, so few rows hold them too."""
    rng = np.random.default_rng([seed, rows, len(shape)])
    full = (rows, *shape)
    kind, _, limit = kind.partition(":")
    match kind:
        case "index":
            return rng.integers(0, int(limit), full)
        case "integer":
            return rng.integers(-4, 9, full)
        case "count":
            return rng.integers(0, 40, full)
        case "bool":
            return rng.random(full) < 0.5
        case "uniform":
            edges = np.array([0.0, 2.0**-24, 1 - 2.0**-24], np.float32)
            some = rng.integers(0, 1 << 24, full) / (1 << 24)
            return np.where(rng.random(full) < 0.6, rng.choice(edges, full), some).astype("f4")
        case "mass":
            return _mass(full, rng)
        case "positive":
            return rng.uniform(0.1, 2.0, full).astype(np.float32)
        case "log" | "logits":
            return _log(full, rng, whole=kind == "log")
    assert kind == "finite"
    return (3 * rng.normal(size=full)).astype(np.float32)


def _mass(full: tuple[int, ...], rng: np.random.Generator) -> Values:
    a = rng.uniform(0.0, 1.0, full).astype(np.float32)
    a[rng.random(full) < 0.3] = 0.0
    if len(full) > 1 and a.size:
        flat = a.reshape(-1, full[-1])  # rows of the last axis
        flat[::5] = 0.0
        flat[::5, rng.integers(full[-1])] = 1.0  # one-hot
        flat[2::7] = 0.0  # nothing at all
    return a


def _log(full: tuple[int, ...], rng: np.random.Generator, *, whole: bool) -> Values:
    a = (5 * rng.normal(size=full)).astype(np.float32)
    a[rng.random(full) < 0.25] = -np.inf
    if len(full) > 1:
        flat = a.reshape(-1, full[-1])
        flat[::6] -= 300.0  # far below the smallest float
        if whole:
            flat[1::5] = -np.inf
        else:
            flat[:, 0] = np.where(np.isneginf(flat).all(axis=-1), 0.5, flat[:, 0])
    elif whole:
        a[1::5] = -np.inf
    return a


def module_of(case: Case, batches: str) -> tuple[Module, dict[str, tuple[str, int]]]:
    """Return a module with an output for every combination, and the kind and seed of each input.

    Batches: "k" a trained constant, "v" an input without a batch axis, "c", "b".
    """
    made: dict[str, tuple[str, int]] = {}
    outs: dict[str, Op] = {}
    for combo in itertools.product(batches, repeat=len(case.operands)):
        pairs = enumerate(zip(case.operands, combo, strict=True))
        xs = [_operand(i, *o, b, made) for i, (o, b) in pairs]
        outs["y_" + "".join(combo)] = case.make(*xs)
    return Module("case", (), tuple(outs.items())), made


def _operand(i: int, kind: str, shape: tuple[int, ...], b: str, made: dict[str, Any]) -> Op:
    if b == "k":
        return t.Const(Array.of(values(kind, 1, shape, i)[0]))
    key = f"{b}{i}"
    made[key] = (kind, i)
    dtype = DTYPE.get(kind.partition(":")[0], "f32")
    return t.Input(key, dtype, "" if b == "v" else b, shape)


def feeds(
    case: Case, made: dict[str, tuple[str, int]], rows: int, contexts: int
) -> dict[str, Values]:
    """Return the inputs of `module_of` for a batch size and a number of context rows."""
    out: dict[str, Values] = {}
    for key, (kind, i) in made.items():
        count = {"v": 1, "c": contexts, "b": rows}[key[0]]
        made_of = values(kind, count, case.operands[i][1], 7 * i + ord(key[0]))
        out[key] = np.asarray(made_of[0]) if key[0] == "v" else made_of
    return out


def _each(
    op: type[Op], kinds: tuple[str, ...], *shapes: tuple[tuple[int, ...], ...], **more: Any
) -> Iterator[Case]:
    for shape in shapes:
        yield Case(op, tuple(zip(kinds, shape, strict=True)), op, **more)


def _movement() -> Iterator[Case]:
    for old, new in [
        ((2, 3), (3, 2)), ((2, 3), (2, 3, 1)), ((4, 3), (12,)), ((12,), (4, 3)), ((1,), ()),
        ((), (1, 1)), ((1, 6), (2, 3)), ((6,), (1, 6)), ((2, 3, 2), (2, 6)), ((2, 3, 2), (3, 4)),
    ]:  # fmt: skip
        yield Case(t.Reshape, (("log", old),), lambda x, new=new: t.Reshape(x, new))
    for shape, perm in [((2, 3), (1, 0)), ((2, 3, 4), (2, 0, 1)), ((2, 1, 3), (0, 2, 1)),
                        ((3,), (0,)), ((1, 2, 3), (1, 2, 0))]:  # fmt: skip
        yield Case(t.Transpose, (("finite", shape),), lambda x, perm=perm: t.Transpose(x, perm))
    for shape, axis, rows in [
        ((4, 3), 0, (1, 2)), ((4, 3), 0, (3, 0, 3)), ((4, 3), 1, (2,)), ((2, 3, 5), 2, (4, 0)),
        ((2, 3, 5), 1, (0, 1)), ((5,), 0, (4, 2)), ((1, 1), 0, (0,)),
    ]:  # fmt: skip
        yield Case(t.Take, (("log", shape),), lambda x, axis=axis, rows=rows: t.Take(x, axis, rows))
    for a, b, axis in [((2, 3), (1, 3), 0), ((2, 3), (2, 1), 1), ((2,), (3,), 0),
                       ((2, 1, 3), (2, 4, 3), 1), ((1, 2, 1), (1, 2, 5), 2)]:  # fmt: skip
        yield Case(
            t.Concat,
            (("log", a), ("finite", b)),
            lambda x, y, axis=axis: t.Concat((x, y), axis),
        )
    for old, other, new in [((3,), (2,), (3,)), ((1, 3), (), (4, 3)), ((2, 1), (5, 2), (2, 3)),
                            ((), (1,), ()), ((1, 1, 2), (3,), (2, 3, 2))]:  # fmt: skip
        yield Case(
            t.Expand,
            (("log", old), ("finite", other)),
            lambda x, y, new=new: t.Expand(x, y, new),
        )


PAIRS = (((2, 3), (2, 3)), ((2, 1), (1, 3)), ((1,), (4,)), ((), ()), ((2, 3, 4), (1, 3, 1)))


def _elementwise() -> Iterator[Case]:
    yield from _each(t.Add, ("log", "log"), *PAIRS)
    yield from _each(t.Add, ("integer", "integer"), ((2, 3), (1, 3)))
    yield from _each(t.Sub, ("log", "log"), *PAIRS)
    yield from _each(t.Sub, ("integer", "integer"), ((3,), (3,)))
    yield from _each(t.Mul, ("finite", "finite"), *PAIRS)
    yield from _each(t.Mul, ("mass", "mass"), ((3, 2), (1, 2)))
    yield from _each(t.Div, ("mass", "mass"), *PAIRS)
    yield from _each(t.Div, ("finite", "positive"), ((3, 2), (3, 2)))
    yield from _each(t.Less, ("log", "log"), *PAIRS)
    yield from _each(t.Less, ("integer", "integer"), ((4,), (1,)))
    yield from _each(t.Equal, ("integer", "integer"), *PAIRS)
    yield from _each(t.Equal, ("log", "log"), ((4,), (1,)))
    yield from _each(t.And, ("bool", "bool"), *PAIRS)
    yield from _each(t.Or, ("bool", "bool"), *PAIRS)
    yield from _each(t.Where, ("bool", "log", "log"), ((2, 1), (2, 3), (1, 3)), ((2,),) * 3)
    yield from _each(
        t.Where, ("bool", "integer", "integer"), ((), (), ()), ((1, 3), (2, 3), (2, 1))
    )
    ones = (((2, 3),), ((1, 1),), ((),), ((2, 1, 4),))
    yield from _each(t.Not, ("bool",), *ones)
    yield from _each(t.Exp, ("log",), *ones)
    yield from _each(t.Log, ("mass",), *ones)
    rows = (((2, 3),), ((1, 1),), ((5,),), ((2, 1, 4),))
    for shape in rows:
        yield Case(t.Softmax, (("mass", *shape),), lambda x: t.Softmax(t.Log(x)))
    yield from _each(t.Softmax, ("logits",), *rows)
    yield from _each(t.LogSoftmax, ("logits",), *rows, tolerance=4e-6)
    for kind, dtype in [("index:5", "f32"), ("bool", "f32"), ("bool", "i64"), ("mass", "bool")]:
        yield Case(t.Cast, ((kind, (2, 3)),), lambda x, d=dtype: t.Cast(x, d))
    for shape in ((3,), (2, 1), ()):
        yield Case(t.Column, (("integer", shape),), lambda x: t.Column(x, 5))
        yield Case(t.FloorDiv, (("count", shape),), lambda x: t.FloorDiv(x, 7))
        yield Case(t.Remainder, (("count", shape),), lambda x: t.Remainder(x, 7))


def _reductions() -> Iterator[Case]:
    places = (((2, 3), 0), ((2, 3), 1), ((1, 4), 0), ((5,), 0), ((2, 3, 4), 1), ((3, 2, 8), 2))
    for op, kind in [
        (t.ReduceSum, "mass"), (t.ReduceSum, "log"), (t.ReduceProd, "mass"),
        (t.ReduceProd, "finite"), (t.ReduceMax, "log"), (t.ReduceLse, "log"),
    ]:  # fmt: skip
        for shape, axis in (*places, ((6, 2), 0), ((1,), 0), ((16, 1), 0)):
            yield Case(op, ((kind, shape),), lambda x, op=op, axis=axis: op(x, axis), 4e-6)
    for shape, axis in places:
        for exclusive in (False, True):
            for kind in ("mass", "log"):
                yield Case(
                    t.Cumsum,
                    ((kind, shape),),
                    lambda x, axis=axis, exclusive=exclusive: t.Cumsum(x, axis, exclusive),
                )
        yield Case(t.CumProd, (("mass", shape),), lambda x, axis=axis: t.CumProd(x, axis))
    yield from _each(t.ArgMax, ("log",), ((2, 3),), ((1,),), ((5,),), ((2, 3, 4),))


EQUATIONS = {  # every form that passes build, at sizes that differ
    "fi,fio->fo": (((3, 4), (3, 4, 2)), ((1, 4), (1, 4, 2)), ((1, 1), (1, 1, 1))),
    "fi,foi->fo": (((3, 4), (3, 2, 4)), ((1, 4), (1, 2, 4)), ((2, 1), (2, 3, 1))),
    "fo,foi->fi": (((3, 4), (3, 4, 2)), ((1, 4), (1, 4, 2))),
    "fi,foij->foj": (((2, 3), (2, 4, 3, 5)),),
    "foj,fj->fo": (((2, 3, 4), (2, 4)), ((1, 3, 1), (1, 1))),
    "fj,foj->fo": (((2, 4), (2, 3, 4)),),
    "fk,fkv->fv": (((3, 4), (3, 4, 7)), ((1, 4), (1, 4, 7)), ((2, 1), (2, 1, 1))),
    "d,abcd->abc": (((5,), (2, 3, 4, 5)), ((1,), (1, 1, 1, 1))),
    "d,dn->n": (((5,), (5, 3)),),
    "d,nd->n": (((5,), (3, 5)),),
    "nd,kd->nk": (((2, 5), (3, 5)),),
    "fi,fi->f": (((3, 4), (3, 4)),),
    "fi,fj->fij": (((2, 3), (2, 4)),),
    "foh,fhi->foi": (((2, 3, 4), (2, 4, 5)),),
    "foi,fiv->fov": (((2, 3, 4), (2, 4, 5)),),
    "foi,fi->fo": (((2, 3, 4), (2, 4)),),
    "fkh,fkh->fk": (((2, 3, 4), (2, 3, 4)), ((1, 1, 2), (1, 1, 2))),
    "d,fvd->fv": (((5,), (2, 3, 5)),),
    "nd,dk->nk": (((2, 5), (5, 3)),),
    "hd,hsd->hs": (((2, 3), (2, 4, 3)),),
    "hs,hsd->hd": (((2, 4), (2, 4, 3)),),
    "h,dh->d": (((3,), (4, 3)),),
    "k,abck->abc": (((3,), (2, 1, 4, 3)),),
}


def _contractions() -> Iterator[Case]:
    for eq, shapes in EQUATIONS.items():
        for shape in shapes:
            yield Case(
                t.Contract,
                tuple(zip(("mass", "mass"), shape, strict=True)),
                lambda a, b, eq=eq: t.Contract(a, b, eq),
            )
    logs = ("fi,fio->fo", "fi,foi->fo", "fk,fkv->fv", "fi,foij->foj", "fj,foj->fo", "fo,foi->fi",
            "fkh,fkh->fk")  # fmt: skip
    for eq in logs:
        for shape in EQUATIONS[eq]:
            for op, kind in ((t.LogContract, "mass"), (t.MaxContract, "log")):
                yield Case(
                    op,
                    tuple(zip(("log", kind), shape, strict=True)),
                    lambda a, b, eq=eq, op=op: op(a, b, eq),
                    4e-6,
                )


def _indices() -> Iterator[Case]:
    for f, k, v in [(3, 2, 5), (1, 1, 1), (1, 4, 3), (2, 1, 6)]:
        pair = (("log", (f, k, v)), (f"index:{v}", (f,)))
        yield Case(t.Lookup, pair, t.Lookup)
        pair = (("log", (f, k, v)), (f"index:{k}", (f,)))
        yield Case(t.SelectRow, pair, t.SelectRow)
        yield Case(t.InverseCdf, (("mass", (f, v)), ("uniform", (f,))), t.InverseCdf)


CASES = (*_movement(), *_elementwise(), *_reductions(), *_contractions(), *_indices())
