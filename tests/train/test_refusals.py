"""What a run refuses, before it costs anything: changed inputs, evaluations, adapters, numbers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from training import TEXT, backbone, head  # noqa: E402

from pcc.errors import PccError  # noqa: E402
from pcc.train import cli, data, files  # noqa: E402
from pcc.train import config as cfg  # noqa: E402
from pcc.train.given import BACKBONE  # noqa: E402
from pcc.train.tasks import HeadTask  # noqa: E402


@pytest.mark.parametrize("kind", ["data", "backbone", "greedy"])
def test_resume_refuses_inputs_that_changed(ground: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(ground, root)
    conf = cfg.build(head(root, tmp_path / "h"))
    cli.run(conf, progress=False, until=2)
    if kind == "data":
        data.save_packed(
            root / "d.npz", TEXT | {"f0": b"other text\n" * 9}, {"held": b"h = 1\n" * 99}
        )
    else:
        path = (
            root / "backbone" / "model.safetensors"
            if kind == "backbone"
            else root / "g.safetensors"
        )
        values, meta = files.read_tensors(path)
        name = min(values)
        values[name] = values[name] - 1
        files.write_tensors(path, values, None, meta)
    if kind == "backbone":  # greedy text of the old backbone is refused before
        with pytest.raises(PccError, match=r"N142.*another backbone"):
            cli.run(conf, progress=False)
        given, meta = files.read_tensors(root / "g.safetensors")
        meta[BACKBONE] = files.sha256(path)
        files.write_tensors(root / "g.safetensors", given, None, meta)
    with pytest.raises(PccError, match=rf"N150.*inputs: inputs\.{kind}(, inputs\.greedy)?\n"):
        cli.run(conf, progress=False)
    again = cfg.build(head(root, tmp_path / "h", seed=3))
    with pytest.raises(PccError, match="seed"):
        cli.run(again, progress=False)


@pytest.mark.parametrize(
    ("code", "block", "change"),
    [
        ("N143", "run", {"eval_prompts": 10**6}),
        ("N120", "run", {"eval_prompt": 90}),
        ("N102", "run", {"eval_bytes": 3}),
    ],
)
def test_an_impossible_evaluation_is_refused_before_the_first_step(
    ground: Path, tmp_path: Path, code: str, block: str, change: dict[str, Any]
) -> None:
    raw = head(ground, tmp_path / "h")
    raw["loss"] |= {"distill": 0.0}
    raw[block] |= change
    with pytest.raises(PccError, match=code):
        cli.run(cfg.build(raw), progress=False)
    assert not (tmp_path / "h").exists()
    raw["run"] |= {"eval_every": 0}
    cli.run(cfg.build(raw), progress=False)  # without the evaluation it trains
    assert (tmp_path / "h" / "model@4.safetensors").is_file()


def test_held_out_text_that_is_gone_is_an_error(ground: Path, tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_bytes(b"".join(b"line %d of the text\n" % i for i in range(30)))
    raw = backbone(ground, tmp_path / "o")
    paths = {"paths": [str(tmp_path / "a.py")], "heldout": [str(tmp_path / "b.py")]}
    for given, code in (
        (paths | {"length": 32}, "N144"),
        ({"paths": paths["paths"], "length": 32}, "N144"),
        ({"packed": str(ground / "d.npz"), "length": 1000}, "N143"),
    ):
        with pytest.raises(PccError, match=code):
            cli.run(cfg.build(raw | {"data": given}), progress=False)
    assert not (tmp_path / "o").exists()


def test_init_takes_the_adapters_or_refuses(ground: Path, tmp_path: Path) -> None:
    lora = {"layers": 1, "r": 2, "alpha": 6.0, "targets": ["q_proj", "up_proj"]}
    cli.run(cfg.build(head(ground, tmp_path / "a", lora=lora)), progress=False)
    stored = files.read_weights(next((tmp_path / "a").glob("model@*")))
    more = {"init": str(tmp_path / "a"), "lora": lora}
    task = HeadTask(cfg.build(head(ground, tmp_path / "b", **more)))
    adapters = {k: p for k, p in task.parameters().items() if "lora_" in k}
    assert len(adapters) == 4
    for name, p in adapters.items():
        assert torch.equal(p, stored[name])
        assert "lora_B" not in name or p.any()
    for change in ({"layers": 0}, {"layers": 2}, {"r": 3}, {"alpha": 5.0}, {"targets": ["q_proj"]}):
        wrong = head(ground, tmp_path / "b", **more | {"lora": lora | change})
        with pytest.raises(PccError, match="N112"):
            HeadTask(cfg.build(wrong))
    with pytest.raises(PccError, match="F102"):
        HeadTask(cfg.build(head(ground, tmp_path / "b", init=str(tmp_path / "absent"))))


@pytest.mark.parametrize("targets", [[], ["q_proj", "c_attn"]])
def test_adapters_that_match_nothing_are_refused(
    ground: Path, tmp_path: Path, targets: list[str]
) -> None:
    lora = {"layers": 1, "targets": targets}
    with pytest.raises(PccError, match="N113"):
        HeadTask(cfg.build(head(ground, tmp_path / "h", lora=lora)))


@pytest.mark.parametrize(
    "wrong",
    [
        "seed=-1", "optim.lr=-1", "optim.lr=.inf", "optim.betas=[2.0, 0.9]", "optim.clip=-1",
        "lora.r=0", "lora.layers=-1", "run.eval_prompts=0", "run.keep=-1", "run.eval_every=-1",
        "run.log_every=-1", "loss.positions=-5", "loss.greedy_fraction=7", "multi_byte.n=-1",
        "head.n=1", "head.n=5000", "data.length=1", "greedy.prompt=1",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("kind: head\nout: x\n")
    with pytest.raises(PccError) as e:
        cfg.read(path, [wrong])
    assert e.value.code == "N102"
    assert e.value.at == f"{path}:{wrong.partition('=')[0]}"
    assert "choose a number in" in e.value.hint


def test_each_number_has_a_range_and_each_range_a_number() -> None:
    numbers = set()
    whole = cfg.Config("head", "x")
    for f in dataclasses.fields(whole):
        block = getattr(whole, f.name)
        inner = dataclasses.fields(block) if dataclasses.is_dataclass(block) else ()
        values = {f"{f.name}.{g.name}": getattr(block, g.name) for g in inner} or {f.name: block}
        for key, value in values.items():
            first = value[0] if isinstance(value, tuple) and value else value
            if type(first) in (int, float):
                numbers.add(key)
    assert numbers == set(cfg.RANGES)


def test_settings_that_exclude_each_other() -> None:
    base = {"kind": "backbone", "out": "x"}
    cfg.build(base | {"data": {"length": 8}, "multi_byte": {"n": 7}})
    for wrong in (
        {"data": {"length": 8}, "multi_byte": {"n": 8}},
        {"data": {"packed": "a.npz", "paths": ["b"]}},
        {"data": {"packed": "a.npz", "heldout": ["b"]}},
    ):
        with pytest.raises(PccError, match="N102"):
            cfg.build(base | wrong)
