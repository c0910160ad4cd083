"""Random weights of true shape: sizes, determinism, the bundles they make, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcc
from pcc.errors import PccError
from pcc.ir.core import postorder
from pcc.ir.noise import PERIOD, Noise
from pcc.models.load import load_model
from pcc.shapes import SHAPES, Synthetic, dictionary, synthetic
from pcc.tensor.ops import Const


def sizes(root: Any) -> int:
    return sum(n.value.size for n in postorder(root) if isinstance(n, Const))


@pytest.mark.parametrize(
    ("shape", "body"), [("evabyte-6.5b", 6.48e9), ("byte-llama-3.2-3b", 2.82e9)]
)
def test_bodies_have_the_published_size(shape: str, body: float) -> None:
    model: Any = load_model(Synthetic(shape), max_rows=64)
    matrices = [x for y in model.layers for x in (y.qkv, y.out, y.gate_up, y.down)]
    assert sum(x.value.size for x in matrices) == pytest.approx(body, rel=3e-3)
    assert all(x.value.recipe is not None for x in matrices)
    assert model.vocab == SHAPES[shape]["vocab_size"]


@pytest.mark.parametrize(
    ("text", "emissions", "sums"),
    [
        ("ff,n=16", 21e6, 0), ("cp,n=16,r=32", 671e6, 0.13e6), ("hmm,n=16,r=32", 671e6, 63.0e6),
        ("btree,n=16,r=32", 671e6, 58.9e6),
    ],
)  # fmt: skip
def test_heads_have_the_published_size(text: str, emissions: float, sums: float) -> None:
    head = Synthetic("evabyte-6.5b").head(text)
    total = sizes(head.root)
    assert total == pytest.approx(emissions + sums, rel=4e-3)
    assert head.inputs()["context"].shape == (4096,)


def test_numbers_are_normal_and_depend_on_seed_and_name() -> None:
    x = Noise(0, "a", 0.5).read("f32", 0, 100_000)
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(0.5, rel=0.02)
    assert np.array_equal(x[70:90], Noise(0, "a", 0.5).read("f32", 70, 90))
    assert not np.array_equal(x[:100], Noise(1, "a", 0.5).read("f32", 0, 100))
    assert not np.array_equal(x[:100], Noise(0, "b", 0.5).read("f32", 0, 100))
    wrapped = Noise(0, "a", 0.5).read("f16", PERIOD - 5, PERIOD + 5)
    assert np.array_equal(wrapped[5:], Noise(0, "a", 0.5).read("f16", 0, 5))
    assert np.array_equal(Noise(0, "a", 0.5).read("f16", 3, 9), x[3:9].astype(np.float16))


def test_no_two_rows_of_a_matrix_are_equal() -> None:
    assert all(PERIOD % d for d in range(2, math.isqrt(PERIOD) + 1))  # a prime
    rows = Noise(0, "m", 1.0).read("f32", 0, 5000 * 1024).reshape(5000, 1024)
    assert len({r.tobytes() for r in rows}) == 5000


def compiled(out: Path, shape: str, head: str | None, **how: Any) -> Path:
    options = {"max_seq": 128, "chunk": 8, **how}
    return pcc.compile(None, shape=shape, head=head, out=out, **options).path


@pytest.mark.parametrize(
    ("shape", "head"),
    [("evabyte-tiny", None), ("evabyte-tiny", "btree,n=5,r=3"), ("byte-llama-tiny", "hmm,n=4,r=2")],
)
def test_bundles_generate_and_are_right(shape: str, head: str | None, tmp_path: Path) -> None:
    path = compiled(tmp_path / "m.pcc", shape, head)
    report = pcc.verify(path)
    assert report.ok, [c for c in report.checks if not c.ok]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["verifier"]["synthetic"] == {"shape": shape, "seed": 0}
    assert set(manifest["queries"]) == {
        "step", "step_greedy", "prefill", "prefill_greedy", "verify", "decode"
    }  # fmt: skip
    text = pcc.load(path).session(greedy=True).generate(b"abc", max_new_bytes=8)
    assert len(text.bytes) == 8


def test_a_seed_makes_a_bundle(tmp_path: Path) -> None:
    made = [
        compiled(tmp_path / f"{i}.pcc", "evabyte-tiny", "cp,n=3,r=2", seed=seed)
        for i, seed in enumerate((4, 4, 5))
    ]
    files = [json.loads((p / "manifest.json").read_text())["files"] for p in made]
    assert files[0] == files[1]
    assert files[0]["graphs/weights.bin"] != files[2]["graphs/weights.bin"]


def test_queries_are_made_where_they_are_asked_for(tmp_path: Path) -> None:
    path = compiled(tmp_path / "m.pcc", "evabyte-tiny", "cp,n=3,r=2", queries=["loglik"])
    assert "loglik" in json.loads((path / "manifest.json").read_text())["queries"]


def test_latent_first_drafts_select_rows_that_are_not_in_memory(tmp_path: Path) -> None:
    how = {"proposal": "latent-first", "draft_mode": "latent-first"}
    assert pcc.verify(compiled(tmp_path / "m.pcc", "evabyte-tiny", "btree,n=4,r=3", **how)).ok


def test_a_dictionary_has_every_byte_and_no_key_twice() -> None:
    words, alone = dictionary(3000, 5, 1)
    keys = [tuple(map(int, k.split(","))) for k in words]
    assert alone == []
    assert len(set(keys)) == len(keys) == 3000
    assert {k[0] for k in keys if len(k) == 1} == set(range(1, 257))
    assert max(map(len, keys)) == 5
    assert sorted(words.values()) == list(range(1, 3001))


@pytest.mark.parametrize(
    ("shape", "head", "seed", "others", "code"),
    [
        ("evabyte-7b", None, 0, (), "M160"),
        ("evabyte-tiny", None, -1, (), "M160"),
        ("evabyte-tiny", "cp", 0, (), "M161"),
        ("evabyte-tiny", "cp,n=1,r=2", 0, (), "M161"),
        ("evabyte-tiny", "cp,n=4,r=0", 0, (), "M161"),
        ("evabyte-tiny", "cp,n=4,r=99999", 0, (), "M161"),
        ("evabyte-tiny", "ff,n=4,r=2", 0, (), "M161"),
        ("evabyte-tiny", "tree,n=4,r=2", 0, (), "M161"),
        (None, "cp,n=4,r=2", 0, (), "M162"),
        ("evabyte-tiny", None, 0, ("a source", None), "M162"),
        ("evabyte-tiny", None, 0, (None, "a verifier"), "M162"),
    ],
)
def test_what_is_refused(shape: Any, head: Any, seed: int, others: Any, code: str) -> None:
    with pytest.raises(PccError) as e:
        synthetic(shape, head, seed, *others)
    assert e.value.code == code
    assert e.value.hint or code == "M160"


def test_a_shape_without_heads_of_its_own_needs_one(tmp_path: Path) -> None:
    with pytest.raises(PccError, match="M153"):
        compiled(tmp_path / "m.pcc", "byte-llama-tiny", None)


def test_the_command_line_takes_a_shape(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pcc.cli import app

    out = str(tmp_path / "m.pcc")
    options = ["--shape", "evabyte-tiny", "--head", "cp,n=3,r=2", "--seed", "3", "--max-seq", "64"]
    done = CliRunner().invoke(app, ["compile", "-o", out, "--json", *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verifier"]["synthetic"] == {"shape": "evabyte-tiny", "seed": 3}
    wrong = CliRunner().invoke(app, ["compile", "-o", out, "--shape", "none"])
    assert wrong.exit_code != 0
