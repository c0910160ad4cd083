"""Circuit templates: fully factorised, CP (mixture), HMM, region graphs; trained or contextual.

Trained: tables `[F,K,V]` and weights `[F,Ko,Ki]` are probabilities. Contextual (`context=D`): they
are softmaxes of linear functions of an input `context [Bc,D]` (the published MTPC head, arXiv
2511.11346 §3.3), and the logits can be supplied instead (`Circuit.with_logits`). Layers are "cp-t":
a product, then a dense sum.

`weights={"emissions": array, "sums": [array, ...]}` gives the parameters: tables `[s*n, r, V]` in
token order (repetition by repetition), sums in the published order (HMM: the last transition first;
trees: level by level from the leaves; the root last); contextual ones have a last axis D. Without
`weights` they are drawn from `seed`. `weights` may also be a function of a parameter's name and
shape that makes its array, which need not be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends.regions import Nested, RegionGraph, balanced, from_nested, levels, shuffled
from pcc.ir.array import Array
from pcc.ir.core import Op, Values
from pcc.ir.types import variables_of
from pcc.tensor import ops as t

Draw = Callable[[str, tuple[int, ...]], Array]  # name, shape -> array
Weights = Mapping[str, Any] | Draw


class Parameters:
    """Makes tables and weights, from arrays or a seed, and lists the logits among them."""

    def __init__(self, context: int, seed: int, weights: Weights | None) -> None:
        if type(context) is not int or context < 0:
            raise PccError("T100", f"the context has width {context!r}")
        if type(seed) is not int or seed < 0:
            raise PccError("T100", f"the seed is {seed!r}, not an int from 0")
        self.context, self.rng = context, np.random.default_rng(seed)
        self.draw = weights if callable(weights) else None
        self.given = weights = None if callable(weights) else weights
        if weights is not None and not isinstance(weights, Mapping):
            raise PccError("T101", f"weights are {type(weights).__name__}, not a mapping")
        if weights is not None and (bad := set(weights) ^ {"emissions", "sums"}):
            what = f"weights need 'emissions' and 'sums'; wrong or missing: {sorted(bad)}"
            raise PccError("T101", what)
        self.sums: list[Values] = []
        if weights:
            if not isinstance(weights["sums"], Iterable):
                raise PccError("T101", "'sums' is no list of arrays")
            self.sums = [_array(w, "sums") for w in weights["sums"]]
        self.logits: list[tuple[str, Op, Op]] = []
        self.count = 0

    def table(self, folds: int, k: int, v: int) -> Op:
        """Return the emission tables."""
        value = None if self.given is None else _array(self.given["emissions"], "emissions")
        return self._make((folds, k, v), value, "emission_logits")

    def sum(self, folds: int, ko: int, ki: int) -> Op:
        """Return the weight of the next sum layer."""
        name = f"sum_logits.{self.count}"
        if self.given is not None and self.count >= len(self.sums):
            raise PccError("T101", f"'sums' holds {len(self.sums)} arrays, but more are needed")
        value = self.sums[self.count] if self.given is not None else None
        self.count += 1
        return self._make((folds, ko, ki), value, name)

    def _make(self, shape: tuple[int, ...], value: Values | None, name: str) -> Op:
        array = self._array(shape, value, name)
        if not self.context:
            return t.Const(array)
        x = t.Input("context", "f32", "c", (self.context,))
        logits = t.Contract(x, t.Const(array), "d,abcd->abc")
        self.logits.append((name, logits, t.Input(name, "f32", "b", shape)))
        return t.Softmax(logits)

    def _array(self, shape: tuple[int, ...], value: Values | None, name: str) -> Array:
        full = (*shape, self.context) if self.context else shape
        if self.draw is not None:
            return self.draw(name, full)
        if value is None:
            value = self._draw(full)
        if value.shape != full:
            raise PccError("T101", f"'{name}' has shape {value.shape}, expected {full}")
        return Array.of(_numbers(value, name, negative=self.context > 0))

    def _draw(self, shape: tuple[int, ...]) -> Values:
        if self.context:
            return np.asarray(self.rng.normal(size=shape) / np.sqrt(self.context))
        return self.rng.dirichlet(np.ones(shape[-1]), shape[:-1])

    def circuit(self, root: Op, sizes: tuple[int, int, int], kind: str) -> Circuit:
        """Return the finished circuit; every given sum must have been used."""
        n, r, vocab = sizes
        if self.given is not None and self.count != len(self.sums):
            what = f"'sums' holds {len(self.sums)} arrays, {kind} n={n} has {self.count} sum layers"
            raise PccError("T101", what)
        return Circuit(root, (vocab,) * n, f"{kind}-n{n}-r{r}", kind, r, tuple(self.logits))


def _array(value: Any, name: str) -> Values:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as e:
        raise PccError("T101", f"'{name}' holds no array: {e}") from None


def _numbers(value: Values, name: str, *, negative: bool) -> Values:
    if value.dtype.kind not in "fiu":
        raise PccError("T101", f"'{name}' holds {value.dtype} values, not numbers")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise PccError("T101", f"'{name}' holds NaN or infinite values")
    if not negative and (value < 0).any():
        raise PccError("T101", f"'{name}' holds negative probabilities")
    return value


def _sizes(n: int, r: int, vocab: int) -> tuple[int, int, int]:
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in (n, r, vocab)):
        what = f"n={n!r}, r={r!r}, vocab={vocab!r}: each must be an int from 1"
        raise PccError("T100", what)
    return n, r, vocab


def _product(xs: Sequence[Op]) -> Op:
    return xs[0] if len(xs) == 1 else c.Hadamard(tuple(xs))


def _folds(layer: Op, count: int) -> list[Op]:
    return [layer] if count == 1 else [c.Gather(layer, (f,)) for f in range(count)]


def ff(
    n: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = prod_i phi_i(x_i)."""
    sizes, p = _sizes(n, 1, vocab), Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(n, 1, vocab))
    return p.circuit(_product(_folds(leaf, n)), sizes, "ff")


