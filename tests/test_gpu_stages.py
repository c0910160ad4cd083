"""What is run on a GPU machine can be asked for: names, options and files of its commands exist."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: pcc may be an installed one

from benchmarks.gpu import run_h200, stages
from pcc.backends.tensorrt.options import BuildOptions
from pcc.cli import app
from pcc.conformance import asked, suite, verifiers
from pcc.conformance.report import Finding

RUNS = [c for s in stages.STAGES for c in s.commands if c.args[: len(stages.PCC)] == stages.PCC]
SUITES = [c for c in RUNS if c.args[len(stages.PCC)] == "conformance"]


def some_checkpoint(folder: Path) -> Path:
    """Return what `checkpoints.py` might have written."""
    _, model = verifiers.gpt(folder / "made")
    out = folder / "checkpoints"
    shutil.copytree(model, out / "one")
    (out / "expected.json").write_text("{}")
    return out


@pytest.mark.parametrize("command", SUITES, ids=[c.name for c in SUITES])
def test_what_the_suite_is_asked_for_is_there(
    command: stages.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def check(setting: Any, say: Any, **how: Any) -> list[Finding]:
        calls.append((setting, how))
        asked.check_parts([setting], how["parts"], how["scenarios"])
        return [Finding("ops", "a", "", "ok")]

    monkeypatch.setattr(suite, "check", check)
    places = {"json": str(tmp_path / "r.json"), "root": str(run_h200.ROOT),
              "expected": run_h200.EXPECTED, "work": str(tmp_path),
              "checkpoints": str(some_checkpoint(tmp_path))}  # fmt: skip
    args = [run_h200._filled(x, places) for x in command.args[len(stages.PCC) :]]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    ((setting, how),) = calls
    assert how["jobs"] > 1
    assert ("one" in {s.name for s in how["scenarios"]}) == ("checkpoints" in command.name)
    options = BuildOptions.of(dict(setting.engine)) if setting.target == "tensorrt" else None
    if options is not None and "protocol" in how["parts"]:
        assert options.builds("step_greedy")
        assert not options.builds("decode")


def test_what_needs_checkpoints_is_left_out_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run_h200.py", "--out", str(tmp_path), "conformance-cuda", "--only", "cuda-checkpoints"]
    monkeypatch.setattr(sys, "argv", args)
    assert run_h200.main() == 0
    assert "cuda-checkpoints is left out" in capsys.readouterr().out


def test_tensorrt_s_python_is_lent_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    command = stages.Command("c", (), 1, "trt")
    for _ in range(2):  # and again, beside another run
        paths = run_h200.environment(command, tmp_path, tmp_path)["PYTHONPATH"].split(":")
    (folder,) = (Path(p) for p in paths if p.endswith("lent"))
    assert (folder / "yaml/__init__.py").is_file()
    plain = run_h200.environment(stages.Command("c", (), 1), tmp_path, tmp_path)
    assert "lent" not in plain["PYTHONPATH"]
