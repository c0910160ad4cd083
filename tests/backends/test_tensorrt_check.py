"""The check of engines on a GPU machine fails where a part fails, in whatever way."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
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
    assert not check.every(["halves"], check.Plan("tensorrt", tmp_path))
    said = capfd.readouterr().out
    assert "== halves: raised" in said
    assert "X330" in said
    assert "== halves: ok" not in said
    (part,) = json.loads((tmp_path / "tensorrt.json").read_text()).values()
    assert "X330" in part["failed"]
    assert part["rows"] == []


class Ran:
    """Stands in for the processes of parts: each writes one row, and is counted."""

    def __init__(self, verdict: str = "ok") -> None:
        self.verdict, self.parts, self.most = verdict, list[str](), 0
        self.lock, self.now = threading.Lock(), 0

    def __call__(self, command: list[str], **_: object) -> Any:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.parts.append(command[command.index("--inside") + 1])
        out = Path(command[command.index("--json") + 1])
        out.write_text(json.dumps({"rows": rows(self.verdict), "seconds": 1.0, "error": ""}))
        with self.lock:
            self.now -= 1
        return SimpleNamespace(returncode=0)


def test_parts_that_pass_pass_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.subprocess, "run", Ran())
    assert check.every(["halves", "ops"], check.Plan("tensorrt", tmp_path))
    assert set(json.loads((tmp_path / "tensorrt.json").read_text())) == {"halves", "ops"}


def test_parts_that_time_run_alone_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran()
    monkeypatch.setattr(check.subprocess, "run", ran)
    assert check.every(list(check.PARTS), check.Plan("tensorrt", tmp_path, beside=4))
    assert sorted(ran.parts) == sorted(check.PARTS)
    assert set(ran.parts[-2:]) == set(check.TIMED)
    assert ran.most <= 4


def test_parts_that_passed_before_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.subprocess, "run", Ran("differs"))
    plan = check.Plan("tensorrt", tmp_path)
    assert not check.every(["ops"], plan)
    done = json.loads((tmp_path / "tensorrt.json").read_text())
    done["llama"] = {"rows": rows("ok"), "failed": ""}
    ran = Ran()
    monkeypatch.setattr(check.subprocess, "run", ran)
    assert check.every(["llama", "ops"], plan, done)
    assert ran.parts == ["ops"]
    assert set(json.loads((tmp_path / "tensorrt.json").read_text())) == {"llama", "ops"}


def test_a_part_without_time_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran()
    monkeypatch.setattr(check.subprocess, "run", ran)
    assert not check.every(["ops"], check.Plan("tensorrt", tmp_path, end=time.monotonic() + 3))
    assert ran.parts == []
    assert "no time" in json.loads((tmp_path / "tensorrt.json").read_text())["ops"]["failed"]


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


def test_tensors_in_half_are_named() -> None:
    half, whole = "Row major linear FP16 format", "Row major linear FP32"
    said = {"Layers": [
        {"Name": "block", "LayerType": "Myelin", "TacticName": "t",
         "Inputs": [{"Name": "w", "Format/Datatype": half}, {"Name": "u", "Format/Datatype": whole},
                    {"Name": "s", "Format/Datatype": half}],
         "Outputs": [{"Name": "q", "Format/Datatype": half}]},
        {"Name": "other", "LayerType": "Reduce", "Outputs": [],
         "Inputs": [{"Name": "q", "Format/Datatype": whole}]},
        "a layer of which nothing is known",
    ]}  # fmt: skip
    inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps(said))
    plan = SimpleNamespace(create_engine_inspector=lambda: inspector)
    module = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=0))
    runner = SimpleNamespace(
        executor=lambda query: (None, SimpleNamespace(engine=plan)),
        opener=SimpleNamespace(module=module),
    )
    (found,) = check.halved(SimpleNamespace(runner=runner), "draft")
    assert found == "block (Myelin, t): reads w, s; writes q"
