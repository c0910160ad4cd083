"""Engines built by processes of their own: the same as by one, and every failure is told."""

from __future__ import annotations

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


def test_a_process_that_is_lost_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(PccError, match="ended with code 1") as found:  # no graph: a bug of ours
        list(worker.run([task(tmp_path, graph=b"\xff\xff")], 1))
    assert found.value.code == "E435"
    monkeypatch.setattr(worker, "MODULE", "pcc.no_such_module")
    with pytest.raises(PccError, match="No module named") as found:
        list(worker.run([task(tmp_path)], 1))
    assert found.value.at == "g"


def test_others_are_stopped_when_one_fails(tmp_path: Path, monkeypatch: Any) -> None:
    ran: list[Any] = []
    real = worker._Starter.__call__

    def start(self: Any, task: worker.Task) -> Any:
        ran.append(real(self, task))
        return ran[-1]

    monkeypatch.setattr(worker._Starter, "__call__", start)
    with pytest.raises(PccError):
        list(worker.run([task(tmp_path, "11")] * 6, 1))
    assert len(ran) < 6
    assert all(p.poll() is not None for p in ran)
