"""Names of GPU rows: bundles of other speed have other names; rows that there are keep theirs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt import stand_in
from verifiers import KINDS

import pcc
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.cli import bench_gpu
from pcc.cli.row_names import KERNELS, forms, mixture, name_of
from pcc.runtime.bound import with_yardstick

ROOT = Path(__file__).resolve().parents[1]
HOW: dict[str, Any] = {"max_seq": 128, "chunk": 8, "queries": ["draft"], "validate": False}

INT8 = (None, "head", "verifier", "all")
OLD = RUNTIMES["8.6"]


def about(path: Path) -> dict[str, Any]:
    """Return the entries that `pcc bench --gpu` would write of a bundle."""
    m = json.loads((path / "manifest.json").read_text())
    engine: Any = SimpleNamespace(manifest=m, generation=lambda: m["generation"])
    return bench_gpu.about_of(engine, bench_gpu.Asked((path,), "cuda", (64,), 5), "G", 1)


def test_rows_that_there_are_keep_their_names() -> None:
    rows = json.loads((ROOT / "benchmarks/results/h200.json").read_text())
    own = [r for r in rows if "graph" not in r and r["backend"] != "torch-cuda-graph"]
    assert own
    for r in own:
        found = name_of({"forms": [], **r}, r["context"])
        assert found == r["name"]


@pytest.mark.parametrize(
    ("head", "verifier", "said"),
    [
        ("bf16", "bf16", "bf16"),
        (None, "bf16", "bf16"),  # a head of trained tables is stored in none
        (None, None, "fp32"),
        ("bf16+int8", "bf16+int8", "bf16+int8"),
        ("fp32+int8", "fp32+int8", "fp32+int8"),
        ("bf16+int8", "bf16", "bf16, head int8"),
        ("bf16", "bf16+int8", "bf16, verifier int8"),
        (None, "fp16+int8", "fp16, verifier int8"),
        ("fp32+int8", None, "fp32, head int8"),
    ],
)
def test_whose_integers(head: str | None, verifier: str | None, said: str) -> None:
    stored = {"default": "fp32", "head": head, "verifier": verifier}
    assert mixture({k: v for k, v in stored.items() if v}) == said


def test_torch_in_half_stands_beside_every_mixture() -> None:
    same: dict[str, Any] = {k: 1 for k in ("shape", "architecture", "n", "r", "batch", "context")}
    torch = {**same, "backend": "torch-cuda-graph", "precision": "bf16", "round_ms": 8.0}
    for precision, ms in (
        ("bf16, head int8", 8.0), ("fp16, verifier int8", 8.0), ("fp32, head int8", None),
    ):  # fmt: skip
        row = {**same, "backend": "pcc-cuda", "precision": precision}
        assert with_yardstick([row, torch])[0]["torch_graph_ms"] == ms


def test_bundles_of_one_head_have_names_of_their_own(tmp_path: Path) -> None:
    """Every choice of integers, of sampled drafts, of truncation: compiled, not made up."""
    source, model = KINDS["llama"](tmp_path / "model")
    names = []
    hows: list[dict[str, Any]] = [
        *({"int8": x, "truncation": t} for x, t in product(INT8, (False, True))),
        {"proposal": "latent-first", "truncation": False},
    ]  # fmt: skip
    for k, how in enumerate(hows):
        made = pcc.compile(source, verifier=model, out=tmp_path / f"{k}.pcc", **HOW, **how)
        names.append(name_of(about(made.path), 64))
    assert len(set(names)) == len(hows)
    tails = [name.partition("-b1-c64-")[2] for name in names]
    assert tails == [
        "fp32", "fp32-truncation", "fp32-head-int8", "fp32-head-int8-truncation",
        "fp32-verifier-int8", "fp32-verifier-int8-truncation", "fp32+int8", "fp32+int8-truncation",
        "fp32-latent-first",
    ]  # fmt: skip


def test_engines_of_other_forms_have_names_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    source, model = KINDS["llama"](tmp_path / "model")
    made: dict[str, dict[str, Any]] = {}
    for k, engine in enumerate(({}, {"profiles": True}, {"profiles": True, "level": 1})):
        out = tmp_path / f"{k}.pcc"
        stand_in(monkeypatch, OLD, out)
        pcc.compile(source, verifier=model, out=out, target=OLD.target, engine=engine, **HOW)
        entry = about(out)
        made[name_of(entry, 64)] = entry
    assert [e["forms"] for e in made.values()] == [[], ["profiles"], ["profiles", "level=1"]]
    assert [n.rpartition("-fp32")[2] for n in made] == ["", "-profiles", "-profiles-level=1"]
    assert {e["backend"] for e in made.values()} == {OLD.target}


def test_what_lies_elsewhere_is_no_form(tmp_path: Path) -> None:
    """Each option that chooses kernels is named; a list of all of them would name files, too."""
    plain = BuildOptions().document()
    others: dict[str, Any] = {
        "profiles": True, "refit": "refit", "version_compatible": True, "hardware": "same",
        "level": 5, "workspace": 1 << 20,
    }  # fmt: skip
    assert set(others) == set(KERNELS)
    base = {"generation": {"proposal": "full"}, "queries": {"step": {"inputs": []}}}
    for name, value in (*others.items(), ("keep_onnx", False), ("timings", "t"), ("only", "step")):
        found = forms({**base, "variants": [{"options": {**plain, name: value}}]})
        assert len(found) == (name in KERNELS)
        assert all(name in word for word in found)
