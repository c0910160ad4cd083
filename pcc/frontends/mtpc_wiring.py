"""Wiring of a folded MTPC circuit: decoded from the stored fold indices, or rebuilt by rule.

A folded circuit is a list of modules: module 0 holds the leaf folds, the others are product or sum
layers. The stored index of a layer addresses the concatenation of its input modules, ordered by
first use, but does not name them. Decoding therefore searches for the assignment under which the
circuit is a decomposable tree that uses every fold once; it must exist and be unique.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends.regions import levels

Pair = tuple[int, int]
Shape = tuple[int, ...]
Span = tuple[int, int, int]
LEAVES = -1
_MAX_STEPS = 200_000


@dataclass(frozen=True)
class SumFold:
    """Inputs of one fold of a sum layer, as (layer, fold); layer -1 means the leaves.

    mix False: the elementwise product of all inputs is what the sum reads (one input: itself).
    mix True: the sum reads the inputs side by side, Ki = number of inputs (one unit each).
    """

    inputs: tuple[Pair, ...]
    mix: bool = False


@dataclass(frozen=True)
class Wiring:
    """Inputs of every sum layer in topological order; the output is the product over ``root``."""

    sums: tuple[tuple[SumFold, ...], ...]
    root: tuple[Pair, ...]


def expect_shapes(kind: str, n: int, r: int, s: int, shapes: Sequence[Shape], at: str) -> None:
    """Check the (F, Ko, Ki) of every sum layer against kind, n, r, s.

    ff: none; cp: (1,1,r); hmm: n-1 times (1,r,r), (1,1,r); btree: levels (F,r,r) with n-2 folds per
    repetition in all, roots (s,1,r), and for s > 1 the mixture (1,1,s). Errors: F113.
    """
    top: list[Any] = [(s, 1, r)] + ([(1, 1, s)] if s > 1 else [])
    want: list[Any] = {"ff": [], "hmm": [(1, r, r)] * (n - 1) + top}.get(kind, top)
    if kind == "btree":
        inner: list[Any] = list(shapes[: max(0, len(shapes) - len(top))])
        good = all(x[1:] == (r, r) for x in inner) and sum(x[0] for x in inner) == s * (n - 2)
        want = (inner if good else [("F", r, r)] * len(inner)) + top
    if list(shapes) != want or (kind == "ff" and r != 1) or (kind != "btree" and s != 1):
        what = f"sum layers {_show(shapes)} do not fit {kind} n={n} r={r} repetitions={s}: "
        hint = "check circuit.{name,n_token,n_component,n_repetition} in config.yaml"
        raise PccError("F113", what + f"expected {_show(want)}", at=at, hint=hint)


def _show(shapes: Sequence[Any]) -> str:
    text = [",".join(str(v) for v in shape) for shape in shapes]
    return f"[({'), ('.join(text[:20])}){', ...' if len(text) > 20 else ''}]" if text else "[]"


# --- rebuilt -----------------------------------------------------------------------------------


def rebuild(
    kind: str, n: int, s: int, scope: Sequence[int], shapes: Sequence[Shape], at: str
) -> Wiring:
    """Derive the wiring from the published construction and check it against scope and shapes.

    Tree rule: a span is cut at round(len / 2) (halves to even); leaves are numbered breadth first,
    a level's sums in the order in which their last input appears. Errors: F114.
    Source: published region graphs, folding order as observed on libcirkit 0.3.1.
    """
    leaves = tuple((LEAVES, i) for i in range(n * s))
    if kind != "btree" and s != 1:
        raise PccError("F114", f"no published rule for {kind} with {s} repetitions", at=at)
    if kind == "ff":
        return Wiring((), leaves)
    if kind == "cp":
        return Wiring(((SumFold(leaves),),), ((0, 0),))
    if kind == "hmm":
        chain = [(SumFold(((LEAVES, 0),)),)]
        chain += [(SumFold(((k - 1, 0), (LEAVES, k))),) for k in range(1, n)]
        return Wiring(tuple(chain), ((n - 1, 0),))
    found = {
        _tree_wiring(order, n, s)
        for order in (_leaf_order(n, s, together=True), _leaf_order(n, s, together=False))
        if _fits(order, n, s, scope)
    }
    found = {w for w in found if [len(x) for x in w.sums] == [x[0] for x in shapes]}
    if len(found) != 1:
        what = "several trees fit" if found else "the published split rule does not fit"
        what += f" the scope index {list(scope)[:40]} and the sum layers {_show(shapes)}"
        hint = "keep the _in_fold_idx buffers in the checkpoint: they hold the wiring"
        raise PccError("F114", what, at=at, hint=hint)
    return found.pop()


def _fits(order: Sequence[Pair], n: int, s: int, scope: Sequence[int]) -> bool:
    """Report whether every repetition's leaves cover each of the n tokens exactly once."""
    want = list(range(n))
    return all(
        sorted(v for v, (q, _) in zip(scope, order, strict=True) if q == rep) == want
        for rep in range(s)
    )


