"""Tensor IR to ONNX: inputs, one rule per op, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from pcc.backends.onnx import contractions as _contractions
from pcc.backends.onnx import eva_rules as _eva_rules
from pcc.backends.onnx import ngram_rules as _ngram_rules
from pcc.backends.onnx import nn_rules as _nn_rules
from pcc.backends.onnx import sampling_rules as _sampling_rules
from pcc.backends.onnx.graph import BATCH, DTYPE, Graph, Layout, model_of
from pcc.backends.onnx.rules import RULES
from pcc.emission import graph_name
from pcc.errors import PccError
from pcc.ir.core import Op, postorder, tensor, use_counts
from pcc.ir.module import Module
from pcc.targets import TARGETS, Target
from pcc.tensor import ops as t
from pcc.tensor.nn import NetworkOp

__all__ = ["RULES", "lower"]
_RULES_OF = (
    _contractions,
    _eva_rules,
    _ngram_rules,
    _nn_rules,
    _sampling_rules,
)  # importing registers


def layout_of(module: Module) -> Layout:
    """Choose where the batch axis lies: first if any weight or table has one, else after folds."""
    for n in module.nodes():
        if isinstance(n, NetworkOp):
            return Layout(0)
        shape = getattr(n.type, "shape", ())
        if isinstance(n, t.TensorOp) and tensor(n).batch and len(shape) >= 3:
            if isinstance(n, t.Softmax | t.LogSoftmax | t.Input):
                return Layout(0)
        if isinstance(n, t.Input) and n.batch == "c":
            return Layout(0)
    return Layout(1)


def lower(
    module: Module,
    target: Target = TARGETS["onnx"],
    *,
    opset: int | None = None,
    batch: int | None = None,
    inputs: Sequence[t.Input] = (),
    doc: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    symbols: Mapping[str, Mapping[int, str]] | None = None,
    streamed: bool = False,
) -> ir.Model:
    """Return the ONNX model of a tensor module in the forms of a target.

    The graph takes every input in `inputs` (and then any other that the module reads), batch axis
    first, and returns the module's outputs, batch axis first. `layout` says where it lies inside.
    `symbols` names per-row axes, of inputs and outputs by key, whose size the caller leaves open
    (the rows of a cache): the module's ops must be such that their rules hold no such size.
    `opset`: another one than the target's. `batch` fixes the rows of every batch axis: the graph is
    static, without open sizes, and targets that are static need it. `streamed` is for calls with
    one row: large weights that meet a single vector are listed among the inputs (`weight`).
    Errors: E410 (opset), E411 (an op without a rule), E413 (open sizes for a static target).
    """
    target = target.at_opset(opset)
    if (target.static and batch is None) or (batch is not None and symbols):
        what = f"a graph for {target.name!r} needs a batch" if batch is None else "sizes are open"
        raise PccError("E413", what, hint="a static graph has a batch and no open axes")
    g = Graph(layout or layout_of(module), target, batch=batch, streamed=streamed)
    open_axes = symbols or {}
    listed = list(inputs)
    listed += [n for n in module.nodes() if isinstance(n, t.Input) and n not in listed]
    taken = [_input(g, n, open_axes.get(n.key, {})) for n in listed]
    _values(g, module)
    names = {v.name for v in taken}
    outputs: list[ir.Value] = []
    for name, n in module.outputs:
        outputs.append(_output(g, graph_name(name, names), n, outputs, open_axes.get(name, {})))
    model = model_of(g, module.name, taken, outputs, doc or {})
    _prune(model)
    model.graph.inputs.extend(g.streams())
    return model


def _values(g: Graph, module: Module) -> None:
    """Lower every op of a module by its rule; its inputs have values. Errors: E411."""
    splits, g.uses = _splits(module), use_counts(*module.roots)
    g.roots = frozenset(module.roots)
    for i, n in enumerate(postorder(*module.roots)):
        g.layer, g.kind, g.place = f"{n.name.removeprefix('t.')}_{i}", n.name, n.loc
        if isinstance(n, t.Input):
            continue
        if isinstance(n, t.Const):
            g.values[n] = g.weight(n.value)
        elif n in splits:
            _split(g, n, splits[n])
        elif (rule := RULES.get(type(n))) is not None:
            if n not in g.values:
                g.values[n] = rule(g, n)
        else:
            raise PccError("E411", f"'{n.name}' has no ONNX lowering", at=n.loc)


def _dims(g: Graph, n: Op, symbols: Mapping[int, str]) -> list[int | str]:
    """Return the dimensions of an input or output, batch axis first."""
    kind = tensor(n)
    dims: list[int | str] = [symbols.get(i, size) for i, size in enumerate(kind.shape)]
    rows = BATCH.get(kind.batch) if g.batch is None else g.batch
    return [rows, *dims] if kind.batch and rows is not None else dims


def _swap(rank: int) -> list[int]:
    """Return the permutation that swaps the batch axis with the first of `rank` others."""
    return [1, 0, *range(2, rank + 1)]


def _input(g: Graph, n: t.Input, symbols: Mapping[int, str]) -> ir.Value:
    rank, dims = len(n.shape), _dims(g, n, symbols)
    value = ir.Value(name=n.key, shape=ir.Shape(dims), type=ir.TensorType(DTYPE[n.dtype]))
    g.layer, g.kind, g.place = f"input_{n.key}", n.name, n.key
    if n.batch and n.batch not in g.sizes and g.batch is None:
        g.sizes[n.batch] = g("Shape", value, start=0, end=1)
    g.values[n] = value
    if n.batch and rank and g.layout.position == 1:
        g.values[n] = g("Transpose", value, perm=_swap(rank))
    return value


def _output(
    g: Graph, name: str, n: Op, others: Sequence[ir.Value], symbols: Mapping[int, str]
) -> ir.Value:
    g.layer, g.kind, g.place = f"output_{name}", "output", name
    rank, value = len(tensor(n).shape), g.values[n]
    if tensor(n).batch and rank and g.layout.position == 1:
        value = g("Transpose", value, perm=_swap(rank))
    elif value.producer() is None or any(value is v for v in others):
        value = g("Identity", value)
    # else the node writes the output itself: a cache is bound in place only without a copy
    assert isinstance(value, ir.Value)
    dims = _dims(g, n, symbols)
    value.name, value.shape = name, ir.Shape(dims)
    value.type = ir.TensorType(DTYPE[tensor(n).dtype])
    return value


def _splits(module: Module) -> dict[Op, list[t.Take]]:
    """Return, by source, the selections that cut it into consecutive pieces: one Split each."""
    found: dict[tuple[Op, int], list[t.Take]] = {}
    for n in module.nodes():
        if isinstance(n, t.Take):
            found.setdefault((n.x, n.axis), []).append(n)
    out: dict[Op, list[t.Take]] = {}
    for takes in found.values():
        takes.sort(key=lambda n: n.indices)
        runs = [(n.indices[0], n.indices[-1] + 1) for n in takes]
        whole = all(len(n.indices) == b - a for n, (a, b) in zip(takes, runs, strict=True))
        apart = all(runs[i][1] <= runs[i + 1][0] for i in range(len(runs) - 1))
        if len(takes) > 1 and whole and apart:
            out.update(dict.fromkeys(takes, takes))
    return out


def _split(g: Graph, n: Op, takes: list[t.Take]) -> None:
    if n in g.values:
        return
    source, axis = takes[0].x, takes[0].axis
    size = tensor(source).shape[axis]
    sizes: list[int] = []
    owners: list[t.Take | None] = []
    at = 0
    for take in takes:
        if take.indices[0] > at:
            sizes.append(take.indices[0] - at)
            owners.append(None)
        sizes.append(len(take.indices))
        owners.append(take)
        at = take.indices[-1] + 1
    if at < size:
        sizes.append(size - at)
        owners.append(None)
    parts = g(
        "Split",
        g.values[source],
        g.ints(*sizes),
        outputs=len(sizes),
        axis=g.layout.axis(source, axis),
    )
    for owner, part in zip(owners, parts, strict=True):
        if owner is not None:
            g.values[owner] = part


def _prune(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads (sizes that were not needed)."""
    for node in reversed(list(model.graph)):
        if not any(v.uses() or v in model.graph.outputs for v in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
