"""Static graphs of one computation at several widths as one graph with open axes.

The graphs are lowered one by one and compared node for node: they must be one graph, but for
constants. A constant that differs between widths becomes

- in `Reshape`, a -1 for the one size that differs (a 0-free vector of sizes, fixed otherwise);
- in `Expand`, a 1 where the operand already has the size;
- elsewhere an input, a *table*, of which each width has its own value.

So at the sizes of one width the graph computes what the static graph of that width computes: no
formula of the width is guessed, and nothing in the graph computes a size. An engine has one
optimisation profile for each width, of exactly these sizes. What cannot be merged is E436.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.backends.onnx.graph import Stored
from pcc.backends.tensorrt.forms import drop_unread
from pcc.backends.tensorrt.site import Site
from pcc.errors import PccError

Values = np.ndarray[Any, Any]
# Operands of which a runtime wants the value itself, when it builds or on the host.
SIZES = {"Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,),
         "Squeeze": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMean": (1,), "CumSum": (1,),
         "Pad": (1, 3), "ConstantOfShape": (0,), "Range": (0, 1, 2)}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """One graph for several widths.

    `sizes`: by name of an open axis its size at each width, in the order of the graphs given;
    `tables`: by name of an input that no caller knows its value at each width.
    """

    model: ir.Model
    sizes: Mapping[str, tuple[int, ...]]
    tables: Mapping[str, tuple[Values, ...]]

    def shape(self, v: ir.Value, at: int) -> list[int]:
        """Return the shape of an input or output at a width."""
        assert v.shape is not None
        return [d if isinstance(d, int) else self.sizes[str(d.value)][at] for d in v.shape]


def merge(models: Sequence[ir.Model], *, wide: bool) -> Merged:
    """Merge static graphs with types and shapes; the first one is used up.

    `wide`: tables may have 64-bit integers; else 32 bits, widened inside. Errors: E436.
    """
    work = _Merging(models, wide)
    for nodes in work.rows:
        work.node(nodes)
    for values in work.values():
        work.shape(values)
    drop_unread(models[0].graph)
    return Merged(models[0], work.sizes, work.tables)


class _Merging:
    """The state of one merge: which values correspond, open axes, tables."""

    def __init__(self, models: Sequence[ir.Model], wide: bool) -> None:
        self.models, self.wide = models, wide
        self.graph = models[0].graph
        graphs = [m.graph for m in models]
        if len({len(g) for g in graphs}) > 1 or len({len(g.inputs) for g in graphs}) > 1:
            raise _cannot("the graphs have unlike numbers of nodes")
        self.rows = list(zip(*graphs, strict=True))
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.tables: dict[str, tuple[Values, ...]] = {}
        self.made: dict[tuple[int, ...], ir.Value] = {}  # by ids of the constants
        self.same = {id(v): v for v in self.graph.inputs}  # of any graph -> of the first
        for vs in zip(*(g.inputs for g in graphs), strict=True):
            self.same.update({id(v): vs[0] for v in vs})

    def values(self) -> Iterator[tuple[ir.Value, ...]]:
        """Yield inputs and results as they correspond, but for what the merge added."""
        yield from zip(*(m.graph.inputs[: self.inputs] for m in self.models), strict=True)
        for nodes in self.rows:
            yield from zip(*(n.outputs for n in nodes), strict=True)

    @property
    def inputs(self) -> int:
        """The number of inputs that the graphs had."""
        return len(self.models[-1].graph.inputs)

    def node(self, nodes: tuple[ir.Node, ...]) -> None:
        """Compare the nodes at one place of all graphs, and merge their operands."""
        first, rest = nodes[0], nodes[1:]
        for other in rest:
            if _kind(first) != _kind(other):
                raise _cannot(f"{first.name!r} and {other.name!r} differ")
        for vs in zip(*(n.outputs for n in nodes), strict=True):
            self.same.update({id(v): vs[0] for v in vs})
        for j, vs in enumerate(zip(*(n.inputs for n in nodes), strict=True)):
            self.operand(first, j, vs)

    def operand(self, node: ir.Node, j: int, vs: tuple[ir.Value | None, ...]) -> None:
        """Compare one operand at all widths; constants that differ are replaced."""
        given = [v for v in vs if v is not None]
        if not given:
            return
        constants = [v for v in given if v.const_value is not None]
        if len(given) < len(vs) or 0 < len(constants) < len(given):
            raise _cannot(f"operand {j} of {node.name!r} is not always the same kind")
        if not constants:
            if len({id(self.same[id(v)]) for v in given}) > 1:
                raise _cannot(f"operand {j} of {node.name!r} comes from unlike places")
        elif not _equal(given):
            node.replace_input_with(j, self.replaced(node, j, given))

    def replaced(self, node: ir.Node, j: int, vs: list[ir.Value]) -> ir.Value:
        """Return what takes the place of a constant that differs between widths."""
        site = Site(self.models[0], node, node)
        if (node.op_type, j) == ("Reshape", 1):
            return site.const(_reshape(node, [v.const_value.numpy() for v in vs], self._outs(node)))  # type: ignore[union-attr]
        if (node.op_type, j) == ("Expand", 1):
            return site.const(_expand(node, self._ins(node), self._outs(node)))
        if j in SIZES.get(node.op_type, ()):
            raise _cannot(f"{node.op_type} {node.name!r} has sizes that differ")
        return self.table(site, vs)

    def _outs(self, node: ir.Node) -> list[list[int]]:
        return self._shapes(node, lambda n: n.outputs[0])

    def _ins(self, node: ir.Node) -> list[list[int]]:
        return self._shapes(node, lambda n: n.inputs[0])

    def _shapes(self, node: ir.Node, pick: Any) -> list[list[int]]:
        nodes = next(row for row in self.rows if row[0] is node)
        return [_static(pick(n)) for n in nodes]

    def table(self, site: Site, vs: list[ir.Value]) -> ir.Value:
        """Return an input that holds a constant of each width; equal ones are one input."""
        key = tuple(id(v) for v in vs)
        if key in self.made:
            return self.made[key]
        arrays = tuple(np.ascontiguousarray(v.const_value.numpy()) for v in vs)  # type: ignore[union-attr]
        if len({a.ndim for a in arrays}) > 1:
            raise _cannot(f"{vs[0].name!r} has unlike numbers of axes")
        name = f"table.{len(self.tables)}"
        narrow = arrays[0].dtype == np.int64 and not self.wide
        if narrow and any(a.size and abs(a).max() >= 1 << 31 for a in arrays):
            raise _cannot(f"{vs[0].name!r} needs 64-bit integers")
        self.tables[name] = tuple(a.astype(np.int32) for a in arrays) if narrow else arrays
        kind = ir.DataType.from_numpy(self.tables[name][0].dtype)
        entry = ir.Value(name=name, shape=self.axes([list(a.shape) for a in arrays]),
                         type=ir.TensorType(kind))  # fmt: skip
        self.graph.inputs.append(entry)
        found = entry
        if narrow:
            site.anchor = self.graph[0]
            found = site("Cast", entry, to=ir.DataType.INT64, name=f"{name}~value")
            found.shape, found.type = entry.shape, ir.TensorType(ir.DataType.INT64)
        self.made[key] = found
        return found

    def shape(self, vs: tuple[ir.Value, ...]) -> None:
        """Give the first graph's value its fixed and its open sizes."""
        vs[0].shape = self.axes([_static(v) for v in vs])

    def axes(self, shapes: list[list[int]]) -> ir.Shape:
        """Return sizes that are fixed, and names of those that differ: equal ones share a name."""
        if len({len(s) for s in shapes}) > 1:
            raise _cannot(f"a value has unlike numbers of axes: {shapes}")
        dims: list[int | str] = []
        for sizes in zip(*shapes, strict=True):
            if len(set(sizes)) == 1:
                dims.append(sizes[0])
                continue
            name = f"n_{'_'.join(map(str, sizes))}"
            self.sizes[name] = sizes
            dims.append(name)
        return ir.Shape(dims)


