"""Emitters of contractions: a result for a thread, or for a warp where weights lie along a sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcc.backends.cuda.codegen.body import LOOP, Ix, split
from pcc.backends.cuda.codegen.program import Program
from pcc.backends.cuda.codegen.rows import number
from pcc.backends.cuda.codegen.runs import RUN, load, loadable
from pcc.backends.cuda.codegen.tables import UnreadableError, emits
from pcc.backends.cuda.codegen.work import LANES, Work
from pcc.ir.core import Op, tensor
from pcc.ir.semiring import split_equation
from pcc.ir.types import HALVES
from pcc.tensor import ops as t

FEW = 16  # terms of a sum that one thread adds up at least as fast as a warp
UNDERFLOW = "1e-30f"  # a shifted sum below this may have lost terms: it is summed again


@dataclass(frozen=True)
class Einsum:
    """A contraction of `first` with `second`: the letters of terms and result, their sizes."""

    first: Op
    second: Op
    terms: tuple[str, str]
    out: str
    sizes: dict[str, int]

    @staticmethod
    def of(n: Op) -> Einsum:
        """Read an op's equation."""
        a, b = n.args[:2]
        (ta, tb), out = split_equation(n.eq)  # type: ignore[attr-defined]
        sizes = dict(zip(ta, tensor(a).shape, strict=True))
        sizes |= zip(tb, tensor(b).shape, strict=True)
        return Einsum(a, b, (ta, tb), out, sizes)

    @property
    def lost(self) -> str:
        """The letters that are summed over, in the order of the second term where it has them."""
        letters = dict.fromkeys(self.terms[1] + self.terms[0])
        return "".join(sorted((c for c in letters if c not in self.out), key=self._place))

    def _place(self, letter: str) -> tuple[bool, int]:
        return (letter in self.terms[1], self.terms[1].find(letter))

    @property
    def lost_sizes(self) -> tuple[int, ...]:
        """The sizes of the lost letters."""
        return tuple(self.sizes[c] for c in self.lost)

    @property
    def count(self) -> int:
        """Terms of each sum."""
        return math.prod(self.lost_sizes)


def by_warps(n: Op, program: Program) -> bool:
    """Whether a warp computes one result: the sum is long, and runs along neighbours in memory."""
    e = Einsum.of(n)
    if e.count < FEW:
        return False
    along = bool(e.terms[1]) and e.terms[1][-1] in e.lost
    return along or (program.size(n) < 8 * LANES and e.count >= 8 * LANES)


