"""EvaByte: the published values, passes of any width across window edges, rollback, its ops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_models import eva_rows, features, read_folder
from graphs import Compiled, agree
from model_runs import Runner, close, follow, in_passes, state_of

from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.models.evabyte import EvaByte
from pcc.models.load import load_model
from pcc.tensor import eva
from pcc.tensor import ops as t

Shared = Callable[[str], Path]
BACKBONE = "oracle/checkpoints/EvaByte-tiny-backbone"
FOLDERS = ("evabyte-tiny-btree-n-8-r-4", "evabyte-tiny-hmm-n-8-r-4", "evabyte-tiny-btree-n-6-r-4")
ROWS = 256


@pytest.fixture(scope="module")
def model(shared: Shared) -> EvaByte:
    found = load_model(shared(BACKBONE), max_rows=ROWS)
    assert isinstance(found, EvaByte)
    return found


@pytest.fixture(scope="module", params=[None, 24, 17], ids=["float64", "opset24", "opset17"])
def runner(model: EvaByte, request: pytest.FixtureRequest) -> Runner:
    return Runner(model, ROWS, request.param)


def expected(shared: Shared, name: str) -> tuple[dict[str, Any], Any]:
    folder = shared(f"oracle/checkpoints/{name}")
    with np.load(folder / "expected_first_round.npz") as file:
        return json.loads((folder / "expected.json").read_text()), dict(file)


@pytest.mark.parametrize("name", FOLDERS)
def test_published_hidden_states_and_logits(runner: Runner, shared: Shared, name: str) -> None:
    _, want = expected(shared, name)
    ids = want["prompt"].astype(np.int64)
    out = runner(ids[None], np.array([0]), state_of(runner.model, ROWS, 1))
    close(out["hidden"][0], want["base_hidden_f32"], want["base_logits_f32"])
    close(out["logits"][0], want["base_logits_f32"])


@pytest.mark.parametrize(
    "widths",
    [[150], [60, 8, 60, 8, 14], [7] * 21 + [3], [63, 1, 1, 63, 1, 21], [1, 130, 19]],
    ids=lambda w: "-".join(map(str, w[:3])),
)
def test_passes_of_any_width_cross_window_edges(
    runner: Runner, shared: Shared, widths: list[int]
) -> None:
    config, weights = read_folder(shared(BACKBONE))
    ids = np.random.default_rng(0).integers(0, 320, 150)
    hidden, logits = features(config, weights, ids)
    # Old keys and summaries that nothing may read hold large numbers.
    got = in_passes(runner, ids[None], widths, state_of(runner.model, ROWS, 1, fill=30.0))
    close(got["hidden"][0], hidden, logits)
    close(got["logits"][0], logits)


@pytest.mark.parametrize("name", FOLDERS[:1])
@pytest.mark.parametrize("width", [1, 8])
def test_greedy_text_is_reproduced(model: EvaByte, shared: Shared, name: str, width: int) -> None:
    greedy_text(Runner(model, ROWS, 24), expected(shared, name)[0], width)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("width", [1, 3, 8, 16])
def test_all_greedy_texts(runner: Runner, shared: Shared, name: str, width: int) -> None:
    greedy_text(runner, expected(shared, name)[0], width)


def greedy_text(run: Runner, told: dict[str, Any], width: int) -> None:
    prompt, text = told["prompt"], told["ar_greedy_f32_tokens"]
    assert follow(run, np.array([*prompt, *text]), len(prompt), width, 320) == text


def test_rows_of_a_batch_do_not_meet(model: EvaByte) -> None:
    run, rng = Runner(model, ROWS, 24), np.random.default_rng(3)
    ids, length = rng.integers(0, 320, (3, 8)), np.array([0, 61, 130])
    state = state_of(model, ROWS, 3, fill=1.0, seed=5)
    whole = run(ids, length, state)
    for i in range(3):
        alone = run(ids[i : i + 1], length[i : i + 1], {k: v[i : i + 1] for k, v in state.items()})
        for key, value in alone.items():
            np.testing.assert_allclose(value[0], whole[key][i], rtol=2e-5, atol=2e-5)


def test_the_heads_begin_with_the_verifier(model: EvaByte) -> None:
    assert isinstance(model.heads, t.Const)
    assert isinstance(model.head, t.Const)
    assert model.heads.value.shape == (8, 320, 16)
    assert np.array_equal(model.heads.value.value[0].T, model.head.value.value)
    assert model.vocabulary.byte_offset == 64


def test_rings_are_bounded_and_too_wide_a_pass_is_refused(model: EvaByte) -> None:
    shapes = {s.name: s.shape for s in model.states(4096)}
    assert shapes["key.0"] == (2, 64 + model.span, 8)
    assert shapes["summary_value.2"] == (2, 257, 8)
    run = Runner(model, 4096)
    ids, state = np.zeros((1, model.span + 1), np.int64), state_of(model, 4096, 1)
    with pytest.raises(PccError, match="M112"):
        run(ids, np.array([0]), state)


def test_a_ring_that_wraps_keeps_what_is_read(shared: Shared) -> None:
    found = load_model(shared(BACKBONE), max_rows=ROWS)
    assert isinstance(found, EvaByte)
    small = replace(found, span=16)  # rings of 80 rows for 256 positions
    config, weights = read_folder(shared(BACKBONE))
    ids = np.random.default_rng(1).integers(0, 320, 240)
    hidden, logits = features(config, weights, ids)
    for opset in (None, 24, 17):
        run, state = Runner(small, ROWS, opset), state_of(small, ROWS, 1, fill=30.0)
        got = in_passes(run, ids[None], [16, 11, 16, 5] * 5, state)
        close(got["hidden"][0], hidden, logits)


def test_a_ring_that_is_too_short_is_noticed(shared: Shared) -> None:
    """What the bound on a pass prevents: keys that are overwritten before they are read."""
    found = load_model(shared(BACKBONE), max_rows=ROWS)
    assert isinstance(found, EvaByte)
    broken = replace(found, span=4)
    object.__setattr__(broken, "forward", lambda *a: super(EvaByte, broken).forward(*a))
    config, weights = read_folder(shared(BACKBONE))
    ids = np.random.default_rng(1).integers(0, 320, 240)
    hidden, _ = features(config, weights, ids)
    state = state_of(broken, ROWS, 1)
    got = in_passes(Runner(broken, ROWS), ids[None], [8, *[16] * 14, 8], state)
    assert np.abs(hidden - got["hidden"][0]).max() > 1e-2


# ---------------------------------------------------------------- ops


def inputs(**shapes: tuple[int, ...]) -> dict[str, t.Input]:
    kinds = {"start": "i64"}
    return {k: t.Input(k, kinds.get(k, "f32"), "b", s) for k, s in shapes.items()}


def test_ring_ops_in_float64_and_onnx() -> None:
    x = inputs(ring=(3, 10, 2), new=(3, 4, 2), start=())
    written = eva.RingWrite(x["ring"], x["new"], x["start"])
    chunks = eva.RingChunks(written, x["start"], 2, 3)
    module = Module("ring", (), (("written", written), ("chunks", chunks)))
    rng, start = np.random.default_rng(0), np.array([0, 5, 8, 27])
    feed = {"ring": rng.normal(size=(4, 3, 10, 2)), "new": rng.normal(size=(4, 3, 4, 2))}
    feed = {k: v.astype(np.float32) for k, v in feed.items()} | {"start": start}
    want = feed["ring"].copy()
    for b, first in enumerate(start):
        for i in range(4):
            want[b, :, (first + i) % 10] = feed["new"][b, :, i]
    parts = [
        [[want[b, :, (first // 2 * 2 + 2 * c + m) % 10] for m in range(2)] for c in range(3)]
        for b, first in enumerate(start)
    ]
    told = {"written": want, "chunks": np.array(parts).transpose(0, 3, 1, 2, 4)}
    for opset in (24, 17):
        compiled = Compiled(module, opset=opset)
        for name, value in compiled(feed).items():
            agree(told[name], value)
            agree(told[name], compiled.meaning(feed)[name])


def test_eva_attention_op_in_float64_and_onnx() -> None:
    rng, count, sizes = np.random.default_rng(0), 23, {"window_size": 8, "chunk_size": 4}
    q, k, v = (rng.normal(size=(2, count, 6)).astype(np.float32) for _ in range(3))
    mu, phi = rng.normal(size=(2, 2, 6)).astype(np.float32)
    want = eva_rows(*(a.astype(np.float64) for a in (q, k, v, mu, phi)), sizes)
    x = inputs(q=(2, 5, 6), k=(2, 14, 6), v=(2, 14, 6), sk=(2, 7, 6), sv=(2, 7, 6), start=())
    op = eva.EvaAttention(*x.values(), 6**-0.5, 8, 4)
    starts = np.array([0, 3, 6, 14, 18])
    feed: dict[str, Any] = {"start": starts}
    for name, value in (("k", k), ("v", v)):
        rings = rng.normal(size=(5, 2, 14, 6)) * 50
        for b, first in enumerate(starts):
            for p in range(max(0, first + 5 - 14), first + 5):
                rings[b, :, p % 14] = value[:, p]
        feed[name] = rings.astype(np.float32)
    feed["sk"], feed["sv"] = (rng.normal(size=(5, 2, 7, 6)).astype(np.float32) * 50 for _ in "kv")
    for c in range(count // 4):
        ks, vs = k[:, 4 * c : 4 * c + 4], v[:, 4 * c : 4 * c + 4]
        e = np.exp(np.einsum("hmd,hd->hm", ks, mu))
        feed["sk"][:, :, c] = np.einsum("hm,hmd->hd", e / e.sum(1, keepdims=True), ks)
        e = np.exp((np.einsum("hmd,hd->hm", ks, phi) - (ks**2).sum(-1) / 2) * 6**-0.5)
        feed["sv"][:, :, c] = np.einsum("hm,hmd->hd", e / e.sum(1, keepdims=True), vs)
    feed["q"] = np.stack([q[:, s : s + 5] for s in starts])
    told = np.stack([want[:, s : s + 5] for s in starts])
    for opset in (24, 17):
        compiled = Compiled(Module("eva", (), (("y", op),)), opset=opset)
        agree(told, compiled(feed)["y"], tolerance=1e-5)
        agree(told, compiled.meaning(feed)["y"], tolerance=1e-5)


def test_ops_in_the_text_form() -> None:
    x = inputs(q=(2, 4, 6), k=(2, 14, 6), v=(2, 14, 6), sk=(2, 7, 6), sv=(2, 7, 6), start=())
    ring, start = eva.RingWrite(x["k"], x["q"], x["start"]), x["start"]
    outputs = {
        "y": eva.EvaAttention(x["q"], ring, x["v"], x["sk"], x["sv"], start, 6**-0.5, 8, 4),
        "chunks": eva.RingChunks(ring, start, 4, 2),
    }
    m = Module("m", (), tuple(outputs.items()))
    again = parse(show(m), resources=resources(m))
    assert all(a is b for a, b in zip(again.roots, m.roots, strict=True))


def test_ops_refuse_what_does_not_fit() -> None:
    x = inputs(ring=(2, 10, 4), new=(2, 4, 4), wide=(2, 11, 4), other=(3, 4, 4), start=())
    with pytest.raises(PccError, match="E110"):
        eva.RingWrite(x["ring"], x["wide"], x["start"])
    with pytest.raises(PccError, match="E110"):
        eva.RingWrite(x["ring"], x["other"], x["start"])
    with pytest.raises(PccError, match="E111"):
        eva.RingChunks(x["ring"], x["start"], 11, 1)
    q, ring, s = x["new"], x["ring"], x["start"]
    with pytest.raises(PccError, match="E111"):
        eva.EvaAttention(q, ring, ring, q, q, s, 1.0, 8, 3)
    with pytest.raises(PccError, match="E110"):
        eva.EvaAttention(q, ring, ring, q, x["other"], s, 1.0, 8, 4)
    zero = t.Const(Array.of(np.zeros((), np.float32)))
    with pytest.raises(PccError, match="E110"):
        eva.EvaAttention(q, ring, ring, q, q, zero, 1.0, 8, 4)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [("chunk_size", 15, "M108"), ("num_key_value_heads", 1, "M108"), ("num_pred_heads", 7, "M105")],
)
def test_a_wrong_configuration_is_refused(
    shared: Shared, tmp_path: Path, key: str, value: int, code: str
) -> None:
    source = shared(BACKBONE)
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(PccError, match=code):
        load_model(tmp_path, max_rows=ROWS)
