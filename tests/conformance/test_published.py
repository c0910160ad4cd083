"""Folders of published checkpoints: which are there, with which verifier, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: pcc may be an installed one

from benchmarks.gpu import checkpoints
from pcc.cli import app
from pcc.conformance import verifiers
from pcc.conformance.bundles import Setting
from pcc.conformance.protocol import RUNS
from pcc.conformance.published import MODEL, published
from pcc.conformance.scenarios import check_protocol, expected
from pcc.errors import PccError

ON_CPU = Setting("onnx-cuda", "cpu")
Shared = Callable[[str], Path]


def quiet(_line: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints: one names the model beside it, one (which has no head) holds it."""
    out = tmp_path / "hub"
    _, alone = verifiers.gpt(tmp_path / "gpt")
    head, model = verifiers.lora(tmp_path / "lora")
    shutil.copytree(alone, out / "alone")
    shutil.copytree(head, out / "named")
    shutil.copytree(model, out / "Model-3B")
    name(out / "named", "some-publisher/Model-3B")
    return out


def name(checkpoint: Path, model: str) -> None:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    path = checkpoint / "config.yaml"
    config = yaml.safe_load(path.read_text())
    at = config
    *keys, last = MODEL.split(".")
    for key in keys:
        at = at.setdefault(key, {})
    at[last] = model
    path.write_text(yaml.safe_dump(config))


def test_each_checkpoint_has_its_verifier(folder: Path, tmp_path: Path) -> None:
    found = published(folder)
    assert [s.name for s in found] == ["alone", "named"]
    assert [s.make(tmp_path) for s in found] == [
        (folder / "alone", folder / "alone"),
        (folder / "named", folder / "Model-3B"),
    ]
    findings = list(check_protocol(ON_CPU, tmp_path, quiet, scenarios=found[1:]))
    assert {f.verdict for f in findings} == {"ok"}
    assert len(findings) == len(RUNS) * 2


@pytest.mark.parametrize("model", ["Elsewhere", "../..", "/etc", "a/../..", ""])
def test_a_model_that_is_not_beside_it_is_refused(folder: Path, model: str) -> None:
    name(folder / "named", model)
    with pytest.raises(PccError, match="not beside it") as found:
        published(folder)
    assert found.value.code == "C144"


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(PccError, match="no checkpoints") as found:
            published(place)
        assert found.value.code == "C144"


def test_no_checkpoint_is_left_out_in_silence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcc.conformance.published.MOST", 1)
    with pytest.raises(PccError, match="2 checkpoints are too many") as found:
        published(folder)
    assert found.value.code == "C144"


@pytest.mark.parametrize(
    "more", [("--verifier", "x"), ("--head", "x"), ("--only", "zzz", "--part", "protocol")]
)
def test_options_of_the_command(folder: Path, more: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["conformance", "--checkpoints", str(folder), *more])
    assert isinstance(done.exception, PccError)
    assert done.exception.code in ("C143", "C144")


def test_the_command_writes_and_reads_their_texts(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "alone")
    texts, report = tmp_path / "e.json", tmp_path / "r.json"
    base = ["conformance", "--checkpoints", str(folder), "--batch", "1"]
    done = CliRunner().invoke(app, [*base, "--save-expected", str(texts)])
    assert done.exit_code == 0, done.output
    assert set(json.loads(texts.read_text())) == {
        f"named {p} batch 1" for p in ("fp32", "fp16", "bf16")
    }
    done = CliRunner().invoke(
        app, [*base, "--part", "protocol", "--expected", str(texts), "--json", str(report)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["checkpoints"] == "hub"


def test_pickles_are_converted_for_other_machines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    shutil.rmtree(folder / "alone")
    (weights,) = (folder / "named").glob("*.safetensors")
    arrays: dict[str, Any] = {k: torch.from_numpy(v) for k, v in load_file(weights).items()}
    arrays["lm._lm.not_there.weight"] = None
    torch.save({"model_state_dict": arrays}, weights.with_suffix(".pt"))
    weights.unlink()
    before = {s.name: expected(s, 1, "fp32", tmp_path / "a") for s in published(folder)}
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", str(folder), "--out", str(out)])
    checkpoints.main()
    assert not list(out.rglob("*.pt"))
    assert list((out / "named").glob("*.safetensors"))
    made = json.loads((out / "expected.json").read_text())
    assert {k: made[f"{k} fp32 batch 1"] for k in before} == json.loads(json.dumps(before))


# ---------------------------------------------------------------- what was published


@pytest.mark.parametrize("only", ["btree-n-6", "llama", "nanogpt"])
def test_published_texts_on_a_cpu(only: str, shared: Shared, tmp_path: Path) -> None:
    """The graphs of target onnx-cuda, whose texts on a GPU are compared with these."""
    (s,) = (s for s in published(shared("oracle/checkpoints")) if only in s.name)
    found = list(check_protocol(ON_CPU, tmp_path, quiet, scenarios=(s,)))
    assert {f.verdict for f in found} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cpu", "simulator"])
def test_every_published_text(provider: str, shared: Shared, tmp_path: Path) -> None:
    setting = ON_CPU if provider == "cpu" else Setting("cuda", "simulator")
    found = list(
        check_protocol(setting, tmp_path, quiet, scenarios=published(shared("oracle/checkpoints")))
    )
    assert {f.verdict for f in found} == {"ok"}
    assert len({f.case for f in found}) == 6
