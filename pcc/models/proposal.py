"""What is drafted given the carry, and the law that it was drawn from.

*full*: x ~ q(x_2..x_n | x_1 = carry), with q(x_i | x_<i) at each i; greedily the max-product draft.
*latent-first*: z ~ q(z | x_1 = carry), then x_i ~ q(x_i | z), whose rows are those of the chosen
experts; greedily the largest z, then the largest x_i. Only r + n - 1 of n r experts are read.
*stepwise* (greedily): x_i = argmax q(x_i | x_1 = carry, x_<i), one position after the other.

Either is compiled alone, over the inputs `carry`, `u` and the circuit's `context`, and validated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import Query, query_inputs
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, Values, postorder, rewrite, tensor, units
from pcc.ir.module import Module
from pcc.ir.types import HALVES
from pcc.passes import pieces as mk
from pcc.passes.draw import Draw, Slot
from pcc.passes.evidence import carried, started
from pcc.passes.manager import Manager
from pcc.passes.messages import MaxUp, Up, expand_fused
from pcc.passes.pipelines import (
    circuit_pipeline,
    lazy_pipeline,
    storage_pipeline,
    tensor_pipeline,
)
from pcc.passes.to_tensor import Ancestral, largest, possible, slots_of
from pcc.passes.upward import rowwise
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate

KINDS = ("full", "latent-first")
GREEDY_KINDS = ("max-product", "stepwise", "latent-first")


@dataclass(frozen=True)
class Proposal:
    """Module with outputs `x i64[n-1]` and, if sampled, `q f32[n-1,V]`; its uniforms in order."""

    module: Module
    slots: tuple[Slot, ...] = ()


def ff_from_heads(heads: Values, name: str = "heads") -> Circuit:
    """Circuit prod_i softmax(heads[i] e)(x_i) of a model's own prediction heads `[n,V,D]`."""
    if heads.ndim != 3:
        raise PccError("M140", f"prediction heads have shape {heads.shape}, expected (n, V, D)")
    n, vocab, width = heads.shape
    table = t.Const(Array.of(np.asarray(heads, np.float32)[:, None]))
    logits = t.Contract(t.Input("context", "f32", "c", (width,)), table, "d,abcd->abc")
    leaf = c.Categorical(tuple(range(n)), t.Softmax(logits))
    folds = tuple(c.Gather(leaf, (i,)) for i in range(n)) if n > 1 else (leaf,)
    root = c.Hadamard(folds) if n > 1 else leaf
    replacement = t.Input("emission_logits", "f32", "b", (n, 1, vocab))
    swap = (("emission_logits", logits, replacement),)
    return Circuit(root, (vocab,) * n, f"{name}-n{n}", "ff", 1, swap)


# ---------------------------------------------------------------- truncation


def settings() -> tuple[t.Input, t.Input]:
    """Return the inputs `draft_temperature` and `draft_top_p`, one number per row."""
    return t.Input("draft_temperature", "f32", "b", ()), t.Input("draft_top_p", "f32", "b", ())


def truncated(root: Op) -> Op:
    """Temper and truncate the sum weights, and the tables of every variable but the first.

    Parameters stay normalised, so the result is a circuit; slot 1 is evidence, not drafted.
    """
    temperature, top_p = settings()

    def law(p: Op) -> Op:
        soft = t.Softmax(Temper(logits_of(p), temperature))
        return Truncate(soft, mk.const(np.int64(0)), top_p)

    def rule(n: Op, _: object) -> Op | None:
        match n:
            case c.Sum(x=x, w=w) if tensor(w).shape[2] > 1:
                return c.Sum(x, law(w))
            case c.Mix(xs=xs, w=w) if len(xs) > 1:
                return c.Mix(xs, law(w))
            case c.Categorical(vars=vs, p=p) if any(vs):
                first = [f for f, v in enumerate(vs) if v == 0]
                rest = [f for f, v in enumerate(vs) if v != 0]
                parts = [_rows_of(p, first)] if first else []
                order = np.argsort([*first, *rest])
                joined = mk.concat([*parts, law(mk.take(p, rest))])
                return c.Categorical(vs, mk.take(joined, order.tolist()))
            case _:
                return None

    (new,) = rewrite((root,), rule)
    return new


