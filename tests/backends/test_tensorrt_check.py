"""The check of engines on a GPU machine fails where a part fails, in whatever way."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

from pcc.backends.tensorrt.runtimes import RUNTIMES

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: pcc may be an installed one

from benchmarks.gpu import tensorrt_check as check
from benchmarks.gpu import tensorrt_profiles as profiles

OLD = RUNTIMES["8.6"]


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


# ---------------------------------------------------------------- contexts of several profiles


class Fresh(dict[str, Any]):
    """Engines that are not kept: a plan of one name is another one each time."""

    def setdefault(self, key: str, value: Any = None) -> Any:
        return value


@pytest.mark.parametrize("kind", profiles.MODELS)
def test_contexts_of_every_profile_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fake_tensorrt.stand_in(monkeypatch, OLD, tmp_path / kind).engines = Fresh()
    monkeypatch.setattr(profiles, "MODELS", (kind,))
    found = list(profiles.widths(OLD.target, tmp_path))
    judged = [r for r in found if r["verdict"] != "skipped"]
    assert len(judged) == len(profiles.ORDERS)
    assert all(r["verdict"] == "ok" and r["error"] < 1e-5 for r in judged)
    facts = [r["facts"] for r in found if "facts" in r]
    assert [f["logits"]["context"][1] for f in facts] == list(profiles.WIDTHS)
    assert all(v["context"] == v["right"] for f in facts for v in f.values())


@pytest.mark.parametrize("sizes", [False, True])
def test_contexts_that_are_wrong_fail_and_other_builds_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: bool
) -> None:
    """Of the second profile: the sizes of the first, or numbers that are off."""
    trt = fake_tensorrt.stand_in(monkeypatch, OLD, tmp_path / "llama")
    trt.engines = Fresh()
    monkeypatch.setattr(profiles, "MODELS", ("llama",))
    monkeypatch.setattr(profiles, "ORDERS", ((0, 1),))

    def shape(context: Any, name: str) -> tuple[int, ...]:
        return context.engine.sized(name, context.engine.profiles[0])

    def enqueued(context: Any, stream: int) -> bool:
        at = dict(context.at)
        if context.profile:
            at["past.key.0"] = at["past.value.0"]
        trt.cu.enqueue(lambda: context._run(at))
        return True

    name, wrong = ("get_tensor_shape", shape) if sizes else ("execute_async_v3", enqueued)
    monkeypatch.setattr(fake_tensorrt.Context, name, wrong)
    found = list(profiles.widths(OLD.target, tmp_path))
    (judged,) = [r for r in found if r["verdict"] != "skipped"]
    assert judged["verdict"] == "differs"
    assert ("X334" in judged.get("note", "")) == sizes
    others = {r["case"]: r["note"] for r in found if r["verdict"] == "skipped"}
    assert others["llama, ranges"].startswith("differs")
    assert others["llama, profile 1 alone"].startswith("ok")