def _leaf_order(n: int, s: int, *, together: bool) -> list[Pair]:
    """Return (repetition, span position) per leaf fold: breadth first, jointly or one by one."""
    starts = [[(rep, 0, n) for rep in range(s)]] if together else [[(q, 0, n)] for q in range(s)]
    order: list[Pair] = []
    for queue in starts:
        for rep, begin, end in queue:  # grows while it is read: breadth first
            if end - begin == 1:
                order.append((rep, begin))
                continue
            cut = begin + round((end - begin) / 2)
            queue.extend([(rep, begin, cut), (rep, cut, end)])
    return order


def _tree_wiring(order: Sequence[Pair], n: int, s: int) -> Wiring:
    """Fold the trees level by level: a node joins the first level after both children exist."""
    parent: dict[Span, Span] = {}
    children: dict[Span, list[Span]] = {}
    todo = [(rep, 0, n) for rep in range(s)]
    for node in todo:
        rep, begin, end = node
        if end - begin > 1:
            cut = begin + round((end - begin) / 2)
            children[node] = [(rep, begin, cut), (rep, cut, end)]
            todo += children[node]
            parent.update((child, node) for child in children[node])
    frontier = [(rep, at, at + 1) for rep, at in order]
    place: dict[Span, Pair] = {x: (LEAVES, i) for i, x in enumerate(frontier)}
    sums: list[tuple[SumFold, ...]] = []
    for level in levels(frontier, parent, dict.fromkeys(children, 2)):
        sums.append(tuple(SumFold(tuple(place[c] for c in children[x])) for x in level))
        place.update((x, (len(sums) - 1, i)) for i, x in enumerate(level))
    if s > 1:
        sums.append((SumFold(tuple((len(sums) - 1, i) for i in range(s)), mix=True),))
    return Wiring(tuple(sums), ((len(sums) - 1, 0),))


# --- decoded -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """One folded module: what it is, and the flat fold index of its F x H inputs."""

    role: str  # "leaf", "product", "sum" or "mix"
    flat: tuple[int, ...]
    folds: int
    whole: bool  # no stored index: the inputs are all folds of the input modules, in order


def decode(
    kind: str,
    n: int,
    scope: Sequence[int],
    shapes: Sequence[Shape],
    index: Mapping[int, np.ndarray[Any, Any]],
    at: str,
) -> Wiring:
    """Decode the stored fold indices (layer -> (F, H) indices; the last entry is the output's).

    Errors: F115 (indices that describe no such circuit, or more than one).
    Source: folding conventions as observed on libcirkit 0.3.1.
    """
    modules = _modules(kind, n, len(scope), shapes, index, at)
    found: list[list[tuple[Pair, ...]]] = []
    for solution in _solutions(modules, n, scope, at):
        found.append(solution)
        if len(found) > 1:
            break
    if len(found) != 1:
        what = "can be read in more than one way" if found else "describe no decomposable tree"
        hint = "the checkpoint is damaged, or written by an unknown version"
        raise PccError("F115", f"the fold indices {what} for {kind}, n={n}", at=at, hint=hint)
    return _inline(modules, found[0])


def _modules(
    kind: str,
    n: int,
    leaves: int,
    shapes: Sequence[Shape],
    index: Mapping[int, np.ndarray[Any, Any]],
    at: str,
) -> list[_Module]:
    """Lay out the modules of this kind and check the stored indices' shapes. Errors: F115."""
    s = leaves // n
    roles = ["product"] if kind == "ff" else ["product", "sum"] * (len(shapes) - (s > 1))
    if kind == "hmm":
        roles = roles[1:]
    elif s > 1:
        roles += ["mix"]
    modules, number = [_Module("leaf", (), leaves, False)], 0
    for i, role in enumerate(roles, start=1):
        folds = shapes[number][0] if role != "product" else 1
        number += role != "product"
        arity = {"sum": 1, "mix": s}.get(role, n if kind in ("ff", "cp") else 2)
        array = index.get(i)
        if array is None:
            flat = tuple(range(folds * arity))
        elif array.ndim == 2 and array.shape[1] == arity and role in ("product", "sum", "mix"):
            folds = len(array) if role == "product" else folds
            flat = tuple(int(v) for v in array.reshape(-1))
        else:
            flat = ()
        if len(flat) != folds * arity or min(flat, default=0) < 0 or folds > leaves:
            shape = None if array is None else array.shape
            raise PccError("F115", f"fold index {i} of shape {shape} fits no {role}", at=at)
        modules.append(_Module(role, flat, folds, array is None))
    out = index.get(len(modules))
    if out is None or out.tolist() != [0] or max(index) != len(modules):
        what = f"entries {sorted(index)} do not end with the output, entry {len(modules)}"
        raise PccError("F115", f"fold index {what}", at=at)
    return modules


