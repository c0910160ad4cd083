"""The README is true: its Python and commands run, links lead somewhere, numbers hold."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from shipped import EXAMPLES, PCIR, ROOT, TINY, Command

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
MADE = {"code.pcc", "two.pcc", "tree.pcc", "cp.pcc", "out.npz"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TINY))
    return tmp_path


def test_examples_run_in_order(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, names = Command(capsys, monkeypatch), {}
    np.savez(folder / "data.npz", x=np.full((2, 8), 32), context=np.zeros((1, 32), np.float32))
    (folder / "circuit.pcir").write_text(PCIR)
    (folder / "prompts.txt").write_text("class Queue:\n")
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *args = shlex.split(line)
            assert program == "pcc"
            done = command(*args)
            assert done.code == 0, f"{line}: {done.err}"
    assert {p.name for p in folder.iterdir()} >= MADE
    with np.load(folder / "out.npz") as out:
        assert out["log_cond"].shape == (2, 8)
    assert names["first"].reason in ("length", "stop")
    assert len(names["more"].bytes) == 20
    assert len(b"".join(names["chunks"])) == 40


def test_what_is_shown() -> None:
    assert sum(kind == "python" for kind, _ in BLOCKS) == 3
    shown = {"compile", "run", "bench", "inspect", "verify", "query", "opt", "doctor"}
    assert {c.split()[1] for c in COMMANDS} >= shown


def test_speedups_are_those_of_the_script() -> None:
    """The table is what the script makes of the file that it wrote; the texts were the same."""
    sys.path.insert(0, str(ROOT))
    speedup = importlib.import_module("benchmarks.speedup")
    document = json.loads(speedup.RESULTS.read_text())
    assert speedup.into(README, document) == README
    assert document["prompts"] >= 40
    assert {r["head"] for r in document["rows"]} == {"autoregressive", *speedup.decoding.heads()}
    for r in document["rows"]:
        assert r["identical"] + r["near_ties"] == document["prompts"], r["head"]


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
