"""An ONNX graph under construction, and where its batch axis lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pcc.ir.array import Array, dtype_of, kind_of
from pcc.ir.core import Op, tensor
from pcc.ir.types import HALVES, INT8
from pcc.targets import INFINITE_MAX, Target
from pcc.tensor import ops as t

DTYPE = {
    "f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16,
    "i64": ir.DataType.INT64, "i8": ir.DataType.INT8, "bool": ir.DataType.BOOL,
}  # fmt: skip
BATCH = {"b": "batch", "c": "context_batch"}
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")
BOUND = "pcc.bound"  # marks an initializer that is to be a graph input only


INLINE = 1024  # bytes; smaller tensors stay in the graph file
STREAMED = 1 << 20  # bytes; larger weights may be graph inputs, which runtimes do not copy


class Stored(ir.LazyTensor):
    """A trained array as a tensor, or its transpose `[.., D]` to `[D, ..]`: made when it is read.

    `backends.onnx.weights` writes it to a file without holding it.
    """

    def __init__(self, array: Array, turned: bool, name: str) -> None:
        self.array, self.turned = array, turned
        shape = (array.shape[-1], array.size // array.shape[-1]) if turned else array.shape
        super().__init__(
            self._made, dtype=DTYPE[array.dtype], shape=ir.Shape(shape), name=name, cache=False
        )

    def _made(self) -> ir.TensorProtocol:
        value = self.array.value
        if self.turned:
            value = np.ascontiguousarray(value.reshape(-1, value.shape[-1]).T)
        return ir.tensor(value, name=self.name)


@dataclass(frozen=True)
class Layout:
    """Physical position of the batch axis: 0, or 1 (after the fold axis) in trained circuits.

    With folds first, `[F, B, K] @ [F, K, Ko]` is one matrix product, and selections of folds are
    contiguous. Contextual weights `[B, F, Ko, Ki]` want the batch first everywhere.
    """

    position: int

    def at(self, n: Op) -> int:
        """Return the physical index of the batch axis of `n`."""
        return min(self.position, len(tensor(n).shape))

    def axis(self, n: Op, axis: int) -> int:
        """Return the physical index of a per-row axis."""
        return axis + 1 if tensor(n).batch and axis >= self.at(n) else axis

    def shape(self, n: Op, shape: Sequence[int] | None = None) -> list[int]:
        """Return the physical shape for `Reshape`, -1 for the batch axis."""
        out = list(tensor(n).shape if shape is None else shape)
        if tensor(n).batch:
            out.insert(min(self.position, len(out)), -1)
        return out


class Graph:
    """Emits nodes by ONNX op name; constants are shared by content.

    `batch`: the rows of a static graph, None where the caller leaves them open. A static graph
    holds every size as a number.
    """

    def __init__(
        self, layout: Layout, target: Target, *, batch: int | None = None, streamed: bool = False
    ) -> None:
        self.layout, self.target, self.opset = layout, target, target.opset
        self.batch, self.streamed = batch, streamed
        self.weights: dict[tuple[Array, str], ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.values: dict[Op, ir.Value] = {}
        self.uses: dict[Op, int] = {}  # how many nodes and outputs read each op
        self.roots: frozenset[Op] = frozenset()  # what the graph returns
        self.sizes: dict[str, ir.Value] = {}  # batch sizes as i64[1]
        self.memo: dict[object, ir.Value] = {}
        self.halves: dict[int, ir.Value] = {}  # by id of a widened value: what it was before
        self.layer, self.kind, self.place = "", "", ""
        self.count = 0

    def __call__(self, op: str, *xs: ir.Value | None, outputs: int = 1, **attrs: Any) -> Any:
        """Add a node; returns its output, or a list if it has several."""
        self.count += 1
        name = f"{self.layer}/{op}_{self.count}"
        outs = [ir.Value(name=f"{name}:{i}" if outputs > 1 else name) for i in range(outputs)]
        node = ir.node(op, list(xs), attributes=attrs or None, outputs=outs, name=name)
        node.metadata_props["pcc.op"] = self.kind
        node.metadata_props["pcc.layer"] = self.place or self.layer
        self.nodes.append(node)
        return outs if outputs > 1 else outs[0]

    def alone(self, *ops: Op) -> bool:
        """Whether each of these values is read once, so that its reader may make it."""
        return all(self.uses.get(n) == 1 for n in ops)

    def const(self, value: object, dtype: str = "") -> ir.Value:
        """Return a constant, shared with equal ones."""
        a = np.asarray(value)
        kind = dtype or kind_of(a) or {"f": "f32", "i": "i64"}[a.dtype.kind]
        a = np.ascontiguousarray(a, dtype_of(kind)).reshape(a.shape)
        key: Any = (kind, tuple(a.shape), a.tobytes())
        if key not in self.constants:
            name = f"k{len(self.constants)}"
            made = ir.Value(
                name=name,
                shape=ir.Shape(a.shape),
                type=ir.TensorType(DTYPE[kind]),
                const_value=ir.tensor(a, name=name),
            )
            self.constants[key] = made
        return self.constants[key]

    def weight(self, array: Array, *, transposed: bool = False, stream: bool = False) -> ir.Value:
        """Return a trained array, or its transpose, as a constant; one copy for all graphs.

        With `stream`, and if the graph may, a large one is an initializer that is a graph input as
        well: a default that could be overridden. Runtimes neither copy it into another order nor
        fold it. Where the target wants weights as inputs, every large one is `bound`: the writer
        takes the default away. Integers of 8 bits are stored so, and widened when the graph is
        loaded: as inputs they would be at each call, and DequantizeLinear would be made a product
        of the runtime's own that rounds x to 8 bits too.
        """
        if array.dtype != INT8:
            return self._weight(array, transposed=transposed, stream=stream)
        found = self._weight(array, transposed=transposed, stream=False)
        key: object = ("wide", id(found))
        if key not in self.memo:
            self.memo[key] = self.cast(found, "f32")
        return self.memo[key]

    def _weight(self, array: Array, *, transposed: bool, stream: bool) -> ir.Value:
        if array.nbytes < INLINE:
            flat = array.value.reshape(-1, array.shape[-1]) if transposed else array.value
            return self.const(flat.T if transposed else flat)
        bound = self.target.weights == "inputs" and array.dtype in ("f32", *HALVES)
        stream = (bound or (stream and self.streamed)) and array.nbytes >= STREAMED
        key = (array, f"{'t' if transposed else ''}{'s' if stream else ''}")
        if key not in self.weights:
            name = f"{'weight.' if bound else 'stream' if stream else 'w'}{len(self.weights)}"
            value = Stored(array, transposed, name)
            self.weights[key] = ir.Value(
                name=name,
                shape=ir.Shape(value.shape),
                type=ir.TensorType(DTYPE[array.dtype]),
                const_value=value,
            )
            if bound and stream:
                self.weights[key].meta[BOUND] = True
        return self.weights[key]

    def streams(self) -> list[ir.Value]:
        """Return the weights that are to be listed among the inputs."""
        return [v for (_, form), v in self.weights.items() if "s" in form and v.uses()]

    def ints(self, *values: int) -> ir.Value:
        """Return a one-dimensional i64 constant."""
        return self.const(np.array(values, np.int64))

    def reduce(self, op: str, x: ir.Value, axes: Sequence[int], keepdims: int = 0) -> ir.Value:
        """Reduce axes; before opset 18 most reductions take them as an attribute."""
        if self.opset >= 18 or op == "ReduceSum":
            return self(op, x, self.ints(*axes), keepdims=keepdims)  # type: ignore[no-any-return]
        return self(op, x, axes=list(axes), keepdims=keepdims)  # type: ignore[no-any-return]

    def largest(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Return the largest f32 number along axes, -inf where all are: not every runtime does."""
        top = self.reduce("ReduceMax", x, axes)
        if INFINITE_MAX not in self.target.faults:
            return top
        none = self("Less", top, self.const(np.float32(t.LOWEST)))
        return self("Where", none, self.const(np.float32(-np.inf)), top)  # type: ignore[no-any-return]

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape to physical dimensions (-1 once)."""
        return self("Reshape", x, self.ints(*shape))  # type: ignore[no-any-return]

    def guard(self, x: ir.Value) -> ir.Value:
        """Replace -inf by the lowest finite number, so that no difference makes a NaN."""
        return self("Max", x, self.const(np.float32(t.LOWEST)))  # type: ignore[no-any-return]

    def cast(self, x: ir.Value, dtype: str) -> ir.Value:
        """Return f32 numbers rounded to a half dtype, or half numbers widened; once for each."""
        if dtype not in HALVES:
            return self("Cast", x, to=DTYPE[dtype])  # type: ignore[no-any-return]
        key: object = ("cast", id(x), dtype)  # values live as long as the graph
        if key not in self.memo:
            self.memo[key] = self("Cast", x, to=DTYPE[dtype])
        return self.memo[key]

    def as_stored(self, x: ir.Value, like: Op) -> ir.Value:
        """Return f32 numbers rounded to the dtype of `like` where that is half.

        What was widened from that dtype and only moved since is moved as it was: no casts.
        """
        dtype = tensor(like).dtype
        if dtype not in HALVES:
            return x
        return self._moved(x, dtype) or self.cast(x, dtype)

    def _moved(self, x: ir.Value, dtype: str) -> ir.Value | None:
        if (known := self.halves.get(id(x))) is not None:
            return known if known.dtype == DTYPE[dtype] else None
        node = x.producer()
        if node is None or node.op_type not in MOVES or node.inputs[0] is None:
            return None
        if (source := self._moved(node.inputs[0], dtype)) is None:
            return None
        perm = node.attributes.get("perm")
        attrs: dict[str, Any] = {} if perm is None else {"perm": list(perm.as_ints())}
        moved: ir.Value = self(node.op_type, source, *node.inputs[1:], **attrs)
        moved.dtype = DTYPE[dtype]
        self.halves[id(x)] = moved
        return moved

    def wide(self, y: ir.Value, like: Op) -> ir.Value:
        """Return `y`, of the dtype of `like`, as f32 where that is half."""
        dtype = tensor(like).dtype
        if dtype not in HALVES:
            return y
        y.dtype = DTYPE[dtype]
        out = self.cast(y, "f32")
        self.halves[id(out)] = y
        return out

    def size(self, batch: str) -> ir.Value:
        """Return the size of a batch axis as i64[1]."""
        return self.sizes[batch] if self.batch is None else self.ints(self.batch)

    def extent(self, x: ir.Value, n: Op, axis: int) -> ir.Value:
        """Return the size of a per-row axis (from the end) that may be open, as i64[1]."""
        if self.batch is not None:
            return self.ints(tensor(n).shape[axis])
        key: object = ("extent", id(x), axis)
        if key not in self.memo:
            end = {} if axis == -1 else {"end": axis + 1}
            self.memo[key] = self("Shape", x, start=axis, **end)
        return self.memo[key]

    def steps(self, size: ir.Value) -> ir.Value:
        """Return 0..size-1 for a size as i64[1]."""
        if size.const_value is not None:
            return self.const(np.arange(int(size.const_value.numpy()[0])))
        last = self("Squeeze", size, self.ints(0))
        return self("Range", self.const(np.int64(0)), last, self.const(np.int64(1)))  # type: ignore[no-any-return]

    def full_shape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return the shape of `x`, which is `[batch, *shape]`."""
        if self.batch is not None:
            return self.ints(self.batch, *shape)
        return self("Shape", x)  # type: ignore[no-any-return]

    def operand(self, x: Op, result: Op) -> ir.Value:
        """Return `x` so that it broadcasts element-wise in `result`."""
        p = min(self.layout.position, len(tensor(x).shape))
        if tensor(x).batch or not tensor(result).batch or p == 0:
            return self.values[x]
        if isinstance(x, t.Const):
            return self.const(np.expand_dims(x.value.value, p))
        return self("Unsqueeze", self.values[x], self.ints(p))  # type: ignore[no-any-return]

    def expanded(self, x: Op, batch: str, shape: Sequence[int]) -> ir.Value:
        """Return `x` repeated over a batch axis and stretched to a per-row shape."""
        t_x = tensor(x)
        if t_x.batch == batch and tuple(shape) == t_x.shape:
            return self.values[x]
        if not batch:
            return self("Expand", self.values[x], self.ints(*shape))  # type: ignore[no-any-return]
        p = min(self.layout.position, len(shape))
        value = self.values[x]
        if not t_x.batch:
            value = self("Unsqueeze", value, self.ints(p))
        if self.batch is not None:
            return self("Expand", value, self.ints(*shape[:p], self.batch, *shape[p:]))  # type: ignore[no-any-return]
        parts = [self.ints(*shape[:p])] if p else []
        parts.append(self.size(batch))
        if shape[p:]:
            parts.append(self.ints(*shape[p:]))
        full = self("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        return self("Expand", value, full)  # type: ignore[no-any-return]

    def rows(self, table: Op, result: Op, block: int, rank: int) -> ir.Value | None:
        """Return `row * block`, the offset of each row's own table, or None for a trained table.

        It broadcasts with an index of per-row rank `rank`.
        """
        batch, own = tensor(result).batch, tensor(table).batch
        if not own:
            return None
        key: object = ("rows", batch, own, block, rank)
        if key not in self.memo:
            shape = [1] * rank
            shape.insert(min(self.layout.position, rank), -1)
            if self.batch is not None:
                return self.const((np.arange(self.batch) * block).reshape(shape))
            index = self.steps(self.size(batch))
            if own != batch:  # one context row serves every row
                index = self("Mod", index, self.size(own))
            index = self("Mul", index, self.const(np.int64(block)))
            self.memo[key] = self.reshape(index, shape)
        return self.memo[key]


def model_of(
    g: Graph,
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    doc: Mapping[str, str],
) -> ir.Model:
    """Return the finished model."""
    graph = ir.Graph(
        list(inputs),
        list(outputs),
        nodes=g.nodes,
        initializers=[*g.constants.values(), *g.weights.values()],
        opset_imports={"": g.opset},
        name=name,
    )
    model = ir.Model(graph, ir_version=10 if g.opset >= 21 else 8, producer_name="pcc")
    model.metadata_props.update(doc)
    return model