_READS = {"product": ("leaf", "sum"), "sum": ("product", "leaf"), "mix": ("sum",)}


def _assignments(
    modules: Sequence[_Module], i: int, used: frozenset[Pair]
) -> Iterator[tuple[Pair, ...]]:
    """Yield the possible inputs (module, fold) of module i, given the folds already consumed."""
    me = modules[i]
    free = [
        m
        for m in range(i)
        if modules[m].role in _READS[me.role]
        and any((m, f) not in used for f in range(modules[m].folds))
    ]
    stack: list[tuple[int, ...]] = [()]
    while stack:
        chosen = stack.pop()
        space = [(m, f) for m in chosen for f in range(modules[m].folds)]
        unknown = next((v for v in me.flat if v >= len(space)), None)
        if unknown is not None:
            room = unknown - len(space)
            stack += [(*chosen, m) for m in free if m not in chosen and room < modules[m].folds]
            continue
        picks = tuple(space[v] for v in me.flat)
        fresh = len(set(picks)) == len(picks) and not used.intersection(picks)
        if fresh and (not me.whole or len(picks) == len(space)):
            yield picks


def _solutions(
    modules: Sequence[_Module], n: int, scope: Sequence[int], at: str
) -> Iterator[list[tuple[Pair, ...]]]:
    """Search depth first for assignments that make a decomposable tree over all n tokens."""
    masks: list[tuple[int, ...]] = [tuple(1 << v for v in scope)]
    picks: list[tuple[Pair, ...]] = []
    used: list[frozenset[Pair]] = [frozenset()]
    search = [_assignments(modules, 1, used[0])]
    for _ in range(_MAX_STEPS):
        step = next(search[-1], None)
        if step is None:
            search.pop()
            if not search:
                return
            masks.pop()
            picks.pop()
            used.pop()
            continue
        mask = _scopes(modules[len(search)], step, masks)
        if mask is None:
            continue
        taken = used[-1].union(step)
        if len(search) + 1 < len(modules):
            masks.append(mask)
            picks.append(step)
            used.append(taken)
            search.append(_assignments(modules, len(search) + 1, taken))
        elif mask == ((1 << n) - 1,) and len(taken) == sum(m.folds for m in modules[:-1]):
            yield [*picks, step]
    raise PccError("F115", "the fold indices leave too many readings", at=at)


def _scopes(
    me: _Module, picks: tuple[Pair, ...], masks: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """Return the scope (bit mask) of each fold, None where a product overlaps or a mix differs."""
    arity, result = len(picks) // me.folds, []
    for fold in range(me.folds):
        parts = [masks[m][f] for m, f in picks[fold * arity : (fold + 1) * arity]]
        whole = 0
        for part in parts:
            overlaps = me.role == "product" and whole & part
            if overlaps or (me.role == "mix" and part != parts[0]):
                return None
            whole |= part
        result.append(whole)
    return tuple(result)


def _inline(modules: Sequence[_Module], solution: list[tuple[Pair, ...]]) -> Wiring:
    """Replace module numbers by sum-layer numbers and products by their inputs."""
    layer = {0: LEAVES}
    products: dict[Pair, tuple[Pair, ...]] = {}
    sums: list[tuple[SumFold, ...]] = []
    for i, (me, picks) in enumerate(zip(modules[1:], solution, strict=True), start=1):
        arity = len(picks) // me.folds
        rows = [picks[f * arity : (f + 1) * arity] for f in range(me.folds)]
        if me.role == "product":
            products |= {(i, f): tuple((layer[m], g) for m, g in x) for f, x in enumerate(rows)}
            continue
        plain = [[products.get(p) or ((layer[p[0]], p[1]),) for p in row] for row in rows]
        layer[i] = len(sums)
        sums.append(
            tuple(SumFold(tuple(q for x in row for q in x), me.role == "mix") for row in plain)
        )
    if modules[-1].role == "product":
        return Wiring(tuple(sums), products[(len(modules) - 1, 0)])
    return Wiring(tuple(sums), ((len(sums) - 1, 0),))
