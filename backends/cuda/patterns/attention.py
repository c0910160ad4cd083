"""Attention over caches of keys and values, with the writes of the new ones."""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.graph import Graph, half
from pcc.backends.cuda.library import attend
from pcc.backends.cuda.patterns.heads import Attended, cache, heads, merged
from pcc.backends.cuda.patterns.terms import only_multiplied
from pcc.backends.cuda.piece import Output
from pcc.ir.core import Op, tensor
from pcc.tensor import nn


@dataclass(frozen=True)
class Attention(Attended):
    """root [N,H hd] = the heads of attention beside one another, rounded."""

    of: nn.CachedAttention

    def emit(self, out: Output) -> None:
        """One launch."""
        y, (key, value), dtype = self.of, self.states, half(self.of.k)
        count, number = tensor(y).shape[1], tensor(y).shape[0]
        key_heads, rows, width = tensor(y.k).shape
        args = self.inputs.given(out) | {
            "start": out.value(y.start, "i64"), "key": out.state(key), "value": out.state(value),
            "y": out.make(self.root, dtype),
        }  # fmt: skip
        kernel = attend(
            out.name(), batch=out.graph.batch, count=count, heads=number, key_heads=key_heads,
            width=width, rows=rows, angles=self.inputs.angles, positions=self.inputs.positions,
            scale=y.scale, dtype=dtype, window=y.window, gpu=out.graph.gpu,
        )  # fmt: skip
        reach = min(rows, y.window + count) if y.window else rows
        moved = {"kv_row": 2 * out.graph.batch * key_heads * width * 2, "kv_rows": reach}
        moved["weights"] = 2 * count * self.inputs.angles * 4
        out.launch(kernel, args, self.root, bytes=moved)


def attention(op: Op, graph: Graph) -> Attention | None:
    """Match merged heads of attention over two half caches that this pass writes.

    Equal because the pass reads rows up to its own last position only, and those it writes first.
    """
    y = merged(op, graph)
    if not isinstance(y, nn.CachedAttention) or tensor(y.q).shape[2] != tensor(y.v).shape[2]:
        return None
    key = cache(y.k, nn.CacheWrite, y.start, graph)
    value = cache(y.v, nn.CacheWrite, y.start, graph)
    if key is None or value is None or only_multiplied(op, graph) != half(key):
        return None
    inputs = heads(y.q, key.update, value.update, y.start)
    return Attention(op, inputs, (key, value), y) if inputs is not None else None
