"""The law of what a compiled graph emits, by driving its uniforms into every cell.

Every random slot of a graph splits [0, 1) into cells, one for each decision. A draw's cells are the
shares of the masses that the graph itself puts out, a test's cells are [0, p/q) and [p/q, 1) with p
and q from its `margin` at two uniforms. A uniform is placed inside each cell, and just inside both
of its ends: the graph must decide there what the cell says. The weight of an outcome is the product
of its cells' lengths. Nothing here knows how a round is decided, only where the graph says that its
decisions change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from pcc.backends.onnx.lower import lower
from pcc.interp.run import run
from pcc.ir.semiring import Real
from pcc.models.step import StepGraph
from pcc.tensor import ops as t

INSIDE = 2e-6  # how far from a cell's end it is probed
SLIVER = 3e-7  # shorter cells hold a few multiples of 2^-24 only: dropped, part of the error
LEAST = 1e-13  # lighter outcomes are dropped; what was dropped is part of the error
BATCH = 1 << 16
Values = np.ndarray


@dataclass
class Draw:
    """A draw of the graph: which slots it reads, and its number among the further outputs."""

    slots: list[int]
    number: int


class Probe:
    """A compiled graph that also puts out the masses and choices of its draws."""

    def __init__(self, graph: StepGraph, opset: int = 24) -> None:
        draws = [n for n in graph.module.nodes() if isinstance(n, t.InverseCdf)]
        outs = list(graph.module.outputs)
        for i, n in enumerate(draws):
            outs += [(f"mass.{i}", n.mass), (f"choice.{i}", n)]
        module = replace(graph.module, outputs=tuple(outs))
        model = lower(module, opset=opset, inputs=graph.inputs, symbols=graph.symbols)
        self.session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.names = [o.name for o in self.session.get_outputs()]
        self.inputs = graph.inputs
        self.slots = graph.slots
        self.tests = [i for i, s in enumerate(graph.slots) if s.role == "accept"]
        index = np.arange(len(graph.slots), dtype=np.float64)[None]
        self.draws = []
        for i, n in enumerate(draws):
            (where,) = run((n.u,), {"u": index}, Real())
            self.draws.append(Draw(where.reshape(-1).astype(int).tolist(), i))
        self.draws.sort(key=lambda d: min(d.slots))
        read = {s for d in self.draws for s in d.slots} | set(self.tests)
        assert read == set(range(len(graph.slots))), "every slot is read"
        assert self.tests == list(range(len(self.tests))), "tests come first"
        self.calls = self.rows = 0

    def __call__(self, feed: dict[str, Values], u: Values) -> dict[str, Values]:
        """Run all rows."""
        total = len(u)
        self.calls, self.rows = self.calls + 1, self.rows + total
        parts: list[list[Values]] = []
        for at in range(0, total, BATCH):
            piece = {k: v[at : at + BATCH] for k, v in feed.items()}
            given = {i.key: piece[i.key] for i in self.inputs if i.key != "u"}
            count = len(next(iter(given.values())))
            found = self.session.run(None, {**given, "u": u[at : at + BATCH].astype(np.float32)})
            parts.append(
                [
                    np.broadcast_to(v, (count, *v.shape)) if self._shared(name, v, count) else v
                    for name, v in zip(self.names, found, strict=True)
                ]
            )
        columns = zip(*parts, strict=True)
        return dict(zip(self.names, map(np.concatenate, columns), strict=True))

    def _shared(self, name: str, v: Values, count: int) -> bool:
        """Whether an output has no batch axis (a mass of trained numbers)."""
        rank = {"mass": 3, "choice": 2}.get(name.split(".")[0])
        return rank is not None and v.ndim < rank


@dataclass
class Rows:
    """Outcomes so far: inputs, uniforms, weights, and where each row comes from."""

    feed: dict[str, Values]
    u: Values
    weight: Values
    origin: Values

    def __getitem__(self, index: Values) -> Rows:
        feed = {k: v[index] for k, v in self.feed.items()}
        return Rows(feed, self.u[index], self.weight[index], self.origin[index])


def outcomes(
    probe: Probe, feed: dict[str, Values], weight: Values, ended: object = None
) -> Iterator[tuple[Rows, dict[str, Values]]]:
    """Yield rows with every decision made, and the graph's outputs for them.

    `ended(rows, outputs)` flags rows whose later draws do not matter once the carry is drawn; they
    are yielded first.
    """
    count = len(weight)
    u = np.full((count, len(probe.slots)), 0.5)
    rows = Rows(feed, u, weight.astype(np.float64), np.arange(count))
    if probe.tests:
        rows = _tests(probe, rows)
    for i, draw in enumerate(probe.draws):
        rows = _draw(probe, rows, draw)
        if i == 0 and ended is not None:
            out = probe(rows.feed, rows.u)
            over = ended(rows, out)
            if over.any():
                yield rows[over], {k: v[over] for k, v in out.items()}
            rows = rows[~over]
            if not len(rows.weight):
                return
    yield rows, probe(rows.feed, rows.u)


def _tests(probe: Probe, rows: Rows) -> Rows:
    """Split rows by the number of drafts that stay."""
    tests = probe.tests
    low, half = rows.u.copy(), rows.u.copy()
    low[:, tests] = 0.0
    p = probe(rows.feed, low)["margin"][:, : len(tests)].astype(np.float64)
    q = 2 * (p - probe(rows.feed, half)["margin"][:, : len(tests)].astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        cut = np.where(p >= q, 1.0, np.where(p <= 0, 0.0, p / q))
    made, expected, edges = [], [], []
    for stay in range(len(tests) + 1):
        part = rows[np.arange(len(rows.weight))]
        part.u[:, tests[:stay]] = cut[:, :stay] / 2
        part.weight = part.weight * cut[:, :stay].prod(axis=1)
        if stay < len(tests):
            part.u[:, tests[stay]] = (1 + cut[:, stay]) / 2
            part.weight = part.weight * (1 - cut[:, stay])
            reached = (cut[:, :stay] > 0).all(axis=1)
            _ends(part, cut[:, stay], reached, tests[stay], edges)
        keep = np.flatnonzero(part.weight > LEAST)
        made.append(part[keep])
        expected.append(np.full(len(keep), stay + 1))
    out = _join(made)
    got = probe(out.feed, out.u)["n_emit"]
    assert np.array_equal(got, np.concatenate(expected)), "a test decides otherwise in its cell"
    for side, least, most in edges:
        if len(side.weight):
            got = probe(side.feed, side.u)["n_emit"]
            assert ((got >= least) & (got <= most)).all(), "a test's threshold is elsewhere"
    return out


def _ends(part: Rows, cut: Values, reached: Values, slot: int, edges: list) -> None:
    """Probe a test at both ends of both cells, where the drafts before it stay."""
    stay, n = slot, part.feed["window"].shape[1]
    for where, at, accept in (
        (cut > 2 * INSIDE, cut * (1 - 1e-6) - 1e-7, True),
        (cut > 2 * INSIDE, np.zeros_like(cut), True),
        (cut < 1 - 2 * INSIDE, cut * (1 + 1e-6) + 1e-7, False),
        (cut < 1 - 2 * INSIDE, np.full_like(cut, 1 - 2.0**-24), False),
        (cut == 0, np.zeros_like(cut), False),
        (cut == 1, np.full_like(cut, 1 - 2.0**-24), True),
    ):
        side = part[np.flatnonzero(where & reached)]
        side.u[:, slot] = at[where & reached]
        edges.append((side, stay + 2, n) if accept else (side, stay + 1, stay + 1))


def _draw(probe: Probe, rows: Rows, draw: Draw) -> Rows:
    """Split rows by the choices of every fold of a draw; folds that share a slot split it twice."""
    mass = probe(rows.feed, rows.u)[f"mass.{draw.number}"].astype(np.float64)
    share = mass / np.maximum(mass.sum(axis=-1, keepdims=True), 1e-300)
    ends = np.minimum(np.cumsum(share, axis=-1), 1.0)
    source = np.arange(len(rows.weight))
    at = {"low": rows.u.copy(), "high": rows.u.copy()}
    for slot in dict.fromkeys(draw.slots):
        folds = [f for f, s in enumerate(draw.slots) if s == slot]
        stops = np.sort(ends[source][:, folds].reshape(len(source), -1), axis=1)
        cells = np.diff(stops, axis=1, prepend=0.0)
        row, which = np.nonzero((cells > SLIVER) & (rows.weight[:, None] * cells > LEAST))
        cell, stop = cells[row, which], stops[row, which]
        near = np.minimum(INSIDE, cell / 4)
        rows, source = rows[row], source[row]
        at = {k: v[row] for k, v in at.items()}
        rows.u[:, slot] = stop - cell / 2
        at["low"][:, slot] = stop - cell + near
        at["high"][:, slot] = np.minimum(stop - near, 1 - 2.0**-24)
        rows.weight = rows.weight * cell
    middle = rows.u[:, draw.slots][..., None]
    want = (ends[source] <= middle).sum(axis=-1)
    for u in (rows.u, at["low"], at["high"]):
        got = probe(rows.feed, u)[f"choice.{draw.number}"]
        assert np.array_equal(got, want), "a draw's cell ends elsewhere"
    return rows


def _join(parts: list[Rows]) -> Rows:
    feed = {k: np.concatenate([p.feed[k] for p in parts]) for k in parts[0].feed}
    return Rows(
        feed,
        np.concatenate([p.u for p in parts]),
        np.concatenate([p.weight for p in parts]),
        np.concatenate([p.origin for p in parts]),
    )


# ---------------------------------------------------------------- several rounds


@dataclass
class Case:
    """One run to enumerate: a prompt and the settings of its row."""

    prompt: list[int]
    settings: dict[str, float]


class Language:
    """The law of the first `m` tokens that prefill and steps emit, for each case."""

    def __init__(self, prefill: Probe, step: Probe, m: int) -> None:
        self.prefill, self.step, self.m = prefill, step, m
        self.rounds = 0

    def law(self, cases: list[Case]) -> list[dict[tuple[int, ...], float]]:
        """Enumerate all cases together."""
        laws: list[dict[tuple[int, ...], float]] = [defaultdict(float) for _ in cases]
        state: dict[object, list] = {}
        for rows, out in outcomes(self.prefill, self._first(cases), np.ones(len(cases))):
            said = [
                (int(o), (int(e),)) for o, e in zip(rows.origin, out["emitted"][:, 0], strict=True)
            ]
            self._collect(rows, out, said, state, laws)
        while state:
            self.rounds += 1
            entries = list(state.values())
            feed = {k: np.stack([e[2][k] for e in entries]) for k in entries[0][2]}
            names = [(e[0], e[1]) for e in entries]
            weight = np.array([e[3] for e in entries])
            state = {}

            def ended(rows: Rows, out: dict[str, Values], names: list = names) -> Values:
                before = np.array([len(names[o][1]) for o in rows.origin])
                return before + out["n_emit"] >= self.m

            for rows, out in outcomes(self.step, feed, weight, ended):
                said = [
                    (names[o][0], names[o][1] + tuple(int(x) for x in e[:k]))
                    for o, e, k in zip(rows.origin, out["emitted"], out["n_emit"], strict=True)
                ]
                self._collect(rows, out, said, state, laws)
        return laws

    def _first(self, cases: list[Case]) -> dict[str, Values]:
        chunk = next(i.shape[0] for i in self.prefill.inputs if i.key == "input_ids")
        feed: dict[str, Values] = {}
        for i in self.prefill.inputs:
            kind = {"f32": np.float32, "i64": np.int64}[i.dtype]
            if i.key.startswith("past.") or i.key == "length":
                feed[i.key] = np.zeros((len(cases), *i.shape), kind)
            elif i.key in cases[0].settings:
                feed[i.key] = np.array([c.settings[i.key] for c in cases], kind)
        padded = [c.prompt + [0] * (chunk - len(c.prompt)) for c in cases]
        feed["input_ids"] = np.array(padded)
        feed["valid"] = np.array([len(c.prompt) for c in cases])
        return feed

    def _collect(
        self, rows: Rows, out: dict[str, Values], said: list, state: dict, laws: list
    ) -> None:
        """Add up finished rows; merge unfinished ones that are in the same state."""
        after: dict[str, Values] = {}
        for i in self.step.inputs:
            if i.key.startswith("past."):
                after[i.key] = out["present." + i.key.removeprefix("past.")]
            elif i.key == "active":
                after[i.key] = np.ones(len(rows.weight), bool)
            elif i.key in ("window", "draft_q", "length"):
                after[i.key] = out["next_" + i.key]
            elif i.key != "u":
                after[i.key] = rows.feed[i.key]
        floats = np.concatenate(
            [v.reshape(len(v), -1) for v in after.values() if v.dtype.kind == "f"], axis=1
        ).round(4)
        for j, (case, tokens) in enumerate(said):
            if len(tokens) >= self.m:
                laws[case][tokens[: self.m]] += rows.weight[j]
                continue
            key = (case, tokens, after["window"][j].tobytes(), (floats[j] + 0.0).tobytes())
            if key in state:
                state[key][3] += rows.weight[j]
            else:
                state[key] = [case, tokens, {k: v[j] for k, v in after.items()}, rows.weight[j]]


def variation(law: dict[tuple[int, ...], float], want: dict[tuple[int, ...], float]) -> float:
    """Total variation, what was dropped included."""
    every = set(law) | set(want)
    return 0.5 * sum(abs(law.get(x, 0.0) - want.get(x, 0.0)) for x in every)
