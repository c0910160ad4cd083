"""The README is true: its Python and commands run, links lead somewhere, numbers hold."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from shipped import EXAMPLES, PCIR, ROOT, TINY, Command

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TINY))
    return tmp_path


def test_python_runs(folder: Path) -> None:
    assert len(PYTHON) == 2
    exec(compile("\n".join(PYTHON), "README.md", "exec"), {})
    assert {p.name for p in folder.iterdir()} >= {"two.pcc", "tree.pcc"}


def test_commands_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command(capsys, monkeypatch)
    np.savez(folder / "data.npz", x=np.full((2, 8), 32), context=np.zeros((1, 32), np.float32))
    (folder / "circuit.pcir").write_text(PCIR)
    assert {c.split()[1] for c in COMMANDS} >= {"compile", "inspect", "verify", "query", "opt"}
    for line in COMMANDS:
        program, *args = shlex.split(line)
        assert program == "pcc"
        done = command(*args)
        assert done.code == 0, f"{line}: {done.err}"
    with np.load(folder / "out.npz") as out:
        assert out["log_cond"].shape == (2, 8)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_two_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= targets
    assert "make demo" in README
    assert "make test" in README


def test_numbers_are_those_that_training_measured() -> None:
    heads = json.loads((TINY / "metrics.json").read_text())["excerpts"]["heads"]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    assert len(rows) == len(heads)
    for (_, nats, step, mode), want in zip(rows, heads.values(), strict=True):
        assert float(nats) == pytest.approx(want["nll_per_byte"], abs=1e-3)
        assert float(step) == want["accepted_stepwise"]
        assert float(mode) == want["accepted_max_product"]
