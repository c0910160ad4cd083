"""Where eight neighbours of a value lie in memory, so that a thread loads them at once."""

from __future__ import annotations

from pcc.backends.cuda.codegen.body import Ix, total
from pcc.backends.cuda.codegen.program import SMALL, dense
from pcc.backends.cuda.codegen.views import regroup
from pcc.backends.cuda.codegen.work import Work
from pcc.ir.core import Op, tensor
from pcc.ir.types import HALVES
from pcc.tensor import ops as t

RUN = 8  # halves of 16 bytes, the most that a thread loads at once
LOADED = ("f32", *HALVES)


def loadable(w: Work, x: Op) -> bool:
    """Whether every eight elements of the last axis lie side by side, at a multiple of 16 bytes.

    Arrays of their own begin at such multiples; the last axis of all that lies between is one of
    eights, so that no eight are split.
    """
    kind = tensor(x)
    if kind.dtype not in LOADED or not kind.shape or kind.shape[-1] % RUN:
        return False
    if (s := w.program.stored.get(x)) is not None:
        steps = (*s.strides[:-1], s.base)
        return s.dtype in LOADED and s.strides[-1] == 1 and not any(k % RUN for k in steps)
    if isinstance(x, t.Const):
        return x.value.size > SMALL  # smaller ones are in the source, wherever that is
    if isinstance(x, t.Take):
        return x.axis < len(kind.shape) - 1 and loadable(w, x.x)
    return isinstance(x, t.Reshape | t.SelectRow) and loadable(w, x.args[0])


def load(w: Work, x: Op, ix: tuple[Ix, ...]) -> str:
    """Return eight elements of a loadable value, the first at `ix`, as floats."""
    if (s := w.program.stored.get(x)) is not None:
        w.reads.add(x)
        at = f"{s.memory.pointer} + {w.offset(s, ix)}"
        return w.body.let("Eight", f"eight_{s.dtype}({at})")
    lead, rest = w.parts(x, ix)
    match x:
        case t.Const(value=value):
            place = total(w.body, list(zip(ix, dense(value.shape), strict=True)))
            at = f"{w.program.table(value)} + {place}"
            return w.body.let("Eight", f"eight_{value.dtype}({at})")
        case t.Take(x=of, axis=axis, indices=indices):
            taken = w.pick(indices, rest[axis])
            return load(w, of, (*lead, *rest[:axis], taken, *rest[axis + 1 :]))
        case t.Reshape(x=of, shape=shape):
            return load(w, of, (*lead, *regroup(w, rest, shape, tensor(of).shape)))
        case t.SelectRow(w=of, sel=sel):
            f, i = rest
            row = w.index(sel, (*w.lead(sel, lead), f), tensor(of).shape[1])
            return load(w, of, (*w.lead(of, lead), f, row, i))
        case _:
            raise TypeError(x.name)