class Terms:
    """The terms of one result."""

    def __init__(self, w: Work, n: Op, ix: tuple[Ix, ...]) -> None:
        self.w, self.n, self.e = w, n, Einsum.of(n)
        self.lead, rest = w.parts(n, ix)
        self.at = dict(zip(self.e.out, rest, strict=True))

    def value(self, which: int, lost: list[Ix] | tuple[Ix, ...]) -> str:
        """Return the factor of operand `which` at the given lost indices."""
        x = (self.e.first, self.e.second)[which]
        at = self.at | dict(zip(self.e.lost, lost, strict=True))
        own = tuple(at[c] for c in self.e.terms[which])
        reads = self.w.program.size(self.n) * self.e.count
        self.w.weight = max(reads - self.w.program.size(x), 0)
        text = self.w.read(x, (*self.w.lead(x, self.lead), *own))
        self.w.weight = 0
        return text

    def combine(self, op: str, ctype: str, first: str, term: str) -> str:
        """Return the terms combined. `term` has {a} and {b} for the factors."""
        w, step = self.w, {"Sum": "{0} + {1}", "Largest": "fmaxf({0}, {1})"}[op]

        def text(lost: list[Ix] | tuple[Ix, ...]) -> str:
            a = self.value(0, lost) if "{a}" in term else ""
            b = self.value(1, lost) if "{b}" in term else ""
            return w.body.let(ctype, term.format(a=a, b=b))

        if not w.lanes:
            return w.fold(
                ctype, first, self.e.lost_sizes, lambda so_far, at: step.format(so_far, text(at))
            )
        acc, k = w.body.declare(ctype, first), w.body.name("k")
        w.cost += self.e.count
        head = f"PCC_UNROLL_8 for (int {k} = lane; {k} < {self.e.count}; {k} += {LANES}) {{"
        with w.body.block(LOOP, head, (k,)):
            at = split(w.body, k, self.e.lost_sizes)
            w.body.emit(f"{acc} = {step.format(acc, text(at))};")
        return w.body.let(ctype, f"warp_all<{op}>({acc})")

    def in_eights(self) -> bool:
        """Whether each lane may load eight neighbours of each factor at once."""
        e, last = self.e, self.e.lost
        along = len(last) == 1 and all(x.endswith(last) for x in e.terms)
        if not (self.w.lanes and along and e.count >= LANES * RUN):
            return False
        return all(loadable(self.w, x) for x in (e.first, e.second))

    def sum_of_eights(self, rounded: str) -> str:
        """Return the sum of products, eight terms at a time; `rounded` makes {a} what is used."""
        w, b, k, i = self.w, self.w.body, self.w.body.name("k"), self.w.body.name("i")
        acc = b.declare("float", "0.0f")
        w.cost += self.e.count
        step = LANES * RUN
        head = f"for (int {k} = lane * {RUN}; {k} < {self.e.count}; {k} += {step}) {{"
        with b.block(LOOP, f"PCC_UNROLL_8 {head}", (k,)):
            at = self.at | {self.e.lost: k}
            factors = []
            for x, letters in zip((self.e.first, self.e.second), self.e.terms, strict=True):
                factors.append(load(w, x, (*w.lead(x, self.lead), *(at[c] for c in letters))))
            a = rounded.format(a=f"{factors[0]}.x[{i}]")
            with b.block(LOOP, f"PCC_UNROLL for (int {i} = 0; {i} < {RUN}; ++{i}) {{", (i,)):
                b.emit(f"{acc} = {acc} + {a} * {factors[1]}.x[{i}];")
        return b.let("float", f"warp_all<Sum>({acc})")


def _terms(w: Work, n: Op, ix: tuple[Ix, ...]) -> Terms:
    if not w.lanes and by_warps(n, w.program):
        raise UnreadableError(n)
    return Terms(w, n, ix)


@emits("serial", t.Contract)
def _(w: Work, n: t.Contract, ix: tuple[Ix, ...]) -> str:
    half = tensor(n.b).dtype
    a = f"round_{half}({{a}})" if half in HALVES else "{a}"
    terms = _terms(w, n, ix)
    if terms.in_eights():
        return terms.sum_of_eights(a)
    return terms.combine("Sum", number(n), "0", f"{a} * {{b}}")


@emits("serial", t.ScaledContract)
def _(w: Work, n: t.ScaledContract, ix: tuple[Ix, ...]) -> str:
    terms = _terms(w, n, ix)
    a = f"round_{n.dtype}({{a}})" if n.dtype in HALVES else "{a}"
    total = terms.combine("Sum", "float", "0.0f", f"{a} * {{b}}")
    return f"{total} * {w.read(n.scale, tuple(terms.at[c] for c in n.kept))}"


@emits("serial", t.MaxContract)
def _(w: Work, n: t.MaxContract, ix: tuple[Ix, ...]) -> str:
    return _terms(w, n, ix).combine("Largest", "float", "-INFINITY", "{a} + {b}")


@emits("serial", t.LogContract)
def _(w: Work, n: t.LogContract, ix: tuple[Ix, ...]) -> str:
    # The largest x may meet a zero weight: then what is left can underflow, and each term is
    # shifted by the largest term itself.
    terms, b = _terms(w, n, ix), w.body
    high = terms.combine("Largest", "float", "-INFINITY", "{a}")
    top = b.let("float", f"shift_of({high})")
    total = terms.combine("Sum", "float", "0.0f", f"expf({{a}} - {top}) * {{b}}")
    y = b.declare("float", f"logf({total}) + {top}")
    with b.block("branch", f"if ({total} < {UNDERFLOW} && {high} != -INFINITY) {{"):
        best = terms.combine("Largest", "float", "-INFINITY", "{a} + logf({b})")
        shift = b.let("float", f"shift_of({best})")
        rest = terms.combine("Sum", "float", "0.0f", f"expf({{a}} + logf({{b}}) - {shift})")
        b.emit(f"{y} = logf({rest}) + {shift};")
    return y
