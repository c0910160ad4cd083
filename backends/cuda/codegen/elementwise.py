"""Emitters of ops element by element."""

from __future__ import annotations

from pcc.backends.cuda.codegen.body import Ix
from pcc.backends.cuda.codegen.tables import emits
from pcc.backends.cuda.codegen.work import Work
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t

SIGNS: dict[type[Op], str] = {
    t.Add: "+", t.Mul: "*", t.Less: "<", t.Equal: "==", t.And: "&&", t.Or: "||",
}  # fmt: skip
CALLS: dict[type[Op], str] = {
    t.Not: "!{}", t.Exp: "expf({})", t.Log: "logf({})", nn.Silu: "silu({})", nn.Gelu: "gelu({})",
    nn.Relu: "fmaxf({}, 0.0f)",
}  # fmt: skip


@emits("inline", *SIGNS)
def _(w: Work, n: t.Binary, ix: tuple[Ix, ...]) -> str:
    return f"{w.operand(n.a, n, ix)} {SIGNS[type(n)]} {w.operand(n.b, n, ix)}"


@emits("inline", t.Sub)
def _(w: Work, n: t.Sub, ix: tuple[Ix, ...]) -> str:
    a, b = w.operand(n.a, n, ix), w.operand(n.b, n, ix)
    return f"{a} - fmaxf({b}, LOWEST)" if tensor(n).dtype == "f32" else f"{a} - {b}"


@emits("inline", t.Div)
def _(w: Work, n: t.Div, ix: tuple[Ix, ...]) -> str:
    a, b = w.operand(n.a, n, ix), w.operand(n.b, n, ix)
    return f"{b} > 0 ? {a} / {b} : 0"


@emits("inline", *CALLS)
def _(w: Work, n: t.Unary, ix: tuple[Ix, ...]) -> str:
    return CALLS[type(n)].format(w.read(n.x, ix))


@emits("inline", t.Cast)
def _(w: Work, n: t.Cast, ix: tuple[Ix, ...]) -> str:
    x = w.read(n.x, ix)
    return (
        f"{x} != 0" if n.dtype == "bool" else f"({'float' if n.dtype == 'f32' else 'long long'}){x}"
    )


@emits("inline", t.Where)
def _(w: Work, n: t.Where, ix: tuple[Ix, ...]) -> str:
    cond, a, b = (w.operand(x, n, ix) for x in n.args)
    return f"{cond} ? {a} : {b}"


@emits("inline", t.Column)
def _(w: Work, n: t.Column, ix: tuple[Ix, ...]) -> str:
    x = w.read(n.x, ix)
    return f"1 + ({x} < -1 ? -1 : ({x} > {n.card} ? {n.card} : {x}))"


@emits("inline", t.FloorDiv)
def _(w: Work, n: t.FloorDiv, ix: tuple[Ix, ...]) -> str:
    return f"{w.read(n.x, ix)} / {n.by}"


@emits("inline", t.Remainder)
def _(w: Work, n: t.Remainder, ix: tuple[Ix, ...]) -> str:
    return f"{w.read(n.x, ix)} % {n.by}"


@emits("inline", nn.Rotary)
def _(w: Work, n: nn.Rotary, ix: tuple[Ix, ...]) -> str:
    (h, i, d), lead = w.parts(n, ix)[1], w.parts(n, ix)[0]
    r, width = tensor(n.cos).shape[1], tensor(n.x).shape[2]
    row = w.index(n.positions, (*w.lead(n.positions, lead), i), tensor(n.cos).shape[0])
    at = w.lead(n.x, lead)

    def turned(own: Ix, other: Ix, angle: Ix, sign: str) -> str:
        x, y = w.read(n.x, (*at, h, i, own)), w.read(n.x, (*at, h, i, other))
        cos, sin = w.read(n.cos, (row, angle)), w.read(n.sin, (row, angle))
        return f"{x} * {cos} {sign} {y} * {sin}"

    def shifted(by: int) -> Ix:
        return d + by if isinstance(d, int) else w.body.let("int", f"{d} + {by}")

    if isinstance(d, int):
        if d >= 2 * r:
            return w.read(n.x, (*at, h, i, d))
        return turned(d, d + r, d, "-") if d < r else turned(d, d - r, d - r, "+")
    parts = [
        (f"{d} < {r}", lambda: turned(d, shifted(r), d, "-")),
        (
            f"{d} < {2 * r}" if 2 * r < width else "",
            lambda: turned(d, shifted(-r), shifted(-r), "+"),
        ),
    ]
    if 2 * r < width:
        parts.append(("", lambda: w.read(n.x, (*at, h, i, d))))
    return w.body.either("float", parts)
