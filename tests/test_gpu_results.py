"""The committed GPU results: rows agree with themselves and each other, pages with the rows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: pcc may be an installed one

from benchmarks.gpu import merge
from pcc.runtime.bound import bound_ms, complete, rates, with_yardstick

ROWS: list[dict[str, Any]] = json.loads(merge.ROWS.read_text())
ROUNDS = merge.newest(merge.rounds(ROWS))
DIGITS = 2e-5  # rows have six
TORCH = "torch-cuda-graph"


def named(r: dict[str, Any]) -> str:
    return f"{r['name']} {r['gpu']}"


@pytest.mark.parametrize("row", ROWS, ids=map(named, ROWS))
def test_a_row_follows_from_its_bytes_and_times(row: dict[str, Any]) -> None:
    assert not complete(row)
    assert row["p10"] <= row["round_ms"] <= row["p90"]
    assert row["repeats"] >= 20
    assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"])
    assert row["versions"]
    assert min(row["bytes_moved"].values()) >= 0
    bound = bound_ms(row["bytes_moved"], row["bandwidth_tb_s"])
    assert row["ratio_to_bound"] == pytest.approx(row["round_ms"] / bound, rel=DIGITS)
    if row["backend"] != TORCH:
        assert row["bound_ms"] == pytest.approx(bound, rel=DIGITS)
        assert row["copy_share"] == pytest.approx(bound / row["round_ms"], rel=DIGITS)
    if said := row.get("rates"):
        decode = row.get("graphs", {}).get("decode", {}).get("p50")
        made = rates(row["round_ms"], decode, said["acceptance"], row["batch"])
        assert merge.rounded(made) == said


def test_a_name_is_one_row_of_a_gpu() -> None:
    assert len(set(map(named, ROWS))) == len(ROWS)


def plain(r: dict[str, Any]) -> bool:
    """Return whether a row is a round in half precision: no graph alone, no integers, no form."""
    return "graph" not in r and not r.get("forms") and r["precision"] in ("fp16", "bf16")


def test_whoever_makes_a_round_moves_the_same_bytes() -> None:
    """All but a thousandth: constants beside the weights, which torch makes as it goes."""
    moved: dict[tuple[Any, ...], list[int]] = {}
    for r in filter(plain, ROWS):
        what = tuple(r[k] for k in ("shape", "architecture", "n", "r", "batch", "context"))
        moved.setdefault(what, []).append(sum(r["bytes_moved"].values()))
    assert max(map(len, moved.values())) > 2
    for what, counts in moved.items():
        assert max(counts) < 1.001 * min(counts), what


def test_the_yardstick_is_the_torch_row_of_the_same_work() -> None:
    made = with_yardstick(ROWS)
    for r, want in zip(ROWS, made, strict=True):
        for key in ("torch_graph_ms", "torch_precision"):
            assert r.get(key) == want[key], (named(r), key)
    assert sum(r["backend"] == TORCH for r in ROWS) > 4


def test_pages_have_the_tables_that_the_results_make() -> None:
    made = merge.pages()
    assert set(made) == set(merge.PAGES)
    for page, text in made.items():
        assert page.read_text("utf-8") == text, f"{page.name}: python benchmarks/gpu/merge.py"
    marked = {m for text in made.values() for m in re.findall(r"<!-- (h200[a-z-]*) -->", text)}
    assert marked == {"h200", "h200-short", "h200-drafts", "h200-host", "h200-kernels",
                      "h200-conformance"}  # fmt: skip


def test_what_the_readme_says_of_torch_is_in_the_rows() -> None:
    """The own engine in bf16 at context 1024, whatever the head: how much faster than torch."""
    readme = (merge.ROOT / "README.md").read_text("utf-8")
    found = re.search(r"pcc's own engine is ([\d.]+) to ([\d.]+) times faster", readme)
    assert found
    faster = [r["torch_graph_ms"] / r["round_ms"] for r in ROUNDS
              if r["backend"] == "pcc-cuda" and plain(r) and r["batch"] == 1
              and r["context"] == 1024 and r["torch_graph_ms"]]  # fmt: skip
    assert [f"{min(faster):.1f}", f"{max(faster):.1f}"] == list(found.groups())


@pytest.mark.parametrize(("shape", "bound"), [("evabyte-6.5b", 1.25), ("byte-llama-3.2-3b", 1.4)])
def test_rounds_are_within_the_aim(shape: str, bound: float) -> None:
    """What pcc sets itself at context 1024, for one sequence and the tree in half precision."""
    (r,) = (r for r in ROUNDS if r["shape"] == shape and r["architecture"] == "btree"
            and r["backend"] == "pcc-cuda" and plain(r) and r["batch"] == 1
            and r["context"] == 1024 and r["n"] == {"evabyte-6.5b": 16}.get(shape, 8))  # fmt: skip
    assert r["ratio_to_bound"] <= bound
    assert r["torch_graph_ms"] >= 1.4 * r["round_ms"]


def test_reports_of_conformance_count_what_they_list() -> None:
    found = json.loads(merge.REPORTS.read_text())
    assert {(r["target"], r["precision"]) for r in found} >= {
        (t, "fp32") for t in ("cuda", "onnx-cuda", "tensorrt")
    }
    for r in found:
        for s in r["suites"]:
            listed = [f for f in r["findings"] if f["suite"] == s["suite"]]
            for verdict in ("tie", "differs", "refused"):
                assert sum(f["verdict"] == verdict for f in listed) == s[verdict], r["name"]
        assert r["ok"] == (r["complete"] and not any(
            s["differs"] or s["refused"] for s in r["suites"])), r["name"]  # fmt: skip