fully_factorised = ff


def cp(
    n: int, r: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = sum_z w_z prod_i phi_{i,z}(x_i)."""
    sizes, p = _sizes(n, r, vocab), Parameters(context, seed, weights)
    leaf = c.Categorical(tuple(range(n)), p.table(n, r, vocab))
    return p.circuit(c.Sum(_product(_folds(leaf, n)), p.sum(1, 1, r)), sizes, "cp")


def hmm(
    n: int, r: int, vocab: int, *, context: int = 0, seed: int = 0, weights: Weights | None = None
) -> Circuit:
    """q(x) = sum_z pi(z_1) phi_1(x_1|z_1) prod_i A_i(z_i|z_{i-1}) phi_i(x_i|z_i).

    Sum layer k = 0 is the last transition, k = n - 1 the initial distribution, as published.
    """
    sizes, p = _sizes(n, r, vocab), Parameters(context, seed, weights)
    leaf = _folds(c.Categorical(tuple(range(n)), p.table(n, r, vocab)), n)
    state = leaf[-1]
    for x in reversed(leaf[:-1]):
        state = c.Hadamard((x, c.Sum(state, p.sum(1, r, r))))
    return p.circuit(c.Sum(state, p.sum(1, 1, r)), sizes, "hmm")


def btree(
    n: int,
    r: int,
    vocab: int,
    *,
    repetitions: int = 1,
    shuffle: int | None = None,
    context: int = 0,
    seed: int = 0,
    weights: Weights | None = None,
) -> Circuit:
    """Recursive halving: m_v[k] = sum_z W_v[k,z] m_L[z] m_R[z]; the root has one unit.

    `shuffle` is a seed: every repetition halves the variables in an order of its own. Repetitions
    have leaves of their own and are mixed at the root.
    """
    sizes = _sizes(n, r, vocab)
    if type(repetitions) is not int or repetitions < 1:
        raise PccError("T100", f"{repetitions!r} repetitions: there must be at least one")
    if shuffle is not None and (type(shuffle) is not int or shuffle < 0):
        raise PccError("T100", f"shuffle={shuffle!r} is no seed: an int from 0")
    seeds = range(repetitions) if shuffle is None else range(shuffle, shuffle + repetitions)
    trees = [balanced(n) if shuffle is None else shuffled(n, s) for s in seeds]
    return _forest([from_nested(x) for x in trees], sizes, "btree", (context, seed, weights))


def tree(
    region_tree: Nested | RegionGraph,
    r: int,
    vocab: int,
    *,
    context: int = 0,
    seed: int = 0,
    weights: Weights | None = None,
) -> Circuit:
    """One region tree, e.g. `((0, 1), (2, 3))` or what `pcc.frontends.regions` makes."""
    graph = region_tree if isinstance(region_tree, RegionGraph) else from_nested(region_tree)
    sizes = _sizes(graph.n, r, vocab)
    if not graph.is_tree:
        raise PccError(
            "T103",
            "the region graph is not a tree of single variables",
            hint="use templates.region_graph, which mixes partitions and shares regions",
        )
    return _forest([graph], sizes, "tree", (context, seed, weights))


def _forest(
    graphs: list[RegionGraph], sizes: tuple[int, int, int], kind: str, how: tuple[Any, ...]
) -> Circuit:
    """Trees of equal or unequal shape side by side: each level is one layer with F folds."""
    (n, r, vocab), s, p = sizes, len(graphs), Parameters(*how)
    leaf = c.Categorical(tuple(range(n)) * s, p.table(s * n, r, vocab))
    if n == 1:
        tops: list[Op] = [c.Sum(x, p.sum(1, 1, r)) for x in _folds(leaf, s)]
    else:
        tops = _levels(leaf, graphs, r, p)
    if s == 1:
        return p.circuit(tops[0], sizes, kind)
    return p.circuit(c.Mix(tuple(tops), p.sum(1, 1, s)), sizes, kind)


Node = tuple[int, int]  # (repetition, region)


def _levels(leaf: Op, graphs: list[RegionGraph], r: int, p: Parameters) -> list[Op]:
    """Build all levels bottom-up; return the roots, one fold and one unit each."""
    n = graphs[0].n
    place: dict[Node, tuple[int, int]] = {}  # region -> (layer, fold)
    for rep, g in enumerate(graphs):
        for i, scope in enumerate(g.scopes):
            if not g.partitions[i]:
                place[rep, i] = (0, rep * n + scope.bit_length() - 1)
    layers: list[Op] = [leaf]
    sizes = [n * len(graphs)]
    for level in _order(graphs):
        ins = [tuple((rep, q) for q in graphs[rep].partitions[i][0]) for rep, i in level]
        root = level[0][1] == len(graphs[level[0][0]].scopes) - 1
        columns = [
            _gather(layers, sizes, [place[x] for x in col]) for col in zip(*ins, strict=True)
        ]
        layers.append(c.Sum(_product(columns), p.sum(len(level), 1 if root else r, r)))
        sizes.append(len(level))
        place.update((x, (len(layers) - 1, f)) for f, x in enumerate(level))
    tops = [place[rep, len(g.scopes) - 1] for rep, g in enumerate(graphs)]
    return [_gather(layers, sizes, [x]) for x in tops]


def _order(graphs: list[RegionGraph]) -> list[list[Node]]:
    """Group the inner regions into layers, in the published order.

    Folds of a layer have the same height, arity and number of units. Within a layer they come in
    the order in which their last part appears: breadth-first leaves, then the level before.
    """
    parent: dict[Node, Node] = {}
    key: dict[Node, tuple[int, bool, int]] = {}
    queue = [(rep, len(g.scopes) - 1) for rep, g in enumerate(graphs)]
    for node in queue:  # grows while it is read: breadth first
        rep, i = node
        for parts in graphs[rep].partitions[i]:
            queue += [(rep, q) for q in parts]
            parent.update(((rep, q), node) for q in parts)
    for rep, g in enumerate(graphs):
        for i, height in enumerate(g.heights()):
            if height:
                key[rep, i] = (height, i == len(g.scopes) - 1, len(g.partitions[i][0]))
    leaves, arity = [x for x in queue if x not in key], {node: k[2] for node, k in key.items()}
    layers: dict[tuple[int, bool, int], list[Node]] = {}
    for level in levels(leaves, parent, arity):
        for node in level:
            layers.setdefault(key[node], []).append(node)
    # Roots of unequal height still wait for nothing above them, so they may come where they fall.
    return [layers[k] for k in sorted(layers)]


def _gather(layers: list[Op], sizes: list[int], pairs: list[tuple[int, int]]) -> Op:
    """Return the folds `(layer, fold)` as one layer."""
    used = list(dict.fromkeys(layer for layer, _ in pairs))
    start, total = {}, 0
    for i in used:
        start[i], total = total, total + sizes[i]
    index = tuple(start[i] + f for i, f in pairs)
    whole = layers[used[0]] if len(used) == 1 else c.Concat(tuple(layers[i] for i in used))
    return whole if index == tuple(range(total)) else c.Gather(whole, index)


def region_graph(
    graph: RegionGraph | Nested,
    r: int,
    vocab: int,
    *,
    context: int = 0,
    seed: int = 0,
    weights: Weights | None = None,
) -> Circuit:
    """Any region graph: m_v[k] = sum_h w_v[k,h] sum_z W_{v,h}[k,z] prod_{u in parts h} m_u[z].

    Partitions of a region are mixed; a region without partitions is a product of its variables.
    Layers have one fold each; sums come partition by partition, then the mixture, parts first.
    """
    g = graph if isinstance(graph, RegionGraph) else from_nested(graph)
    sizes, p = _sizes(g.n, r, vocab), Parameters(context, seed, weights)
    leaf = _folds(c.Categorical(tuple(range(g.n)), p.table(g.n, r, vocab)), g.n)
    made: list[Op] = []
    for i, (scope, ways) in enumerate(zip(g.scopes, g.partitions, strict=True)):
        ko = 1 if i == len(g.scopes) - 1 else r
        if not ways:
            x = _product([leaf[v] for v in variables_of(scope)])
            made.append(x if ko == r and i < len(g.scopes) - 1 else c.Sum(x, p.sum(1, ko, r)))
            continue
        sums = [c.Sum(_product([made[q] for q in parts]), p.sum(1, ko, r)) for parts in ways]
        made.append(sums[0] if len(sums) == 1 else c.Mix(tuple(sums), p.sum(1, ko, len(sums))))
    return p.circuit(made[-1], sizes, "region-graph")
