"""The suite is built for TensorRT-RTX, which needs no GPU for that; what it drops is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pcc.backends.onnx.lower import RULES
from pcc.cli import app
from pcc.conformance.bundles import BUILD, Setting
from pcc.conformance.circuits import check_queries, circuits
from pcc.conformance.ops import check_ops, numbered
from pcc.conformance.report import BAD, Finding
from pcc.conformance.scenarios import SCENARIOS, check_protocol, wanted
from pcc.errors import PccError
from pcc.tensor import nn
from pcc.tensor import ops as t

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
RTX = Setting("tensorrt-rtx", BUILD, halves=("f16", "bf16"))


def quiet(_line: str) -> None:
    pass


def all_built(found: list[Finding]) -> bool:
    assert not [f for f in found if f.verdict in BAD]
    return {f.verdict for f in found} == {"built"}


@pytest.mark.parametrize("every", [0, 1])
def test_every_op_builds(every: int, tmp_path: Path) -> None:
    """Two halves, so that they are built side by side."""
    cases = numbered(RTX.halves, RTX.target)[every::2]
    found = list(check_ops(RTX, tmp_path, quiet, cases))
    assert all_built(found)
    assert [f.case for f in found] == [c.title for c in cases]


@pytest.mark.parametrize(
    "kind", [pytest.param("trained", marks=pytest.mark.slow), "contextual", "forest"]
)
def test_every_query_builds(kind: str, tmp_path: Path) -> None:
    found = list(check_queries(replace(RTX, only=(kind,)), tmp_path, quiet))
    assert all_built(found)
    assert len(found) == 9 * sum(kind in name for name in circuits())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_verifier_builds(precision: str, batch: int, tmp_path: Path) -> None:
    setting = replace(RTX, precision=precision, batch=batch)
    found = list(check_protocol(setting, tmp_path, quiet))
    taken = [s for s in SCENARIOS if wanted(s, setting)]
    assert all_built(found)
    assert len({f.case for f in found}) == len(taken) > 0
    assert {"step", "prefill", "decode"} <= {f.what for f in found}


# ---------------------------------------------------------------- it can fail


def test_what_the_parser_drops_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache write as if rows wrapped around: the attribute is not one that it honours."""

    def circular(g, n):  # type: ignore[no-untyped-def]
        cache, update, start = (g.values[a] for a in n.args)
        return g("TensorScatter", cache, update, start, axis=-2, mode="circular")

    monkeypatch.setitem(RULES, nn.CacheWrite, circular)
    kinds = (nn.CacheWrite, t.Exp)
    cases = [c for c in numbered(()) if c.case.op in kinds and (c.case.forms or "b") == "b"]
    found = list(check_ops(RTX, tmp_path, quiet, cases))
    bad = {f.case: f.note for f in found if f.verdict in BAD}
    assert set(bad) == {c.title for c in cases if c.case.op is nn.CacheWrite}
    assert all("E431" in note for note in bad.values())


# ---------------------------------------------------------------- the command


def test_the_command_builds_and_says_so(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    done = CliRunner().invoke(
        app, ["conformance", "--target", "tensorrt-rtx", "--provider", "build", "--part",
              "queries", "--only", "ff-trained", "--batch", "1", "--json", str(report)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "agrees" in done.output
    made = json.loads(report.read_text())
    assert made["ok"]
    assert not made["findings"]
    assert [(s["ok"], s["built"]) for s in made["suites"]] == [(0, 9)]


def test_expectations_are_not_read_where_nothing_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["conformance", "--provider", "build", "--expected", str(tmp_path / "e.json")]
    )
    assert isinstance(done.exception, PccError)
    assert done.exception.code == "C144"
