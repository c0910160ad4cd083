"""Emitters of ops on rows of the last axis, and of reductions: a warp holds a row."""

from __future__ import annotations

from pcc.backends.cuda.codegen.body import Ix
from pcc.backends.cuda.codegen.program import literal
from pcc.backends.cuda.codegen.tables import emits
from pcc.backends.cuda.codegen.work import Work
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate

Prefix = tuple[Ix, ...]


def _row(w: Work, x: Op, n: Op, prefix: Prefix, fill: str = "0.0f", ctype: str = "float") -> str:
    """Registers of the row of `x` that belongs to row `prefix` of `n`."""
    k = 1 if tensor(n).batch else 0
    own = (*w.lead(x, prefix[:k]), *prefix[k:])
    return w.registers(tensor(x).shape[-1], lambda j: w.read(x, (*own, j)), fill=fill, ctype=ctype)


def _width(n: Op) -> int:
    return tensor(n).shape[-1]


def _shape(n: Op) -> str:
    """Template arguments: registers of a lane, elements of the row."""
    return f"{-(-_width(n) // 32)}, {_width(n)}"


def _setting(w: Work, x: Op, n: Op, prefix: Prefix) -> str:
    return w.read(x, w.lead(x, prefix[:1] if tensor(n).batch else ()))


@emits("rows", t.Softmax)
def _(w: Work, n: t.Softmax, prefix: Prefix) -> str:
    r = _row(w, n.x, n, prefix, "-INFINITY")
    w.body.emit(f"row_softmax<{_shape(n)}>({r}, lane);")
    return r


@emits("rows", t.LogSoftmax)
def _(w: Work, n: t.LogSoftmax, prefix: Prefix) -> str:
    r = _row(w, n.x, n, prefix, "-INFINITY")
    w.body.emit(f"row_log_softmax({r});")
    return r


@emits("rows", Temper)
def _(w: Work, n: Temper, prefix: Prefix) -> str:
    temperature = _setting(w, n.temperature, n, prefix)
    r = _row(w, n.x, n, prefix, "-INFINITY")
    w.body.emit(f"row_temper<{_shape(n)}>({r}, {temperature}, lane);")
    return r


@emits("rows", Truncate)
def _(w: Work, n: Truncate, prefix: Prefix) -> str:
    count, mass = (_setting(w, x, n, prefix) for x in (n.top_k, n.top_p))
    r = _row(w, n.p, n, prefix)
    w.body.emit(f"row_truncate<{_shape(n)}>({r}, {count}, {mass}, lane);")
    return r


@emits("rows", nn.RmsNorm)
def _(w: Work, n: nn.RmsNorm, prefix: Prefix) -> str:
    r = _row(w, n.x, n, prefix)
    w.body.emit(f"row_rms_norm<{_shape(n)}>({r}, {literal(n.eps)});")
    return w.registers(_width(n), lambda j: f"{r}[{w.lane_of[str(j)][0]}] * {w.read(n.w, (j,))}")


@emits("rows", nn.LayerNorm)
def _(w: Work, n: nn.LayerNorm, prefix: Prefix) -> str:
    r = _row(w, n.x, n, prefix)
    w.body.emit(f"row_layer_norm<{_shape(n)}>({r}, {literal(n.eps)}, lane);")

    def value(j: Ix) -> str:
        own = f"{r}[{w.lane_of[str(j)][0]}]"
        return f"{own} * {w.read(n.w, (j,))} + {w.read(n.b, (j,))}"

    return w.registers(_width(n), value)


# ---------------------------------------------------------------- reductions of any axis


def _line(w: Work, x: Op, n: Op, ix: Prefix, axis: int, fill: str, ctype: str) -> str:
    """Registers of the elements of `x` along an axis that `n` has lost."""
    k = axis + (1 if tensor(n).batch else 0)
    length = tensor(x).shape[axis]
    return w.registers(length, lambda j: w.read(x, (*ix[:k], j, *ix[k:])), fill=fill, ctype=ctype)


PAIRS: dict[type[Op], tuple[str, dict[str, str]]] = {
    t.ReduceSum: ("Sum", {"f32": "0.0f", "i64": "0"}),
    t.ReduceProd: ("Product", {"f32": "1.0f", "i64": "1"}),
    t.ReduceMax: ("Largest", {"f32": "-INFINITY", "i64": "(-9223372036854775807LL - 1)"}),
}


def number(n: Op) -> str:
    """Return the C type of a number."""
    return {"f32": "float", "i64": "long long", "bool": "bool"}[tensor(n).dtype]


@emits("scalar", *PAIRS)
def _(w: Work, n: t.Reduction, ix: Prefix) -> str:
    op, fills = PAIRS[type(n)]
    r = _line(w, n.x, n, ix, n.axis, fills[tensor(n).dtype], number(n))
    return f"all_of<{op}>({r})"


@emits("scalar", t.ReduceLse)
def _(w: Work, n: t.ReduceLse, ix: Prefix) -> str:
    return f"row_lse({_line(w, n.x, n, ix, n.axis, '-INFINITY', 'float')})"


@emits("scalar", t.ArgMax)
def _(w: Work, n: t.ArgMax, ix: Prefix) -> str:
    rank = len(tensor(n.x).shape) - 1
    kind = tensor(n.x).dtype
    low = PAIRS[t.ReduceMax][1].get(kind, "false")
    r = _line(w, n.x, n, ix, rank, low, "int" if kind == "bool" else number(n.x))
    return f"row_argmax<{_width(n.x)}>({r}, lane)"


@emits("scalar", t.InverseCdf)
def _(w: Work, n: t.InverseCdf, ix: Prefix) -> str:
    lead, (f,) = w.parts(n, ix)
    u = w.read(n.u, (*w.lead(n.u, lead), f))
    at = (*w.lead(n.mass, lead), f)
    r = w.registers(_width(n.mass), lambda j: w.read(n.mass, (*at, j)))
    return f"row_inverse_cdf<{_width(n.mass)}>({r}, {u}, lane)"
