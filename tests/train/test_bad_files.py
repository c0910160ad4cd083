"""Files that a run reads, and settings that the machine cannot follow: refused, by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402
from training import head  # noqa: E402

from pcc.errors import PccError  # noqa: E402
from pcc.frontends import region_wiring  # noqa: E402
from pcc.train import checkpoint, cli, files, lock  # noqa: E402
from pcc.train import config as cfg  # noqa: E402
from pcc.train.given import BACKBONE  # noqa: E402
from pcc.train.head import CircuitHead  # noqa: E402
from pcc.train.layout import save_head  # noqa: E402


def code_of(raw: dict[str, Any]) -> str:
    with pytest.raises(PccError) as e:
        cli.run(cfg.build(raw), progress=False)
    return e.value.code


@pytest.mark.parametrize(
    ("code", "change", "prompt"),
    [
        ("N142", lambda ids: ids, "x"),
        ("N142", lambda ids: ids, "-5"),
        ("N142", lambda ids: ids, "0"),
        ("N142", lambda ids: ids, "9999"),
        ("N142", lambda ids: ids + 1000, "16"),
        ("N142", lambda ids: ids - 1000, "16"),
        ("N142", lambda ids: ids[0], "16"),
        ("N142", lambda ids: ids[:0], "16"),
        ("N142", lambda ids: ids.bfloat16(), "16"),
        ("N140", lambda ids: ids[:, :18], "16"),
        ("N120", lambda ids: ids.repeat(1, 4), "16"),
    ],
)
def test_greedy_files_are_checked(
    ground: Path, tmp_path: Path, code: str, change: Any, prompt: str
) -> None:
    ids = change(load_file(ground / "g.safetensors")["ids"]).contiguous()
    save_file({"ids": ids.clone()}, tmp_path / "g.safetensors", metadata={"prompt": prompt})
    raw = head(ground, tmp_path / "h")
    raw["loss"]["greedy"] = str(tmp_path / "g.safetensors")
    assert code_of(raw) == code


def test_greedy_text_names_its_backbone(ground: Path, tmp_path: Path) -> None:
    ids, meta = files.read_tensors(ground / "g.safetensors")
    assert meta[BACKBONE] == files.sha256(ground / "backbone" / "model.safetensors")
    files.write_tensors(tmp_path / "g.safetensors", ids, None, meta | {BACKBONE: "0" * 64})
    raw = head(ground, tmp_path / "h")
    raw["loss"]["greedy"] = str(tmp_path / "g.safetensors")
    with pytest.raises(PccError, match=r"N142.*another backbone"):
        cli.run(cfg.build(raw), progress=False)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.zeros(1)},
        {"heads": torch.zeros(1)},
        {"heads": torch.zeros(2, 3, 4)},
        {"heads": torch.zeros(0, 258, 16)},
        {"heads": torch.full((2, 258, 16), float("nan"))},
    ],
)
def test_multi_byte_heads_are_checked(
    ground: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shutil.copytree(ground / "backbone", tmp_path / "backbone")
    save_file(tensors, tmp_path / "backbone" / "multi_byte" / "heads.safetensors")
    raw = head(ground, tmp_path / "h", backbone=str(tmp_path / "backbone"))
    assert code_of(raw) == "N122"


def test_damaged_states_are_named(ground: Path, tmp_path: Path) -> None:
    conf = cfg.build(head(ground, tmp_path / "h"))
    cli.run(conf, progress=False, until=2)
    path = checkpoint.latest(tmp_path / "h")
    assert path is not None
    tensors, meta = files.read_tensors(path)
    cut = {k: v[:1] if k.startswith("exp_avg.") else v for k, v in tensors.items()}
    bare = {k: v for k, v in tensors.items() if k.startswith("weight.")}
    half = {k: v for k, v in tensors.items() if not k.startswith("exp_avg_sq.")}
    without = {k: v for k, v in meta.items() if k != "step"}
    for values, said in (
        (tensors, without), (tensors, meta | {"step": "x"}), (tensors, meta | {"step": "-3"}),
        (tensors, meta | {"step": "99"}), (cut, meta), (bare, meta), (half, meta),
    ):  # fmt: skip
        files.write_tensors(path, values, None, said)
        with pytest.raises(PccError, match="N151"):
            cli.run(conf, progress=False)
    files.write_tensors(path, tensors, None, meta)
    cli.run(conf, progress=False)


@pytest.mark.parametrize(
    ("code", "block", "key", "value"),
    [
        ("N111", "head", "r", 10**9),
        ("N102", "run", "device", "mps"),
        ("N102", "run", "device", "meta"),
        ("N102", "run", "device", "cuda:-1"),
    ],
)
def test_what_the_machine_has_not(
    ground: Path, tmp_path: Path, code: str, block: str, key: str, value: Any
) -> None:
    raw = head(ground, tmp_path / "h")
    raw[block][key] = value
    assert code_of(raw) == code


def test_the_command_says_what_is_wrong_in_one_line(ground: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(cfg.yaml.safe_dump(head(ground, tmp_path / "h")))
    for args, code in (
        ([str(path), "--set", f"out={path}/x"], "N130"), ([str(tmp_path / "none.yaml")], "F102"),
    ):  # fmt: skip
        command = [sys.executable, "-m", "pcc.train", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert code in done.stderr
        assert "Traceback" not in done.stderr
        assert "config.yaml is missing" not in done.stderr


def test_one_run_at_a_time_in_a_folder(ground: Path, tmp_path: Path) -> None:
    raw = head(ground, tmp_path / "h")
    with lock.exclusive(tmp_path / "h", "run", cannot="N130", taken="N152"):
        assert code_of(raw) == "N152"
    cli.run(cfg.build(raw), progress=False, until=1)


def test_a_finished_run_keeps_one_last_evaluation(ground: Path, tmp_path: Path) -> None:
    conf = cfg.build(head(ground, tmp_path / "h"))
    first = cli.run(conf, progress=False)
    metrics = tmp_path / "h" / "metrics.jsonl"
    lines = metrics.read_text()
    assert lines.count('"evaluation"') == 1
    assert cli.run(conf, progress=False) == first
    assert metrics.read_text() == lines


def tree(kind: str, regions: str) -> dict[str, Any]:
    return {"kind": kind, "regions": regions}


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (tree("tree", "[[0,1],[2,3]]"), tree("tree", "[[0,2],[1,3]]")),
        ({"kind": "btree"}, {"kind": "btree", "shuffle": True}),
        (tree("tree", "balanced"), tree("region-graph", "[[0,3],[1,2]]")),
    ],
)
def test_init_of_another_circuit_is_refused(
    ground: Path, tmp_path: Path, there: dict[str, Any], here: dict[str, Any]
) -> None:
    old = cfg.build(head(ground, tmp_path / "old", head={"n": 4, "r": 2, **there}))
    made = CircuitHead(old.head, 258, 16)
    save_head(tmp_path / "old", old, made, None, 1)
    like = {k: tuple(v.shape) for k, v in made.tensors().items()}
    conf = head(ground, tmp_path / "new", head={"n": 4, "r": 2, **here}, init=old.out)
    other = CircuitHead(cfg.build(conf).head, 258, 16)
    assert like == {k: tuple(v.shape) for k, v in other.tensors().items()}
    assert code_of(conf) == "N112"
    conf["head"] = {"n": 4, "r": 2, **there}
    cli.run(cfg.build(conf), progress=False, until=1)


def test_equal_content_has_equal_bytes(tmp_path: Path) -> None:
    keys = [f"key{i}" for i in range(9)]
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int16)}
    for name, order in (("x", keys), ("y", keys[::-1])):
        meta = {k: f"{k} é \"quoted\"" for k in order}  # fmt: skip
        for i in range(4):  # the library draws another order each time
            files.write_tensors(tmp_path / f"{name}{i}", tensors, None, meta)
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    found, said = files.read_tensors(tmp_path / "x0")
    assert said == {k: f'{k} é "quoted"' for k in keys}
    assert all(torch.equal(found[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("text", ["[0, 99999999999]", "[[0, 1], [2, 4]]", "[0, -1]", "1000000000"])
def test_variables_beyond_n_make_no_masks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(tree: Any) -> Any:
        raise AssertionError(f"{tree} is built")

    monkeypatch.setattr(region_wiring, "from_nested", never)
    with pytest.raises(PccError, match="T102"):
        region_wiring.parse_regions(text, 4)
