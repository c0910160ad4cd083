"""Rows of an embedding table."""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.library import embedding
from pcc.backends.cuda.piece import SQUARES, WIDE, Offers, Output, Want
from pcc.backends.cuda.plan import ITEM
from pcc.ir.core import Op, tensor
from pcc.tensor import nn
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Lookup:
    """root = table[ids], widened."""

    root: nn.Embedding
    table: t.Const
    forms: frozenset[str] = frozenset({WIDE, SQUARES})
    states: tuple[Op, ...] = ()

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """The ids."""
        return [(self.root.ids, "i64")]

    def emit(self, out: Output) -> None:
        """One launch."""
        vocab, width = tensor(self.table).shape
        args = {"ids": out.value(self.root.ids, "i64"), "table": out.array(self.table.value)}
        args["y"] = out.make(self.root, WIDE)
        if squares := out.wants(self.root, SQUARES):
            args["squares_out"] = out.make(self.root, SQUARES)
        rows = out.graph.rows(self.root, 1)
        kernel = embedding(
            out.name(), rows=rows, vocab=vocab, width=width, dtype=self.table.value.dtype,
            squares=squares, gpu=out.graph.gpu,
        )  # fmt: skip
        read = rows * width * ITEM[self.table.value.dtype]
        out.launch(kernel, args, self.root, bytes={"weights": read})


def lookup(op: Op, graph: Graph) -> Lookup | None:
    """Match a look-up of one id for each row in a trained table, whose rows a norm reads.

    Others are added to something first, and generated together with that.
    """
    if not isinstance(op, nn.Embedding) or not isinstance(op.table, t.Const):
        return None
    if op.table.value.dtype not in (WIDE, "f16", "bf16"):
        return None
    ids, normed = tensor(op.ids), any(isinstance(u, nn.RmsNorm) for u in graph.users(op))
    return Lookup(op, op.table) if len(ids.shape) == 1 and ids.batch and normed else None
