"""Verifiers stored in half precision: what is rounded, what is not, and how far logits move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_runs import Runner, state_of
from verifiers import byte_llama, evabyte, gpt, llama

from pcc.conformance.verifiers import lora
from pcc.errors import PccError
from pcc.ir.core import postorder, tensor
from pcc.ir.types import HALVES
from pcc.models.base import Factored, Scaled, constant
from pcc.models.decoder import Decoder
from pcc.models.load import load_model
from pcc.models.precision import in_precision
from pcc.targets import HALF_OF
from pcc.tensor import nn
from pcc.tensor import ops as t

FOLDERS = {"llama": llama, "evabyte": evabyte, "byte-llama": byte_llama, "gpt": gpt}
ROWS = 48
LIMIT = {"fp16": 2e-3, "bf16": 1.6e-2}  # of logits, relative to the largest: 2 to 4 units


def both(kind: str, tmp_path: Path, precision: str) -> tuple[Any, Any]:
    folder = FOLDERS[kind](tmp_path)
    folder = folder[1] if isinstance(folder, tuple) else folder
    return (load_model(folder, max_rows=ROWS),
            load_model(folder, max_rows=ROWS, precision=precision))  # fmt: skip


def run_two_passes(model: Any) -> np.ndarray[Any, Any]:
    runner, ids = Runner(model, ROWS), np.random.default_rng(0).integers(0, model.vocab, (1, 7))
    state = state_of(model, ROWS, 1)
    first = runner(ids[:, :4], np.array([0]), state)
    state = {k.removeprefix("present."): v for k, v in first.items() if k.startswith("present.")}
    return np.concatenate([first["logits"], runner(ids[:, 4:], np.array([4]), state)["logits"]], 1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_matrices_and_caches_are_halves_and_logits_stay(
    kind: str, precision: str, tmp_path: Path
) -> None:
    wide, narrow = both(kind, tmp_path, precision)
    dtype = HALF_OF[precision]
    assert {s.dtype for s in narrow.states(ROWS)} <= {dtype, "i64"}
    runner = Runner(narrow, ROWS)
    runner(np.zeros((1, 2), np.int64), np.array([0]), state_of(narrow, ROWS, 1))
    module, _ = runner.made[2]
    for n in postorder(*module.roots):
        if isinstance(n, t.Const) and tensor(n).dtype in HALVES:
            assert tensor(n).dtype == dtype
            assert len(tensor(n).shape) == 2
        if isinstance(n, t.Contract):
            assert tensor(n.b).dtype == dtype  # every product of the model
    want, got = run_two_passes(wide), run_two_passes(narrow)
    error = float(np.abs(got - want).max()) / float(np.abs(want).max())
    assert 1e-7 < error < LIMIT[precision]


# Of logits, relative to the largest: an entry is off by 1 % of a usual one, at random.
INTEGERS = {"fp32": 0.05, "fp16": 0.05, "bf16": 0.06}


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_matrices_of_layers_are_integers_and_logits_stay(
    kind: str, precision: str, tmp_path: Path
) -> None:
    folder = FOLDERS[kind](tmp_path)
    folder = folder[1] if isinstance(folder, tuple) else folder
    wide = load_model(folder, max_rows=ROWS)
    narrow = load_model(folder, max_rows=ROWS, precision=precision, int8=True)
    dtype = HALF_OF[precision]
    assert {s.dtype for s in narrow.states(ROWS)} <= {dtype, "i64"}
    runner = Runner(narrow, ROWS)
    runner(np.zeros((1, 2), np.int64), np.array([0]), state_of(narrow, ROWS, 1))
    nodes = list(postorder(*runner.made[2][0].roots))
    scaled = [n for n in nodes if isinstance(n, t.ScaledContract)]
    assert len(scaled) == 4 * len(getattr(narrow, "layers", None) or narrow.blocks)
    assert {n.dtype for n in scaled} == {dtype}
    logits = [n for n in nodes if isinstance(n, t.Contract)]
    assert [tensor(n.b).dtype for n in logits] == [dtype]  # the output matrix alone
    tables = [n for n in nodes if isinstance(n, nn.Embedding)]
    assert all(tensor(n.table).dtype == dtype for n in tables)
    want, got = run_two_passes(wide), run_two_passes(narrow)
    error = float(np.abs(got - want).max()) / float(np.abs(want).max())
    assert 1e-4 < error < INTEGERS[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_stay_as_they_are_beside_integers(precision: str, tmp_path: Path) -> None:
    source, folder = lora(tmp_path)
    narrow = load_model(folder, max_rows=ROWS, lora=str(source), precision=precision, int8=True)
    assert isinstance(narrow, Decoder)
    adapted = [w for x in narrow.draft for w in (x.qkv, x.out, x.gate_up, x.down)
               if isinstance(w, Factored)]  # fmt: skip
    assert adapted
    assert all(isinstance(w.full, Scaled) for w in adapted)
    assert {tensor(x).dtype for w in adapted for x in (w.a, w.b)} == {HALF_OF[precision]}
    for own, shared in zip(narrow.draft, narrow.layers[-len(narrow.draft) :], strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            if isinstance(w := getattr(own, name), Factored):
                assert w.full == getattr(shared, name)  # one array for both


def test_an_infinite_weight_is_named(tmp_path: Path) -> None:
    model = load_model(llama(tmp_path)[1], max_rows=ROWS)
    w = model.layers[1].down.value.value.copy()
    w[2, 3] = np.inf
    broken = replace(model, layers=(model.layers[0], replace(model.layers[1], down=constant(w))))
    with pytest.raises(PccError, match=r"E107.*layers\.1\.down|layers\.1\.down.*E107"):
        in_precision(broken, "f32", int8=True)


def test_fp32_is_the_model_itself(tmp_path: Path) -> None:
    wide, _ = both("llama", tmp_path, "fp16")
    assert in_precision(wide, "f32") is wide


def test_a_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    wide, _ = both("llama", tmp_path, "fp16")
    table = wide.embedding.value.value.copy()
    table[3, 1] = 1e5
    with pytest.raises(PccError, match=r"E107.*embedding|embedding.*E107"):
        in_precision(replace(wide, embedding=constant(table)), "f16")
    in_precision(replace(wide, embedding=constant(table.copy())), "bf16")
