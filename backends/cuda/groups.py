"""A group of nodes as one generated kernel."""

from __future__ import annotations

import math

from pcc.backends.cuda.codegen import generate
from pcc.backends.cuda.piece import WIDE, Output
from pcc.backends.cuda.plan import ITEM
from pcc.backends.cuda.schedule import Group
from pcc.ir.core import Op, tensor
from pcc.ir.places import places_of
from pcc.tensor import nn
from pcc.tensor import ops as t


def emit_group(group: Group, out: Output) -> None:
    """Launch the kernel of a group; states that have one buffer are written in place."""
    in_place = [op for op in group.outputs if op in out.graph.in_place]
    nodes = [n for n in group.nodes if not isinstance(n, t.Const)]
    kernel = generate(
        out.name(), nodes, group.inputs, group.outputs, out.graph.batch, in_place=in_place,
        gpu=out.graph.gpu,
    )  # fmt: skip
    given = {f"in{i}": out.value(x, WIDE) for i, x in enumerate(group.inputs)}
    for i, y in enumerate(group.outputs):
        if y not in in_place:
            given[f"out{i}"] = out.make(y, WIDE)
    given |= {f"constant{i}": out.array(array) for i, array in enumerate(kernel.constants)}
    layer = f"{len(nodes)} ops of {places_of(nodes) or 'no layer'}"
    moved = {"weights": _weights(group, out)}
    out.launch(kernel, given, group.outputs[-1], layer=layer, bytes=moved)


def _weights(group: Group, out: Output) -> int:
    """Return the bytes of trained arrays that a group reads: of a table the rows looked up."""
    total, whole = 0, set[Op]()
    for n in group.nodes:
        for a in n.args:
            if not isinstance(a, t.Const):
                continue
            if isinstance(n, nn.Embedding | t.Lookup | t.SelectRow) and a is n.args[0]:
                total += math.prod(out.graph.shape(n)) * ITEM[tensor(a).dtype]
            else:
                whole.add(a)
    return total + sum(math.prod(tensor(a).shape) * ITEM[tensor(a).dtype] for a in whole)
