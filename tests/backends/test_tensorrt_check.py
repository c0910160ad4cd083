"""The check of engines on a GPU machine fails where a part fails, in whatever way."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: pcc may be an installed one

from benchmarks.gpu import tensorrt_check as check


def rows(*verdicts: str) -> list[dict[str, str]]:
    return [{"verdict": v} for v in verdicts]


@pytest.mark.parametrize(
    ("report", "ended", "why"),
    [
        ({"rows": rows("ok", "skipped", "tie"), "error": ""}, "ok", ""),
        ({"rows": [], "error": ""}, "ok", "nothing was found"),
        ({"rows": rows("skipped"), "error": ""}, "ok", "nothing was found"),
        ({"rows": rows("ok", "differs"), "error": ""}, "ok", "1 of 2 differs"),
        ({"rows": rows("ok", "refused"), "error": ""}, "ok", "1 of 2 refused"),
        ({"rows": rows("ok"), "error": "Traceback\n\nValueError: no\n"}, "ok", "raised ValueError"),
        ({"rows": rows("ok")}, "stopped after 9 s", "stopped"),
        ({"rows": []}, "exit -11", "exit -11"),
    ],
)
def test_what_fails_a_part(report: dict[str, object], ended: str, why: str) -> None:
    said = check.failure(report, ended)
    assert bool(said) == bool(why)
    assert why in said


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorrt")), reason="TensorRT is installed")
def test_a_part_that_raises_fails_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a machine where every build is refused: here there is no TensorRT at all."""
    assert not check.every(["halves"], "tensorrt", tmp_path)
    said = capfd.readouterr().out
    assert "== halves: raised" in said
    assert "X330" in said
    assert "== halves: ok" not in said
    (part,) = json.loads((tmp_path / "tensorrt.json").read_text()).values()
    assert "X330" in part["failed"]
    assert part["rows"] == []


def test_parts_that_pass_pass_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 0

    def ran(command: list[str], **_: object) -> Done:
        out = Path(command[command.index("--json") + 1])
        out.write_text(json.dumps({"rows": rows("ok"), "seconds": 1.0, "error": ""}))
        return Done()

    monkeypatch.setattr(check.subprocess, "run", ran)
    assert check.every(["halves", "ops"], "tensorrt", tmp_path)
    assert set(json.loads((tmp_path / "tensorrt.json").read_text())) == {"halves", "ops"}
