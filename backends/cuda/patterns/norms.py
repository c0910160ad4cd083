"""RMS norms of rows, for readers that do not take the norm as a part of their product."""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.library import rms_norm
from pcc.backends.cuda.patterns.terms import term
from pcc.backends.cuda.piece import WIDE, Offers, Output, Want
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t

LEAST = 64  # numbers in a row: shorter ones are the norms of heads, among other small work


@dataclass(frozen=True)
class Norm:
    """root = gain * x / sqrt(mean x^2 + eps), wide, rounded, or both."""

    root: nn.RmsNorm
    gain: t.Const
    forms: frozenset[str]
    states: tuple[Op, ...] = ()

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """The rows."""
        return [(self.root.x, WIDE)]

    def emit(self, out: Output) -> None:
        """One launch for all forms."""
        wide = out.wants(self.root, WIDE)
        halves = [f for f in self.forms if f != WIDE and out.wants(self.root, f)]
        args = {"x": out.value(self.root.x, WIDE), "gain": out.array(self.gain.value)}
        args["y"] = out.make(self.root, halves[0] if halves else WIDE)
        if halves and wide:
            args["y32"] = out.make(self.root, WIDE)
        rows, width = out.graph.rows(self.root, 1), tensor(self.root).shape[-1]
        kernel = rms_norm(
            out.name(), rows=rows, width=width, eps=self.root.eps,
            dtype=halves[0] if halves else "f32", wide=bool(halves) and wide, gpu=out.graph.gpu,
        )  # fmt: skip
        out.launch(kernel, args, self.root)


def norm(op: Op, graph: Graph) -> Norm | None:
    """Match a norm of whole rows [N,D] with trained gains.

    That of a row which a round chooses is generated with the choice.
    """
    if not isinstance(op, nn.RmsNorm) or not isinstance(op.w, t.Const):
        return None
    if isinstance(op.x, t.SelectRow):
        return None
    kind = tensor(op)
    if len(kind.shape) != 2 or not kind.batch or kind.shape[1] < LEAST:
        return None
    found = (term(u, graph) for u in graph.users(op))
    halves = {x.dtype for x in found if x is not None and x.x is op} - {WIDE}
    forms = {WIDE, *halves} if len(halves) < 2 else {WIDE}
    return Norm(op, op.w, frozenset(forms))
