"""Ties of draws: a uniform beside the edge of its cell, and nothing else, explains another draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import eq
from typing import Any

import engines
import numpy as np
import pytest

import pcc
from pcc import check_generation, knobs
from pcc.check import Check
from pcc.check_generation import HALVINGS
from pcc.interp.run import run
from pcc.ir.semiring import Semiring
from pcc.stored import Stages
from pcc.ties import UNIT, Shift, explained, shifts

BOUND = 1e-3

# ---------------------------------------------------------------- the search


def draw(edges: list[float], u: float) -> int:
    return sum(e <= u for e in edges)


def found(edges: list[float], u: float, other: int, **how: Any) -> Any:
    """Search for a shift of u with which another cell is drawn."""

    def again(s: Shift) -> int:
        assert (s.row, s.length, s.slot) == (0, 7, 0)
        assert abs(s.by) <= BOUND
        return draw(edges, u + s.by)

    far = shifts(0, [7], [0], BOUND)
    return explained(far, draw(edges, u), again, partial(eq, other), eq, **how)


def test_every_cell_within_the_bound_is_found_and_none_beyond() -> None:
    """Cells of a hundredth to some times the bound, next to each other."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        sizes = 10 ** rng.uniform(-5.2, -2.5, 60)
        edges = list(0.3 + np.cumsum(sizes))
        u = float(rng.uniform(edges[0], edges[-1]))
        own = draw(edges, u)
        reached = {draw(edges, u - BOUND), draw(edges, u + BOUND)}
        for other in range(len(edges) + 1):
            if other == own:
                continue
            search = found(edges, u, other)
            inside = bool(min(reached) <= other <= max(reached))
            assert (search.shift is not None) is inside
            if search.shift is not None:
                assert draw(edges, u + search.shift.by) == search.answer == other


def test_a_draw_that_goes_there_and_back_is_found_by_halving() -> None:
    """What shows of a latent may be the same in the cells on both sides of another."""
    shown = [0, 5, 0]
    edges, u = [0.5 + 1e-4, 0.5 + 4e-4], 0.5
    far = shifts(0, [0], [0], BOUND)

    def again(s: Shift) -> int:
        return shown[draw(edges, u + s.by)]

    ask = partial(explained, far, 0, again, partial(eq, 5), eq)
    assert ask().shift is None
    search = ask(halvings=HALVINGS)
    assert search.answer == 5
    assert 1e-4 <= search.shift.by < 4e-4


def test_tries_are_limited_and_counted() -> None:
    edges = [0.5 + k * 1e-5 for k in range(1, 50)]
    assert found(edges, 0.5, 999, most=3).tried == 3
    assert not found(edges, 0.5, 999, most=3).whole
    whole = found(edges, 0.5, 999)
    assert whole.whole
    assert whole.shift is None
    assert whole.tried > 2 * 49


def test_shifts_stay_in_the_range_of_uniforms_and_in_their_row() -> None:
    u = np.array([[0.5, 1 - UNIT], [0.5, 0.5]], np.float32)
    Shift(0, 0, 1, 0.1).move(u)
    Shift(1, 0, 0, -0.9).move(u)
    Shift(2, 0, 0, 0.1).move(u)
    Shift(0, 0, 2, 0.1).move(u)
    assert u.tolist() == [[0.5, np.float32(1 - UNIT)], [0.0, 0.5]]
    assert [(s.length, s.slot, s.by) for s in shifts(0, [3, 4], [1], 0.5)] == [
        (3, 1, 0.5), (3, 1, -0.5), (4, 1, 0.5), (4, 1, -0.5),
    ]  # fmt: skip


# ---------------------------------------------------------------- `pcc verify`


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ties")
    engines.llama_folder(folder / "model")
    made = pcc.compile(
        engines.head("hmm", 4, 6), verifier=folder / "model", out=folder / "m.pcc", chunk=8,
        queries=["draft"], max_seq=64, validate=False, proposal="latent-first",
    )  # fmt: skip
    return pcc.load(made.path, threads=1)


def on_an_edge(engine: Any, inputs: dict[str, Any], slot: int) -> float | None:
    """Return a uniform of a slot on an edge of its cell.

    By the evaluator's own draws on a grid, then by bisection.
    """
    module = Stages(engine.path, engine.manifest["files"]).module("tensor-step")
    names = [name for name, _ in module.outputs]

    def drawn(u: float) -> tuple[Any, ...]:
        given = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in inputs.items()}
        given["u"] = given["u"].copy()
        given["u"][0, slot] = u
        values = dict(zip(names, run(module.roots, given, Semiring()), strict=True))
        return tuple(np.asarray(values[k]).tobytes() for k in SHOWN)

    grid = np.linspace(0.02, 0.98, 25)
    shown = [drawn(u) for u in grid]
    for low, high, a, b in zip(grid, grid[1:], shown, shown[1:], strict=False):
        if a == b:
            continue
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if drawn(middle) == a else (low, middle)
        if drawn(high + 2e-5) == drawn(high + 1e-6) != a == drawn(low - 2e-5):
            return float(low)
    return None


