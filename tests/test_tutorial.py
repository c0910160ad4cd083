"""The tutorial is true: its commands run in order, at few steps, and end in a drafting engine."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from shipped import EXAMPLES, Command

torch = pytest.importorskip("torch", reason="training needs torch, which is not installed")

TUTORIAL = EXAMPLES / "tutorial"
TEXT = (TUTORIAL / "README.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]  # fmt: skip
FEWER = {
    "backbone.yaml": ["optim.steps=6", "optim.batch=2", "run.eval_every=6",
                      "model.width=32", "model.layers=1", "model.hidden=48"],
    "greedy.yaml": ["greedy.rows=8", "greedy.batch=8", "greedy.length=64"],
    "head.yaml": ["optim.steps=4", "optim.batch=2", "loss.positions=32", "run.eval_every=4",
                  "run.eval_prompts=2", "run.eval_bytes=16"],
    "run": ["--json"],  # a model trained for six steps writes no UTF-8
    "bench": ["--limit", "2", "--max-new-tokens", "12", "--repeats", "5"],
}  # fmt: skip


def shorter(words: list[str]) -> list[str]:
    """Add what makes a command quick to its arguments."""
    if words[0] == "train":
        sets = FEWER[Path(words[1]).name]
        return [*words, *(w for s in sets for w in ("--set", s)), "--quiet"]
    return [*words, *FEWER.get(words[0], [])]


def test_every_step_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("tutorial_text", TUTORIAL / "text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    command, out = Command(capsys, monkeypatch), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that wait for each other are slow on a busy machine
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    assert [w[1] for w in COMMANDS] == [
        "train", "train", "train", "compile", "verify", "run", "run", "bench",
    ]  # fmt: skip
    for program, *words in COMMANDS:
        assert program == "pcc"
        done = command(*shorter(words))
        assert done.code == 0, f"{words}: {done.err}"
        out[f"{words[0]} {Path(words[1]).name}"] = done
    assert 0 < json.loads(out["train backbone.yaml"].out)["heldout_bits_per_byte"] < 12
    found = json.loads(out["train head.yaml"].out)
    assert 0 <= found["accepted_stepwise"] <= 7
    assert "speculative, greedy" in out["bench m.pcc"].out
    assert "greedy text of 64 tokens is the autoregressive one" in out["verify m.pcc"].out
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(block, "tutorial", "exec"), {})


def test_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (TUTORIAL / target).exists(), target
    for words in COMMANDS:
        if words[1] == "train":
            assert (EXAMPLES.parent / words[2]).is_file()
