"""Emitters of ops that move elements: nothing is moved, only indices are."""

from __future__ import annotations

import math
from functools import partial

from pcc.backends.cuda.codegen.body import Ix, split, total
from pcc.backends.cuda.codegen.tables import emits
from pcc.backends.cuda.codegen.work import Work
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t
from pcc.tensor.eva import RingChunks


def regroup(
    w: Work, ix: tuple[Ix, ...], new: tuple[int, ...], old: tuple[int, ...]
) -> tuple[Ix, ...]:
    """Return the index in shape `old` of element `ix` of shape `new`; axes that agree are kept."""
    out: list[Ix] = []
    i, j = 0, 0
    while i < len(new) or j < len(old):
        a, b = i, j
        left, right = 1, 1
        if i < len(new):
            left, i = new[i], i + 1
        if j < len(old):
            right, j = old[j], j + 1
        while left != right:
            if left < right and i < len(new):
                left, i = left * new[i], i + 1
            elif left > right and j < len(old):
                right, j = right * old[j], j + 1
            elif i < len(new):
                left, i = left * new[i], i + 1
            else:
                right, j = right * old[j], j + 1
        out += _group(w, ix[a:i], new[a:i], old[b:j])
    return tuple(out)


def _group(
    w: Work, ix: tuple[Ix, ...], new: tuple[int, ...], old: tuple[int, ...]
) -> tuple[Ix, ...]:
    wide = [k for k, s in zip(ix, new, strict=True) if s != 1]
    if len(wide) == 1 and [s for s in old if s != 1] == [s for s in new if s != 1]:
        return tuple(wide[0] if s != 1 else 0 for s in old)
    if not old:
        return ()
    terms = [(k, math.prod(new[p + 1 :])) for p, k in enumerate(ix)]
    return split(w.body, total(w.body, terms), old)


@emits("inline", t.Reshape)
def _(w: Work, n: t.Reshape, ix: tuple[Ix, ...]) -> str:
    lead, rest = w.parts(n, ix)
    return w.read(n.x, (*lead, *regroup(w, rest, n.shape, tensor(n.x).shape)))


@emits("inline", t.Transpose)
def _(w: Work, n: t.Transpose, ix: tuple[Ix, ...]) -> str:
    lead, rest = w.parts(n, ix)
    own = {p: i for p, i in zip(n.perm, rest, strict=True)}
    return w.read(n.x, (*lead, *(own[a] for a in range(len(rest)))))


@emits("inline", t.Take)
def _(w: Work, n: t.Take, ix: tuple[Ix, ...]) -> str:
    lead, rest = w.parts(n, ix)
    at = w.pick(n.indices, rest[n.axis])
    return w.read(n.x, (*lead, *rest[: n.axis], at, *rest[n.axis + 1 :]))


@emits("inline", t.Concat)
def _(w: Work, n: t.Concat, ix: tuple[Ix, ...]) -> str:
    lead, rest = w.parts(n, ix)
    at, start, parts = rest[n.axis], 0, []

    def part(x: Op, before: int) -> str:
        own = at - before if isinstance(at, int) else total(w.body, [(at, 1)], -before)
        return w.read(x, (*w.lead(x, lead), *rest[: n.axis], own, *rest[n.axis + 1 :]))

    for x in n.xs:
        stop = start + tensor(x).shape[n.axis]
        if isinstance(at, int) and start <= at < stop:
            return part(x, start)
        if stop > start:
            parts.append((f"{at} < {stop}", partial(part, x, start)))
        start = stop
    parts[-1] = ("", parts[-1][1])
    if len(parts) == 1:
        return parts[0][1]()
    kind = {"f32": "float", "i64": "long long", "bool": "bool"}[tensor(n).dtype]
    return w.body.either(kind, parts)


@emits("inline", t.Expand)
def _(w: Work, n: t.Expand, ix: tuple[Ix, ...]) -> str:
    return w.operand(n.x, n, ix)


# ---------------------------------------------------------------- look-ups


@emits("inline", t.Lookup)
def _(w: Work, n: t.Lookup, ix: tuple[Ix, ...]) -> str:
    lead, (f, k) = w.parts(n, ix)
    at = w.index(n.x, (*w.lead(n.x, lead), f), tensor(n.table).shape[2])
    return w.read(n.table, (*w.lead(n.table, lead), f, k, at))


@emits("inline", t.SelectRow)
def _(w: Work, n: t.SelectRow, ix: tuple[Ix, ...]) -> str:
    lead, (f, i) = w.parts(n, ix)
    at = w.index(n.sel, (*w.lead(n.sel, lead), f), tensor(n.w).shape[1])
    return w.read(n.w, (*w.lead(n.w, lead), f, at, i))


@emits("inline", nn.Embedding)
def _(w: Work, n: nn.Embedding, ix: tuple[Ix, ...]) -> str:
    lead, (*rest, d) = w.parts(n, ix)
    at = w.index(n.ids, (*w.lead(n.ids, lead), *rest), tensor(n.table).shape[0])
    return w.read(n.table, (at, d))


@emits("inline", RingChunks)
def _(w: Work, n: RingChunks, ix: tuple[Ix, ...]) -> str:
    lead, (h, k, m, d) = w.parts(n, ix)
    start = w.read(n.start, w.lead(n.start, lead))
    step = total(w.body, [(k, n.chunk), (m, 1)])
    rows = tensor(n.ring).shape[1]
    position = f"({start} / {n.chunk} * {n.chunk} + {step}) % {rows}"
    at = w.body.let("int", f"clamp_index({position}, {rows - 1})") if rows > 1 else 0
    return w.read(n.ring, (*w.lead(n.ring, lead), h, at, d))
