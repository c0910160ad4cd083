"""Every op of circuits on edge inputs: sizes 1 and unequal, -inf rows, zero and one-hot masses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.conformance.cases import Case, each
from pcc.ir.array import Array
from pcc.tensor import ops as t


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


# Masses and products of masses have no cancellation: small results must be as right as large ones.
FLOOR = 1e-30
PAIRS = (((2, 3), (2, 3)), ((2, 1), (1, 3)), ((1,), (4,)), ((), ()), ((2, 3, 4), (1, 3, 1)))


def _elementwise() -> Iterator[Case]:
    yield from each(t.Add, ("log", "log"), *PAIRS)
    yield from each(t.Add, ("integer", "integer"), ((2, 3), (1, 3)))
    yield from each(t.Sub, ("log", "log"), *PAIRS)
    yield from each(t.Sub, ("integer", "integer"), ((3,), (3,)))
    yield from each(t.Mul, ("finite", "finite"), *PAIRS)
    yield from each(t.Mul, ("mass", "mass"), ((3, 2), (1, 2)), floor=FLOOR)
    yield from each(t.Div, ("mass", "mass"), *PAIRS, floor=FLOOR)
    yield from each(t.Div, ("tiny", "tiny"), ((3, 2), (3, 2)), ((2, 4), (1, 4)), floor=FLOOR)
    yield from each(t.Div, ("finite", "positive"), ((3, 2), (3, 2)))
    yield from each(t.Less, ("log", "log"), *PAIRS)
    yield from each(t.Less, ("integer", "integer"), ((4,), (1,)))
    yield from each(t.Equal, ("integer", "integer"), *PAIRS)
    yield from each(t.Equal, ("log", "log"), ((4,), (1,)))
    yield from each(t.And, ("bool", "bool"), *PAIRS)
    yield from each(t.Or, ("bool", "bool"), *PAIRS)
    yield from each(t.Where, ("bool", "log", "log"), ((2, 1), (2, 3), (1, 3)), ((2,),) * 3)
    yield from each(t.Where, ("bool", "integer", "integer"), ((), (), ()), ((1, 3), (2, 3), (2, 1)))
    ones = (((2, 3),), ((1, 1),), ((),), ((2, 1, 4),))
    yield from each(t.Not, ("bool",), *ones)
    yield from each(t.Exp, ("log",), *ones)
    yield from each(t.Exp, ("exponent",), ((3, 5),), tolerance=2e-5, floor=FLOOR)
    yield from each(t.Log, ("mass",), *ones)
    rows = (((2, 3),), ((1, 1),), ((5,),), ((2, 1, 4),))
    for shape in rows:
        yield Case(t.Softmax, (("mass", *shape),), lambda x: t.Softmax(t.Log(x)))
    yield from each(t.Softmax, ("logits",), *rows)
    yield from each(t.LogSoftmax, ("logits",), *rows, tolerance=4e-6)
    for kind, dtype in [("index:5", "f32"), ("bool", "f32"), ("bool", "i64"), ("mass", "bool")]:
        yield Case(t.Cast, ((kind, (2, 3)),), lambda x, d=dtype: t.Cast(x, d))
    for size in ((3,), (2, 1), ()):
        yield Case(t.Column, (("integer", size),), lambda x: t.Column(x, 5))
        yield Case(t.FloorDiv, (("count", size),), lambda x: t.FloorDiv(x, 7))
        yield Case(t.Remainder, (("count", size),), lambda x: t.Remainder(x, 7))


def _reductions() -> Iterator[Case]:
    places = (((2, 3), 0), ((2, 3), 1), ((1, 4), 0), ((5,), 0), ((2, 3, 4), 1), ((3, 2, 8), 2))
    for op, kind in [
        (t.ReduceSum, "mass"), (t.ReduceSum, "log"), (t.ReduceProd, "mass"),
        (t.ReduceProd, "finite"), (t.ReduceMax, "log"), (t.ReduceLse, "log"),
    ]:  # fmt: skip
        for shape, axis in (*places, ((6, 2), 0), ((1,), 0), ((16, 1), 0)):
            floor = FLOOR if kind == "mass" else 1.0
            make = lambda x, op=op, axis=axis: op(x, axis)  # noqa: E731
            yield Case(op, ((kind, shape),), make, 4e-6, floor=floor)
    for shape, axis in places:
        for exclusive in (False, True):
            for kind in ("mass", "log"):
                yield Case(
                    t.Cumsum,
                    ((kind, shape),),
                    lambda x, axis=axis, exclusive=exclusive: t.Cumsum(x, axis, exclusive),
                )
        product = lambda x, axis=axis: t.CumProd(x, axis)  # noqa: E731
        yield Case(t.CumProd, (("mass", shape),), product, floor=FLOOR)
    yield from each(t.ArgMax, ("log",), ((2, 3),), ((1,),), ((5,),), ((2, 3, 4),))


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
                floor=FLOOR,
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


INTEGER_EQUATIONS = {  # with weights of 8 bits: what a head, a layer, a vector and folds have
    "d,abcd->abc": (((6,), (2, 3, 4, 6)), ((40,), (3, 2, 9, 40))),
    "nd,dk->nk": (((3, 5), (5, 4)), ((17, 48), (48, 33)), ((1, 64), (64, 1))),
    "d,dn->n": (((5,), (5, 3)),),
    "d,nd->n": (((130,), (70, 130)),),
    "fd,fkd->fk": (((2, 5), (2, 3, 5)),),
}


def integer_products(dtype: str) -> Iterator[Case]:
    """Products with 8-bit integers, each output with a scale; x rounded to `dtype`."""
    rng = np.random.default_rng(8)
    for eq, shapes in INTEGER_EQUATIONS.items():
        for a, b in shapes:
            letters, out = eq[eq.index(",") + 1 :].split("->")
            kept = [n for c, n in zip(letters, b, strict=True) if c in out]
            q = t.Const(Array.of(rng.integers(-127, 128, b), "i8"))
            s = t.Const(Array.of(rng.uniform(1e-3, 1e-2, kept)))
            yield Case(
                t.ScaledContract, (("finite", a),),
                lambda x, q=q, s=s, eq=eq, k=dtype: t.ScaledContract(x, q, s, eq, k), 5e-5,
            )  # fmt: skip


def _indices() -> Iterator[Case]:
    for f, k, v in [(3, 2, 5), (1, 1, 1), (1, 4, 3), (2, 1, 6)]:
        pair = (("log", (f, k, v)), (f"index:{v}", (f,)))
        yield Case(t.Lookup, pair, t.Lookup)
        pair = (("log", (f, k, v)), (f"index:{k}", (f,)))
        yield Case(t.SelectRow, pair, t.SelectRow)
        for mass in ("mass", "faint"):
            yield Case(t.InverseCdf, ((mass, (f, v)), ("uniform", (f,))), t.InverseCdf)
    for steps, k in [(1, 1), (1, 5), (4, 3), (19, 32), (5, 33), (40, 70)]:
        yield Case(t.Trajectory, ((f"index:{k}", (steps, k)), (f"index:{k}", (1,))), t.Trajectory)


CASES = (
    *_movement(), *_elementwise(), *_reductions(), *_contractions(), *integer_products("f32"),
    *_indices(),
)  # fmt: skip