def _cannot(why: str) -> PccError:
    hint = "leave out profiles: rounds and prompts are then engines of their own"
    return PccError("E436", f"the pass is not one graph at all widths: {why}", hint=hint)


def _static(v: ir.Value) -> list[int]:
    if v.shape is None or not all(isinstance(d, int) for d in v.shape):
        raise _cannot(f"{v.name!r} has no fixed shape")
    return [int(d) for d in v.shape]  # type: ignore[arg-type]


def _kind(node: ir.Node) -> tuple[object, ...]:
    """Return what two nodes must have alike: operator, numbers of operands, attributes."""
    out: dict[str, Any] = {}
    for name, a in node.attributes.items():
        tensor = a.type == ir.AttributeType.TENSOR
        out[name] = a.as_tensor().numpy().tolist() if tensor else a.value
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), out


def _equal(vs: list[ir.Value]) -> bool:
    """Whether constants are equal; trained arrays are compared without being read."""
    tensors = [v.const_value for v in vs]
    if all(isinstance(x, Stored) for x in tensors):
        return len({(x.array, x.turned) for x in tensors}) == 1  # type: ignore[union-attr]
    arrays = [x.numpy() for x in tensors if x is not None]
    first = arrays[0]
    return all(
        a.shape == first.shape and a.dtype == first.dtype and a.tobytes() == first.tobytes()
        for a in arrays
    )


def _reshape(node: ir.Node, given: list[Values], outs: list[list[int]]) -> Values:
    """Return the sizes of a `Reshape`: -1 for the one that differs between widths."""
    sizes = np.array(outs, np.int64)  # of the results: what a -1 in `given` stands for
    apart = [i for i in range(sizes.shape[1]) if len(set(sizes[:, i])) > 1]
    if len(apart) != 1 or any(0 in g for g in given):
        raise _cannot(f"Reshape {node.name!r} has {len(apart)} sizes that differ")
    return np.where(np.arange(sizes.shape[1]) == apart[0], -1, sizes[0])


def _expand(node: ir.Node, ins: list[list[int]], outs: list[list[int]]) -> Values:
    """Return the sizes of an `Expand`: 1 where the operand has a size that differs already."""
    rank, out = len(outs[0]), []
    for i in range(rank):
        sizes = [o[i] for o in outs]
        has = [x[i - rank + len(x)] if i - rank + len(x) >= 0 else 1 for x in ins]
        if len(set(sizes)) == 1:
            out.append(sizes[0])
        elif sizes == has:
            out.append(1)
        else:
            raise _cannot(f"Expand {node.name!r} repeats by a number that differs")
    return np.array(out, np.int64)
