"""`draw-maps`: the same draws as one after another, by loops too; what it declines; on a plan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcc.circuit.circuit import Circuit
from pcc.conformance.models import head
from pcc.conformance.simulated import Simulated
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.generation import Request, build
from pcc.interp.run import run
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.models.proposal import Proposal, sampled
from pcc.passes import draw_maps
from pcc.passes import pieces as mk
from pcc.passes.draw_maps import DrawMaps, chains
from pcc.passes.manager import Manager, Notes
from pcc.passes.pipelines import storage_pipeline
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
D, V, ROWS = 5, 4, 60
LAST = 1 - 2.0**-24  # the largest uniform number
RNG = np.random.default_rng(3)


def trained(n: int, r: int) -> Circuit:
    """Return an HMM of tables with zeros: states nobody enters, rows of zeros, no sums of 1."""
    sums = [(RNG.random((1, r, r)) * (RNG.random((1, r, r)) < 0.5)).tolist() for _ in range(n - 1)]
    sums[0][0][0] = [0.0] * r
    first = RNG.dirichlet(np.ones(r))[None, None].tolist()
    emissions = RNG.random((n, r, V)) * (RNG.random((n, r, V)) < 0.7)
    emissions[:, :, 0] += 0.1
    emissions[0, :, V - 1] = 0.0  # an impossible carry
    return templates.hmm(n, r, V, weights={"emissions": emissions.tolist(), "sums": [*sums, first]})


CIRCUITS = {
    "contextual": lambda: templates.hmm(6, 3, V, context=D, seed=2),
    "wide": lambda: templates.hmm(4, 33, V, context=D, seed=4),
    "long": lambda: templates.hmm(21, 2, V, context=D, seed=5),
    "trained": lambda: trained(7, 3),
}


def drafts(circuit: Circuit, kind: str, *, truncation: bool = False) -> tuple[Proposal, Proposal]:
    one, two = (
        sampled(circuit, Manager(), kind, truncation=truncation, maps=m) for m in (False, True)
    )
    assert one.slots == two.slots
    return one, two


def feed_of(draft: Proposal, rows: int = ROWS) -> dict[str, Values]:
    """Return carries, impossible ones too, and uniforms with both ends of their range."""
    u = RNG.random((rows, len(draft.slots)))
    ends = RNG.random(u.shape) < 0.3
    u[ends] = RNG.choice([0.0, LAST], int(ends.sum()))
    return {
        "carry": RNG.integers(-1, V + 1, rows), "context": RNG.normal(size=(rows, D)) * 3, "u": u,
        "draft_temperature": RNG.choice([0.0, 0.6, 1.0], rows),
        "draft_top_p": RNG.choice([0.0, 0.5, 1.0], rows),
    }  # fmt: skip


def trajectories(module: Module) -> list[t.Trajectory]:
    return [n for n in module.nodes() if isinstance(n, t.Trajectory)]


# ---------------------------------------------------------------- the same draws


# Parameters that are not normalised are not truncated (M141).
CUT = [name for name in CIRCUITS if name != "trained"]
SETTINGS = [*((name, False) for name in CIRCUITS), *((name, True) for name in CUT)]


@pytest.mark.parametrize("kind", ["latent-first", "full"])
@pytest.mark.parametrize(("name", "truncation"), SETTINGS)
def test_draws_are_those_of_one_after_another(name: str, kind: str, truncation: bool) -> None:
    one, two = drafts(CIRCUITS[name](), kind, truncation=truncation)
    assert not trajectories(one.module)
    (path,) = trajectories(two.module)
    assert tensor(path).shape == (len([s for s in two.slots if s.role == "latent"]) - 1,)
    feed = feed_of(two)
    (x, q), (y, p) = (run(d.module.roots, feed, Real()) for d in (one, two))
    assert np.array_equal(x, y)
    np.testing.assert_allclose(p, q, atol=1e-12)
    assert len(np.unique(x[:, 1:], axis=0)) > 5


def cell(row: Values, u: float) -> int:
    """Return the inverse of a cumulated row of masses, by its definition."""
    total, below, found = float(sum(row)), 0.0, 0
    for j, mass in enumerate(row):
        below += float(mass)
        if mass > 0:
            found = j
            if below > u * total:
                break
    return found


def test_draws_are_those_of_loops() -> None:
    """z_1 given the carry, z_{i+1} from row z_i, x_i from the expert of z_i; nothing is shared."""
    n, r = 6, 4
    rng = np.random.default_rng(8)
    first, steps = rng.dirichlet(np.ones(r)), rng.dirichlet(np.ones(r), (n - 1, r))
    emissions = rng.dirichlet(np.ones(V), (n, r))
    sums = [*(s[None].tolist() for s in steps[::-1]), first[None, None].tolist()]
    circuit = templates.hmm(n, r, V, weights={"emissions": emissions.tolist(), "sums": sums})
    draft = sampled(circuit, Manager(), "latent-first", truncation=False, maps=True)
    assert trajectories(draft.module)
    feed = feed_of(draft, 200)
    feed["carry"] %= V
    x, q = run(draft.module.roots, feed, Real())
    latents = {s.layer: i for i, s in enumerate(draft.slots) if s.role == "latent"}
    tokens = {s.index: i for i, s in enumerate(draft.slots) if s.role == "token"}
    assert len(latents) == n - 1  # the last transition is a part of the last table
    experts = [*emissions[1 : n - 1], steps[n - 2] @ emissions[n - 1]]
    for row in range(200):
        u, carry = feed["u"][row], feed["carry"][row]
        z = [cell(first * emissions[0, :, carry], u[latents[0]])]
        for i in range(n - 2):
            z.append(cell(steps[i, z[i]], u[latents[i + 1]]))
        want = [experts[i][z[min(i + 1, n - 2)]] for i in range(n - 1)]
        np.testing.assert_allclose(q[row], want, atol=1e-6)
        assert x[row].tolist() == [cell(q[row, i - 1], u[tokens[i]]) for i in range(1, n)]


# ---------------------------------------------------------------- chains by hand


def draw(table: Op, before: Op, at: int, score: Op | None = None) -> Op:
    row: Op = t.SelectRow(table, before)
    if score is not None:
        row = t.Softmax(t.Add(t.Log(row), score))
    slots = range(at, at + tensor(row).shape[0])
    return t.InverseCdf(row, mk.take(t.Input("u", "f32", "b", (9,)), slots))


def table(k: int = 3, folds: int = 1) -> Op:
    return mk.const(RNG.dirichlet(np.ones(k), (folds, k)))


def start(k: int = 3) -> Op:
    return t.InverseCdf(mk.const(RNG.dirichlet(np.ones(k), 1)), mk.take(U, [0]))


U = t.Input("u", "f32", "b", (9,))
HAND = {"u": RNG.random((50, 9))}


def applied(*outputs: Op) -> Module:
    """Return the module after the pass, which gives the same numbers."""
    before = Module("m", (), tuple((f"y{i}", y) for i, y in enumerate(outputs)))
    after = Manager().run(before, (DrawMaps(),))
    for a, b in zip(*(run(m.roots, HAND, Real()) for m in (before, after)), strict=True):
        assert np.array_equal(a, b)
    return after


def chain(*scores: Op | None) -> list[Op]:
    out = [start()]
    for i, score in enumerate(scores):
        out.append(draw(table(), out[-1], i + 1, score))
    return out


def test_scores_that_differ_are_repeated_for_the_rows_of_their_tables() -> None:
    scores = [mk.const(RNG.normal(size=(1, 3))) for _ in range(4)]
    after = applied(*chain(*scores))
    (path,) = trajectories(after)
    draws = [n for n in after.nodes() if isinstance(n, t.InverseCdf)]
    assert sorted(tensor(n).shape for n in draws) == [(1,), (12,)]
    assert tensor(path).shape == (4,)


def test_draws_that_are_not_made_alike_are_maps_all_the_same() -> None:
    after = applied(*chain(None, mk.const(RNG.normal(size=(1, 3))), None, None))
    assert len(trajectories(after)) == 1
    draws = [tensor(n).shape for n in after.nodes() if isinstance(n, t.InverseCdf)]
    assert sorted(draws) == [(1,), (3,), (3,), (3,), (3,)]


def test_the_longest_path_of_a_tree_of_draws_is_a_chain() -> None:
    trunk = chain(None, None, None, None, None)
    side = [draw(table(), trunk[2], 6)]
    for i in (7, 8):
        side.append(draw(table(), side[-1], i))
    found = chains(Module("m", (), (("a", trunk[-1]), ("b", side[-1]))))
    assert [[x.draw for x in c] for c in found] == [trunk[1:], side]
    assert len(trajectories(applied(trunk[-1], side[-1]))) == 2  # the second begins in the first


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (chain(None, None), "a chain of 3 draws, fewer than 4"),
        ([draw(table(2, 2), t.Concat((start(2), start(2)), 0), 1)], ""),  # folds
        ([draw(mk.const(RNG.random((1, 3, 2))), start(), 1)], ""),  # other states
        ([draw(mk.const(RNG.random((1, 3, 3))), t.Input("s", "i64", "b", (1,)), 1)], ""),
    ],
)
def test_declines(outputs: list[Op], why: str) -> None:
    module, notes = Module("m", (), (("y", outputs[-1]),)), Notes()
    assert DrawMaps().run(module, notes).roots[0] is outputs[-1]
    assert any(why in line for line in notes.lines) is bool(why)


def test_a_draw_that_reads_two_draws_ends_a_chain() -> None:
    z = chain(None, None, None)
    odd = draw(table(), z[1], 4, t.Log(t.SelectRow(table(), z[0])))
    assert all(odd is not x.draw for c in chains(Module("m", (), (("y", odd),))) for x in c)
    twice = t.InverseCdf(
        t.Mul(t.SelectRow(table(), z[3]), t.SelectRow(table(), z[3])), mk.take(U, [5])
    )
    assert all(twice is not x.draw for c in chains(Module("m", (), (("y", twice),))) for x in c)


def test_large_tables_are_read_by_rows() -> None:
    notes, e = Notes(), t.Input("context", "f32", "b", (D,))
    z: Op = start()
    for i in range(4):
        w = t.Softmax(t.Contract(e, mk.const(RNG.normal(size=(1, 3, 3, D))), "d,abcd->abc"))
        z = draw(w, z, i + 1)
    module = Module("m", (), (("y", z),))
    assert DrawMaps(most=9 * D - 1).run(module, notes).roots[0] is z
    assert "a table of 45 trained numbers, more than 44" in "".join(notes.lines)
    assert trajectories(DrawMaps(most=9 * D).run(module, Notes()))
    assert trajectories(DrawMaps(most=1, whole=True).run(module, Notes()))


@pytest.mark.parametrize("kind", ["cp", "btree"])
def test_circuits_without_chains_are_as_they_were(kind: str) -> None:
    make = getattr(templates, kind)
    one, two = drafts(make(8, 3, V, context=D, seed=1), "latent-first")
    assert one.module.roots == two.module.roots


def test_repetitions_have_no_chain_but_draw_the_same() -> None:
    circuit = templates.btree(4, 2, V, repetitions=2, context=D, seed=1)
    one, two = drafts(circuit, "latent-first")
    assert one.module.roots == two.module.roots


# ---------------------------------------------------------------- faults, plans


@pytest.mark.parametrize("fault", ["uniforms", "order", "transposed"])
def test_wrong_maps_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = draw_maps._drawn

    def wrong(links: list[draw_maps.Link]) -> Op:
        made = true(links[::-1] if fault == "order" else links)
        assert isinstance(made, t.InverseCdf)
        count = tensor(made.u).shape[0]
        if fault == "uniforms":
            return t.InverseCdf(made.mass, mk.take(made.u, [0] * count))
        if fault == "transposed":
            k = tensor(made.mass).shape[1]
            cube = t.Reshape(made.mass, (count // k, k, k))
            return t.InverseCdf(t.Reshape(t.Transpose(cube, (0, 2, 1)), (count, k)), made.u)
        return made

    monkeypatch.setattr(draw_maps, "_drawn", wrong)
    with pytest.raises(PccError, match="E303"):
        sampled(CIRCUITS["contextual"](), Manager(), "latent-first", truncation=False, maps=True)


@pytest.mark.parametrize("static", [False, True])
def test_graphs_of_fixed_shapes_have_maps(static: bool, tmp_path: Path) -> None:
    _, folder = KINDS["llama"](tmp_path)
    request = Request(folder, max_seq=20, chunk=4, proposal="latent-first", static=static)
    made = build(request, head("hmm", 6, 3), Manager(validate=False), lambda _: None)
    for name in ("step", "prefill"):
        assert bool(trajectories(made.graphs[name].module)) is static


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["trained", "wide"])
def test_a_plan_draws_the_same(name: str) -> None:
    draft = sampled(CIRCUITS[name](), Manager(), "latent-first", truncation=False, maps=True)
    made = Simulated({"draft": draft.module}, 3)
    for _ in range(4):
        feed = {k: v for k, v in feed_of(draft, 3).items() if not k.startswith("draft")}
        feed = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in feed.items()}
        want = run(draft.module.roots, feed, Real())
        got = made.run("draft", **feed)
        np.testing.assert_allclose(got["q"], want[1], atol=2e-6)
        assert np.array_equal(got["x"], want[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_tables_of_maps_are_stored_in_half_as_they_were(dtype: str) -> None:
    circuit = CIRCUITS["contextual"]()
    (root,) = Manager().run(circuit.module(), storage_pipeline(dtype)).roots
    whole = Circuit(root, circuit.cards, circuit.name)
    draft = sampled(whole, Manager(), "latent-first", truncation=False, maps=True)
    assert trajectories(draft.module)
    stored = [n for n in draft.module.nodes() if isinstance(n, t.Const) and n.value.size >= 9 * D]
    assert {tensor(n).dtype for n in stored} == {dtype}
    made, feed = Simulated({"draft": draft.module}, ROWS), feed_of(draft)
    feed = {k: feed[k].astype(feed[k].dtype.str.replace("f8", "f4")) for k in ("carry", "u")}
    feed["context"] = RNG.normal(size=(ROWS, D)).astype(np.float32)
    want, got = run(draft.module.roots, feed, Real()), made.run("draft", **feed)
    same = (got["x"] == want[0]).all(axis=1)
    assert same.mean() > 0.9  # a sum that lies between two halves may move a draw
    np.testing.assert_allclose(got["q"][same], want[1][same], atol=5e-3)


def test_neighbours_of_one_value_join() -> None:
    x = t.Input("x", "f32", "b", (4, 2))
    parts = (t.Take(x, 0, (1,)), t.Take(x, 0, (2, 3)), x)
    joined = mk.joined(parts)
    assert isinstance(joined, t.Take)
    assert (joined.x, joined.indices) == (x, (1, 2, 3, 0, 1, 2, 3))
    assert mk.joined([t.Take(x, 0, (0, 1)), t.Take(x, 0, (2, 3))]) is x
    columns = (t.Take(x, 1, (1, 0)), t.Take(x, 1, (0, 0)))
    assert mk.joined(columns) is t.Concat(columns, 0)
    other = t.Const(Array.of(np.zeros((1, 2))))
    both = mk.joined([parts[0], other, parts[0]])
    assert isinstance(both, t.Concat)
    assert both.xs == (parts[0], other, parts[0])