def _rows_of(p: Op, folds: list[int]) -> Op:
    """Take some folds of a table before the softmax: the others are not computed for them."""
    return t.Softmax(mk.take(p.x, folds)) if isinstance(p, t.Softmax) else mk.take(p, folds)


def logits_of(p: Op) -> Op:
    """Return x with p = softmax(x) over the last axis, for a normalised parameter."""
    match p:
        case t.Softmax(x=x):
            return x
        case t.Reshape(x=x, shape=shape) if shape[-1:] == tensor(x).shape[-1:]:
            return t.Reshape(logits_of(x), shape)
        case t.Take(x=x, axis=axis, indices=rows) if axis < len(tensor(x).shape) - 1:
            return mk.take(logits_of(x), rows, axis)
        case t.Concat(xs=xs, axis=axis) if axis < len(tensor(p).shape) - 1:
            return t.Concat(tuple(logits_of(x) for x in xs), axis)
        case t.Const(value=array) if np.allclose(array.value.sum(axis=-1), 1, atol=1e-5):
            with np.errstate(divide="ignore"):
                return mk.const(np.log(array.value))
        case _:
            raise PccError(
                "M141",
                f"a parameter made by '{p.name}' is not known to be normalised",
                at=p.loc,
                hint="make it a softmax, or compile with draft truncation off",
            )


# ---------------------------------------------------------------- modules


def sampled(
    circuit: Circuit, manager: Manager, kind: str, *, truncation: bool, maps: bool = False
) -> Proposal:
    """Return the sampled draft of a circuit; with `maps`, chains of draws as maps (for GPUs)."""
    if kind not in KINDS:
        raise PccError("M142", f"proposal={kind!r}", hint=f"one of {', '.join(KINDS)}")
    root = _optimised(circuit, manager, maximise=truncation)
    root = truncated(root) if truncation else root
    slots = tuple(slots_of(root, "draft"))
    args = query_inputs("draft", circuit.n, len(slots), "i64")
    card = max(circuit.cards)
    if kind == "full":
        given = tuple(args.values())
        outs = tuple((o, Query(root, given, "draft", o, card)) for o in ("x", "q"))
        module = manager.run(Module("draft", circuit.cards, outs), tensor_pipeline(maps=maps))
        return Proposal(module, slots)
    x, q = latent_first(root, args["carry"], args["u"], card)
    module = Module("draft-latent-first", circuit.cards, (("x", x), ("q", q)))
    return Proposal(_lazy(module, manager, maps=maps), slots)


def greedy(circuit: Circuit, manager: Manager, kind: str) -> Proposal:
    """Return the deterministic draft of a circuit."""
    if kind not in GREEDY_KINDS:
        raise PccError("M142", f"draft_mode={kind!r}", hint=f"one of {', '.join(GREEDY_KINDS)}")
    root, n = _optimised(circuit, manager, maximise=True), circuit.n
    carry = t.Input("carry", "i64", "b", ())
    if kind == "latent-first":
        module = Module("draft-greedy", circuit.cards, (("x", latent_first_mode(root, carry)),))
        return Proposal(_lazy(module, manager))
    card = max(circuit.cards)
    if kind == "stepwise":
        outs = (("x", Query(root, (carry,), "stepwise", "x", card)),)
        return Proposal(manager.run(Module("stepwise", circuit.cards, outs), tensor_pipeline()))
    given = tuple(query_inputs("mode", n, 0, "i64").values())
    both = tuple((o, Query(root, given, "mode", o, card)) for o in ("x", "log_value"))
    module = manager.run(Module("mode", circuit.cards, both), tensor_pipeline())
    known = mk.const(np.arange(n) == 0)
    values = {"x": started(carry, n), "observed": t.Expand(known, carry, (n,))}
    best = splice(module.roots, values)[0]
    return Proposal(Module("draft-mode", circuit.cards, (("x", mk.take(best, range(1, n))),)))


