"""docs/passes.md lists every pass with its exactness; docstrings say law, gain and refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pcc.passes import pipelines
from pcc.passes.registry import PASSES, make
from pcc.passes.to_tensor import CUT_LIMIT
from pcc.passes.validate import FEW_ROWS, LARGE, ROWS

DOC = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
TABLE = dict(re.findall(r"^\| `([a-z-]+)` \|.*\| ([A-Z]+) \|", DOC, re.MULTILINE))


def test_the_table_lists_every_pass_and_no_other() -> None:
    assert set(TABLE) == set(PASSES)
    assert {name: make(name).exact.name for name in PASSES} == TABLE


@pytest.mark.parametrize("name", PASSES)
def test_docstrings(name: str) -> None:
    text = " ".join((make(name).__doc__ or "").split())
    first = text.split(". ")[0]
    assert re.search(r"=>|are dropped", first), "the law comes first"
    assert re.search(r"[Pp]ays", text)
    assert re.search(r"[Dd]ecline", text)


def test_every_pass_runs_in_a_pipeline() -> None:
    every = (getattr(pipelines, x) for x in ("CIRCUIT", "TENSOR", "MAPS", "LAZY", "STORAGE"))
    assert {name for names in every for name in names} == set(PASSES)


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"There are {ROWS} random rows per case, {FEW_ROWS} where" in DOC
    assert f"more than {LARGE:,} numbers" in DOC
    assert f"more than {CUT_LIMIT:,} node visits" in DOC