ACCEPT = 0  # a draft that is as likely to stay as not, in the round that is verified
SHOWN = ("emitted", "next_window", "next_draft_q")
Bend = Callable[[dict[str, Any]], None]


def verified(
    engine: Any, monkeypatch: Any, slots: tuple[int, ...], by: float, bend: Bend | None = None
) -> list[Check]:
    """Verify an engine whose step reads uniforms, each on an edge, moved by `by`."""
    real, made = check_generation._inputs, type(engine.runner).answer

    def inputs(e: Any, query: str, *args: Any) -> dict[str, Any]:
        given = real(e, query, *args)
        if query == "step":
            trial = {**given, "u": given["u"].copy()}
            for slot in slots:
                edge = on_an_edge(engine, trial, slot)
                assert edge is not None, "no edge of this uniform shows"
                given["u"][0, slot] = edge - by / 3
                trial["u"][0, slot] = edge + by * 2 / 3  # what the next draw follows from
        return given

    def answer(runner: Any, query: str, feed: Any, rows: int) -> Any:
        if query == "step":
            feed = {**feed, "u": feed["u"].copy()}
            feed["u"][0, list(slots)] += by
        found = made(runner, query, feed, rows)
        if query == "step" and bend is not None:
            bend(
                dict(zip((o["name"] for o in runner.queries[query]["outputs"]), found, strict=True))
            )
        return found

    with monkeypatch.context() as m:
        m.setattr(check_generation, "_inputs", inputs)
        m.setattr(type(engine.runner), "answer", answer)
        rng = np.random.default_rng(5)
        module = Stages(engine.path, engine.manifest["files"]).module("tensor-step")
        prompt = check_generation._prompt(engine, rng)
        return [Check(*f) for f in check_generation._graph(engine, "step", module, prompt, rng)]


def slots(engine: Any) -> dict[str, int]:
    roles = [role for role, _ in engine.generation()["random"]["step"]]
    return {"accept": ACCEPT, "carry": roles.index("carry"), "latent": roles.index("latent"),
            "token": len(roles) - 1}  # fmt: skip


@pytest.mark.parametrize("role", ["accept", "carry", "latent", "token"])
def test_a_draw_beside_an_edge_is_a_named_tie(role: str, engine: Any, monkeypatch: Any) -> None:
    """The engine draws what lies on the other side: the rest is compared as it follows."""
    slot = slots(engine)[role]
    checks = verified(engine, monkeypatch, (slot,), knobs.CHANCE_TIES["f32"] / 2)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
    ties = [c.what for c in checks if "at a tie" in c.what]
    assert ties
    assert all(f"moved: {slot} by " in what for what in ties)
    assert set(SHOWN) <= {c.what.split()[0] for c in checks}


def test_two_draws_beside_edges_are_two_named_ties(engine: Any, monkeypatch: Any) -> None:
    """The second law is that of what was drawn first."""
    known = slots(engine)
    both = (known["carry"], known["token"])
    checks = verified(engine, monkeypatch, both, knobs.CHANCE_TIES["f32"] / 2)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
    ties = [c.what for c in checks if "at a tie" in c.what]
    assert ties
    assert all(f"moved: {both[0]} by " in x and f", {both[1]} by " in x for x in ties)


@pytest.mark.parametrize("role", ["carry", "token"])
def test_a_draw_from_further_away_is_a_difference(role: str, engine: Any, monkeypatch: Any) -> None:
    checks = verified(engine, monkeypatch, (slots(engine)[role],), 6 * knobs.CHANCE_TIES["f32"])
    assert not all(c.ok for c in checks)
    assert not [c for c in checks if "at a tie" in c.what]


def test_a_fault_beside_a_tie_is_a_difference(engine: Any, monkeypatch: Any) -> None:
    """The draw is explained, the law that it came from is not."""

    def bend(outputs: dict[str, Any]) -> None:
        outputs["next_draft_q"][0, -1, :2] += (0.01, -0.01)

    by = knobs.CHANCE_TIES["f32"] / 2
    checks = verified(engine, monkeypatch, (slots(engine)["token"],), by, bend)
    wrong = {c.what.split()[0] for c in checks if not c.ok}
    assert "next_draft_q" in wrong
    assert not [c for c in checks if "at a tie" in c.what]