def _lazy(module: Module, manager: Manager, *, maps: bool = False) -> Module:
    """Run the passes that select experts.

    A selected row of a half matrix is widened where the whole product would round its operand: so
    that the passes can be held to 1e-9, they see the wide matrices, which become half afterwards.
    """
    stored = module.stored

    def wide(n: Op, _: object) -> Op | None:
        half = isinstance(n, t.Const) and tensor(n).dtype in HALVES
        return t.Const(n.value.cast("f32")) if half and isinstance(n, t.Const) else None

    lazy = manager.run(module.rewrite(wide), lazy_pipeline(maps=maps))
    return manager.run(lazy, storage_pipeline(stored))


def splice(roots: tuple[Op, ...], values: dict[str, Op]) -> tuple[Op, ...]:
    """Return `roots` with values in place of the inputs of these names."""
    return rewrite(roots, lambda n, _: values.get(n.key) if isinstance(n, t.Input) else None)


def _optimised(circuit: Circuit, manager: Manager, *, maximise: bool) -> Op:
    if not all(circuit.cards):
        raise PccError("E132", "a draft needs every variable to be finite")
    if circuit.n < 2:
        raise PccError("E134", "a draft needs at least two variables", hint="a wider window")
    pipeline = circuit_pipeline(maximise=maximise)
    return expand_fused(manager.run(circuit.module(), pipeline).roots[0])


# ---------------------------------------------------------------- latent first


def latent_first(root: Op, carry: Op, u: Op, card: int) -> tuple[Op, Op]:
    """Draw z ~ q(z | x_1 = carry), then x_i ~ q(x_i | z); return x and its laws [n-1,V].

    Where the carry has probability zero, z follows its prior.
    """
    n = units(root).scopes[0].bit_count()
    up = Up(carried(carry, n))
    tokens = list(range(1, n))
    drawn = Ancestral(root, up, possible(up(root)), u, tokens)
    q = _experts(root, drawn.draw, n, card)
    x = t.InverseCdf(q, mk.take(u, [drawn.token[v] for v in tokens]))
    return rowwise(x, carry), rowwise(q, carry)


class Latent(MaxUp):
    """Largest p(z, x_1 = carry) over the latents z below each unit, in logs."""

    def leaf(self, n: c.InputOp) -> Op:
        return t.Log(self.evidence.leaf(n))


def latent_first_mode(root: Op, carry: Op) -> Op:
    """argmax_z q(z, x_1 = carry), then argmax_x q(x_i | z) for each i >= 2."""
    n = units(root).scopes[0].bit_count()
    up = Latent(carried(carry, n))
    up(root)

    draw = largest(root, up)
    leaves = [x for x in postorder(root) if isinstance(x, c.Categorical)]
    card = max(tensor(x.p).shape[2] for x in leaves)
    return rowwise(t.ArgMax(_experts(root, draw, n, card)), carry)


def _experts(root: Op, draw: Draw, n: int, card: int) -> Op:
    """Rows [n-1,V] of the tables that the choices select, for variables 2..n."""
    parts: list[mk.Piece] = []
    for leaf in postorder(root):
        if not isinstance(leaf, c.Categorical):
            continue
        folds = [f for f, v in enumerate(leaf.vars) if v > 0]
        if not folds:
            continue
        table, choice = mk.take(leaf.p, folds), mk.take(draw.safe(leaf), folds)
        f, k, width = tensor(table).shape
        rows = mk.reshape(table, (f, width)) if k == 1 else t.SelectRow(table, choice)
        if not draw.sure[leaf]:
            reached = mk.take(draw.choice[leaf], folds)
            off = mk.reshape(t.Less(reached, mk.const(np.zeros(f, np.int64))), (f, 1))
            rows = t.Where(off, mk.full((1, width), 0.0), rows)
        if width < card:
            rows = mk.concat([rows, mk.full((f, card - width), 0.0)], 1)
        parts.append(([leaf.vars[i] - 1 for i in folds], rows))
    return mk.assemble(n - 1, parts)


def renamed(proposal: Proposal, name: str) -> Proposal:
    """Return the proposal under another module name."""
    return replace(proposal, module=replace(proposal.module, name=name))
