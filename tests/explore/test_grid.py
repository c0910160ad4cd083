"""Fronts, grids, intervals, prompts and configurations: no engine is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcc.errors import PccError
from pcc.explore import best, build, front, intervals, prompts
from pcc.explore.config import Grid, Prompts
from pcc.explore.heads import Head
from pcc.explore.points import Missing, missing, points_of, trainable
from pcc.explore.scatter import ticks
from pcc.explore.training import configuration

PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12)


@given(PAIRS)
def test_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def beaten(i: int) -> bool:
        (a, b) = points[i]
        return any(
            c <= a and d >= b and ((c, d) != (a, b) or j < i) for j, (c, d) in enumerate(points)
            if j != i
        )  # fmt: skip

    want = {i for i in range(len(points)) if not beaten(i)}
    got = front(points)
    assert set(got) == want
    assert len(got) == len(want)
    assert [points[i] for i in got] == sorted(points[i] for i in got)


@given(PAIRS, st.integers(0, 7))
def test_best_is_the_highest_rate_within_the_limit(
    points: list[tuple[int, int]], limit: int
) -> None:
    got = best(points, lambda p: p[1] / p[0], lambda p: p[0], limit)
    allowed = [p for p in points if limit == 0 or p[0] <= limit]
    assert (got is None) == (not allowed)
    if got is not None:
        assert got in allowed
        assert all(got[1] / got[0] >= p[1] / p[0] for p in allowed)


def test_the_best_without_a_limit_is_on_the_front() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in rng.integers(1, 9, (8, 2))]
        top = max(b / a for a, b in points)
        assert any(points[i][1] / points[i][0] == top for i in front(points))


def head(a: str, n: int, r: int, layers: int = 0, name: str = "h") -> Head:
    return Head(name, Path("x"), a, n, r, layers, "d")


def test_points_of_a_head() -> None:
    grid = Grid(n=(2, 4, 8), r=(2,), proposal=("full", "latent-first"),
                draft_mode=("max-product", "latent-first"))  # fmt: skip
    got = points_of(head("cp", 4, 2), grid)
    want = set(product((2, 4), ("full", "latent-first"), ("max-product", "latent-first")))
    assert {(p.n, p.proposal, p.draft_mode) for p in got} == want
    assert len({p.name for p in got}) == len(got) == len(want)
    assert not points_of(head("cp", 4, 3), grid)
    # A factorised head has one component and no latents.
    assert [p.n for p in points_of(head("ff", 8, 1), grid)] == [2, 4, 8]
    assert [p.n for p in points_of(head("custom", 3, 0), Grid(r=(5,)))] == [3]
    assert not points_of(head("cp", 4, 2, 1), Grid(lora_layers=(0,)))
    assert points_of(head("cp", 4, 2, 1), Grid())


def test_integers_of_a_head_are_an_axis_but_for_latent_first() -> None:
    """Chosen rows cannot be read of integers, whether sampled drafts or greedy ones choose them."""
    grid = Grid(proposal=("full", "latent-first"), draft_mode=("stepwise", "latent-first"),
                int8=("none", "head"))  # fmt: skip
    got = points_of(head("cp", 4, 2), grid)
    plain = set(product(("full", "latent-first"), ("stepwise", "latent-first"), ("none",)))
    want = plain | {("full", "stepwise", "head")}
    assert {(p.proposal, p.draft_mode, p.int8) for p in got} == want
    assert len({p.name for p in got}) == len(got) == len(want)
    assert [p.int8 for p in points_of(head("ff", 8, 1), grid)] == ["none", "head"]


@pytest.mark.parametrize("axis", [["verifier"], ["all"], [], ["head", "head"], "head"])
def test_only_the_heads_integers_can_be_explored(axis: object) -> None:
    raw = {"verifier": "v", "heads": ["h"], "prompts": {"path": "p"}, "grid": {"int8": axis}}
    with pytest.raises(PccError, match=r"N101|G101"):
        build(raw)


def test_missing_heads_and_what_is_trained_for_them() -> None:
    grid = Grid(architecture=("ff", "cp", "btree"), n=(3, 6), r=(2, 4), lora_layers=(0, 1))
    every = missing(grid, [])
    assert len(every) == len(set(every)) == 2 * 2 * (1 + 2 + 2)
    have = [head("ff", 6, 1), head("cp", 4, 2), head("btree", 8, 4, 1)]
    lacking = set(missing(grid, have))
    gone = set(every) - lacking
    assert gone == {
        Missing("ff", 3, 1, 0), Missing("ff", 6, 1, 0), Missing("cp", 3, 2, 0),
        Missing("btree", 3, 4, 1), Missing("btree", 6, 4, 1),
    }  # fmt: skip
    cells = [Missing("cp", 3, 2, 0), Missing("cp", 6, 2, 0), Missing("btree", 3, 2, 0),
             Missing("btree", 6, 2, 0), Missing("cp", 3, 4, 0)]  # fmt: skip
    assert trainable(cells, each_n=False) == {
        Missing("cp", 6, 2, 0): [3, 6], Missing("btree", 8, 2, 0): [3, 6],
        Missing("cp", 3, 4, 0): [3],
    }  # fmt: skip
    assert trainable(cells, each_n=True) == {
        Missing("cp", 3, 2, 0): [3], Missing("cp", 6, 2, 0): [6], Missing("btree", 4, 2, 0): [3],
        Missing("btree", 8, 2, 0): [6], Missing("cp", 3, 4, 0): [3],
    }  # fmt: skip


def test_intervals_cover_the_truth_and_shrink() -> None:
    """Emitted bytes of prompts differ more between prompts than within: 95 % must still hold."""
    rng, hits = np.random.default_rng(1), 0
    for k in range(200):
        rounds = rng.integers(5, 15, 40)
        rate = rng.normal(3, 0.5, 40)
        got = intervals.ratio(list(rate * rounds), list(rounds), seed=k)
        assert got["low"] is not None
        assert got["high"] is not None
        assert got["low"] <= got["value"] <= got["high"]
        hits += got["low"] <= 3 <= got["high"]
    assert 180 <= hits <= 199
    one = intervals.ratio([6.0], [2.0])
    assert one == {"value": 3.0, "low": None, "high": None}
    same = intervals.median([2.0] * 5)
    assert same == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert intervals.median([1.0, 2.0, 900.0])["value"] == 2.0


def test_prompts_are_spread_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"".join(b"%03d-line\n\n" % i for i in range(10)))
    got = prompts.read(Prompts(str(file), limit=5, bytes=3))
    assert got == [b"000", b"002", b"004", b"006", b"008"]
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}").write_bytes(b"%d\nmore" % i)
    (folder / "empty").touch()
    (folder / "link").symlink_to(file)
    assert prompts.read(Prompts(str(folder), bytes=4)) == [b"0\nmo", b"1\nmo", b"2\nmo"]
    assert prompts.digest([b"ab", b"c"]) != prompts.digest([b"a", b"bc"])
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: reading would never end
    for bad in (folder / "empty", tmp_path / "none", tmp_path / "pipe"):
        with pytest.raises(PccError, match="G106"):
            prompts.read(Prompts(str(bad)))


@given(st.floats(1e-6, 1e6))
def test_ticks_are_few_and_reach_the_largest(most: float) -> None:
    t = ticks(most)
    assert t[0] == 0
    assert most <= t[-1] * (1 + 1e-6)
    assert 2 <= len(t) <= 8


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("N101", {"grid": {"depth": [1]}}),
        ("N101", {"grid": {"architecture": ["tree"]}}),
        ("N101", {"measure": {"tokens": "many"}}),
        ("G101", {"measure": {"tokens": 1}}),
        ("G101", {"grid": {"n": [1]}}),
        ("G101", {"grid": {"n": [4, 4]}}),
        ("G101", {"grid": {"proposal": []}}),
        ("G101", {"grid": {"draft_mode": ["best"]}}),
        ("G101", {"target": {"max_ms_per_round": -1}}),
        ("G101", {"target": {"mode": "sampled"}, "measure": {"sampled": False}}),
        ("G101", {"train": {"folder": "t"}}),
        ("G102", {"heads": []}),
    ],
)
def test_configurations_that_are_refused(
    setting: Callable[..., dict[str, Any]], tmp_path: Path, code: str, more: dict[str, Any]
) -> None:
    with pytest.raises(PccError) as caught:
        build(setting(tmp_path, **more))
    assert caught.value.code == code


def test_region_graphs_train_beside_kinds_without_regions() -> None:
    made = build(
        {
            "verifier": "v", "prompts": {"path": "p"}, "out": "o", "heads": [],
            "grid": {"architecture": ["cp", "btree", "region-graph"], "n": [4], "r": [2]},
            "train": {
                "folder": "t", "data": {"packed": "d"},
                "head": {"regions": "[[0,2],[1,3]]", "repetitions": 2, "shuffle": True},
            },
        }
    )  # fmt: skip
    heads = [configuration(made, cell).head for cell in missing(made.grid, [])]
    found = {h.kind: (h.regions, h.repetitions, h.shuffle) for h in heads}
    assert found == {
        "cp": ("", 1, False),
        "btree": ("", 2, True),
        "region-graph": ("[[0,2],[1,3]]", 1, False),
    }
