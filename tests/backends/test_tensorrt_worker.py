"""Engines built by processes of their own: the same as by one, and every failure is told."""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pcc
from pcc.backends.tensorrt import worker
from pcc.backends.tensorrt.options import BuildOptions
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def test_a_chain_is_built_side_by_side(tmp_path: Path) -> None:
    source, folder = KINDS["llama"](tmp_path)
    said: list[str] = []
    how: dict[str, Any] = {"profiles": True, "only": "step", "layers": 1}
    made = [
        pcc.compile(
            source, verifier=folder, out=tmp_path / f"{jobs}.pcc", queries=["draft"], max_seq=64,
            chunk=8, target="tensorrt-rtx", precision="fp16", validate=False,
            engine=how | {"jobs": jobs}, progress=said.append,
        )
        for jobs in (1, 3)
    ]  # fmt: skip
    one, three = (m.manifest["variants"][0] for m in made)
    assert {Path(f).stem for f in three["engines"]} == {"pass-0", "pass-1", "step"}
    assert three["engines"] == one["engines"]
    assert three["profiles"] == one["profiles"]
    assert three["said"] == []
    assert sum("engine 'pass-1'" in s for s in said) == 2
    for file in three["engines"]:
        assert (made[1].path / file).stat().st_size == (made[0].path / file).stat().st_size
    left = {p.suffix for p in (made[1].path / "engines").rglob("*") if p.is_file()}
    assert left <= {".plan", ".bin", ".cache"}


def task(folder: Path, runtime: str = "rtx", graph: bytes = b"") -> worker.Task:
    (folder / "g.onnx").write_bytes(graph)
    options = BuildOptions().document()
    return worker.Task(runtime, options, str(folder / "g.onnx"), str(folder / "g.plan"))


def test_errors_of_a_worker_are_those_of_a_builder(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(PccError, match="cannot be imported") as found:
        list(worker.run([task(tmp_path, "11")], 2))
    assert found.value.code == "X330"
    assert found.value.exit_code == 3


def ends_with(monkeypatch: Any, code: str) -> None:
    """Let workers run this instead; a task is the second argument."""
    monkeypatch.setattr(worker, "START", f"import sys, time, json; {code}")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit('no such module')", "ended with code 1: no such module"),
        ("open(sys.argv[2][:-5] + '.json', 'w').write('{}')", "ended with code 0"),  # but no plan
        ("open(sys.argv[2][:-5], 'w'); open(sys.argv[2][:-5] + '.json', 'w').write("
         "'{\"layers\": 1, \"seconds\": 1.0, \"said\": []}'); sys.exit(3)", "ended with code 3"),
    ],
)  # fmt: skip
def test_a_process_that_is_lost_is_told(
    tmp_path: Path, monkeypatch: Any, code: str, said: str
) -> None:
    ends_with(monkeypatch, code)
    with pytest.raises(PccError, match=said) as found:
        list(worker.run([task(tmp_path)], 1))
    assert (found.value.code, found.value.at) == ("E435", "g")


def test_a_bug_in_a_worker_is_told(tmp_path: Path) -> None:
    with pytest.raises(PccError, match="ended with code 1") as found:  # there is no such graph
        list(worker.run([task(tmp_path, graph=b"\xff\xff")], 1))
    assert found.value.code == "E435"


def test_others_are_stopped_when_one_fails(tmp_path: Path, monkeypatch: Any) -> None:
    """One that would work for minutes, one that waits for its turn."""
    ran: list[Any] = []
    real = worker._Starter.__call__

    def start(self: Any, task: worker.Task) -> Any:
        ran.append(real(self, task))
        return ran[-1]

    monkeypatch.setattr(worker._Starter, "__call__", start)
    ends_with(monkeypatch, "time.sleep(600 * ('slow' in sys.argv[2])); sys.exit('failed')")
    slow, quick, last = (
        replace(task(tmp_path), plan=str(tmp_path / n)) for n in ("slow", "b", "c")
    )
    began = time.monotonic()
    with pytest.raises(PccError, match="failed"):
        list(worker.run([slow, quick, replace(slow, plan=str(tmp_path / "slow2")), last], 2))
    assert time.monotonic() - began < 300
    assert len(ran) <= 3
    (first,) = (p for p in ran if str(p.args[-1]).endswith("slow.task"))
    assert first.poll() == -signal.SIGKILL
    assert all(p.poll() is not None for p in ran)


def test_an_interrupt_stops_workers_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    ends_with(monkeypatch, "time.sleep(600)")
    real, given = worker.ThreadPoolExecutor.submit, list[Any]()

    def submit(self: Any, *args: Any) -> Any:
        given.append(real(self, *args))
        if len(given) == 2:
            raise KeyboardInterrupt
        return given[-1]

    monkeypatch.setattr(worker.ThreadPoolExecutor, "submit", submit)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(worker.run([task(tmp_path), replace(task(tmp_path), plan=str(tmp_path / "b"))], 2))
    assert time.monotonic() - began < 300


def test_what_the_system_lacks_for_processes_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker.subprocess, "Popen", refuse)
    with pytest.raises(PccError, match="allocate") as found:
        list(worker.run([task(tmp_path)], 1))
    assert (found.value.code, found.value.at) == ("E435", "g")
    assert "fewer jobs" in found.value.hint
    monkeypatch.setattr(worker.ThreadPoolExecutor, "submit", none)
    with pytest.raises(PccError, match="new thread") as found:
        list(worker.run([task(tmp_path)], 1))
    assert found.value.code == "E435"


def test_a_worker_imports_nothing_from_where_the_user_is(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    for name in ("json", "queue", "onnx_ir"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PccError) as found:
        list(worker.run([task(tmp_path, "11")], 1))
    assert found.value.code == "X330"


def test_a_worker_ends_with_the_compiler(tmp_path: Path, monkeypatch: Any) -> None:
    """However that ends: its end of the input is closed then."""
    slow = "import time; import pcc.backends.tensorrt.worker as w; w.work = time.sleep; w.Task = "
    start = worker.START.replace("\nmain(", f"\n{slow}lambda **_: 600\nmain(")
    monkeypatch.setattr(worker, "START", start)
    made = task(tmp_path)
    made.order.write_text("{}")
    running = worker._Starter()(made)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(3)
    running.stdin.close()  # type: ignore[union-attr]
    assert running.wait(60) == 1
    running.stdout.close()  # type: ignore[union-attr]
