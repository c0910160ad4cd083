"""The models of `examples/models`: they load, agree with torch, compile, and draft losslessly."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import Runner, state_of

import pcc
from pcc.frontends.provenance import backbone_of
from pcc.frontends.scaled import dequantise
from pcc.frontends.state import read_header, read_tensor
from pcc.models.load import load_model
from pcc.runtime.measure import Autoregressive
from pcc.train import backbone as bb
from pcc.train.layout import read_head

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"
BACKBONE = MODELS / "backbone"
BEST = "btree-n8-lora"
OTHERS = ("ff-n8", "cp-n8", "hmm-n8", "btree-n8")
LIMIT = 15_000_000  # bytes of all shipped models together
# Of the numbers, not of the files: they are those that the card's tables were measured with, then
# read from files of packed rows.
NUMBERS = {
    "backbone": "997ef26092c8770bd021f62543846ae265fc9e418e2e55439395ada2fa0ce465",
    "ff-n8": "ca26692a5d4352aff6202e3b3db032ceb33d26a9110c7d638f1b25bbbaa1981e",
    "cp-n8": "b70d656fed545e7c15062a73d54a4b8542fc6617b9a5ff2aeb84981cba7e1237",
    "hmm-n8": "2614e0ee3ad8bd93e7bfa3b8903b16a800281f0f6e18d7774551033cc20bad07",
    "btree-n8": "00b6c2085302351832fc71ab4c428f2dfc5990bf9a7cee2c465dc6c0fd9d381f",
    "btree-n8-lora": "9cc2a7cf373865548cfecef467e8b924d612328a1d2403fffb0e9d2ce930b6e2",
}


def prompts(count: int, length: int = 256) -> np.ndarray[Any, Any]:
    """Return held-out prompts [count,length] spread over the file, each from BOS on."""
    rows = np.load(MODELS / "heldout.npz")["prompts"]
    return rows[:: len(rows) // count][:count, :length].astype(np.int64)


@pytest.fixture(scope="module")
def backbone() -> bb.Backbone:
    return bb.load(BACKBONE).requires_grad_(False)


def built(name: str, folder: Path) -> Path:
    """Compile one head beside the backbone with one query."""
    out = folder / f"{name}.pcc"
    pcc.compile(
        MODELS / name, verifier=BACKBONE, queries=("prefix",), max_seq=512, chunk=64,
        draft_mode="stepwise", out=out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(BEST, tmp_path_factory.mktemp("shipped"))


def agrees_with_torch(bundle: Path, name: str, backbone: bb.Backbone) -> None:
    """Log q(x_i | x_<i) of compiled and torch circuit, 1e-5 of the largest, on real features."""
    head, draft = read_head(MODELS / name, backbone)
    ids = torch.from_numpy(prompts(4, 64))
    with torch.no_grad():
        shared = backbone.states(ids, draft.start if draft else None)
        h = draft(shared) if draft else backbone.finish(shared, backbone.depth)
        at = torch.arange(7, 55, 8)
        e = h[:, at].flatten(0, 1)
        x = ids[:, at[:, None] + torch.arange(1, 9)].flatten(0, 1)
        want = head(e, x).numpy()
    got = pcc.load(bundle).run("prefix", x=x.numpy(), context=e.numpy())["log_cond"]
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())
    assert want.mean() > -3.0  # on human text; weights of another backbone would give -5.5


def drafts_losslessly(bundle: Path) -> None:
    """Greedy text with drafts is the text without, up to ties; drafts are of use."""
    engine, count, accepted = pcc.load(bundle, threads=1), 48, []
    rows = prompts(3, 128).tolist()
    session = engine.session(greedy=True)
    for row in rows:
        got = session.generate_ids(row, count)
        want, gaps = Autoregressive(engine).generate(row, count)
        differ = np.flatnonzero(np.array(got) != np.array(want))
        assert not len(differ) or gaps[differ[0]] < 1e-3
        accepted.append(session.stats["effective_k"])
    assert np.mean(accepted) > 1.5


def test_circuit_and_features_of_the_best(best: Path, backbone: bb.Backbone) -> None:
    agrees_with_torch(best, BEST, backbone)
    model = load_model(BACKBONE, max_rows=64, lora=MODELS / BEST)
    ids = prompts(2, 16)
    out = Runner(model, 64, 24)(ids, np.zeros(2, np.int64), state_of(model, 64, 2))
    _, draft = read_head(MODELS / BEST, backbone)
    assert draft is not None
    with torch.no_grad():
        shared = backbone.states(torch.from_numpy(ids), draft.start)
        want = {"draft_hidden": draft(shared), "hidden": backbone.finish(shared, draft.start)}
        want["logits"] = backbone.lm_head(want["hidden"])
    for key, value in want.items():
        assert np.abs(out[key] - value.numpy()).max() <= 2e-5 * float(value.abs().max()), key


def test_the_best_drafts_losslessly(best: Path) -> None:
    drafts_losslessly(best)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_head(name: str, tmp_path: Path, backbone: bb.Backbone) -> None:
    bundle = built(name, tmp_path)
    agrees_with_torch(bundle, name, backbone)
    drafts_losslessly(bundle)
    assert pcc.verify(bundle).ok


@pytest.mark.slow
def test_verify_the_best(best: Path) -> None:
    assert pcc.verify(best).ok


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_are_those_that_were_measured(name: str) -> None:
    (path,) = (MODELS / name).glob("*.safetensors")
    base, entries = read_header(path)
    named = dequantise({k: read_tensor(path, base, *e) for k, e in entries.items()}, name)
    lines = [
        f"{k} {v.dtype} {v.shape} {hashlib.sha256(v.tobytes()).hexdigest()}\n"
        for k, v in sorted(named.items())
    ]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == NUMBERS[name]


@pytest.mark.parametrize("name", [BEST, *OTHERS])
def test_heads_name_the_backbone_that_ships(name: str) -> None:
    assert backbone_of(MODELS / name, BACKBONE) == "matches"


def test_sizes() -> None:
    files = [p for p in MODELS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {BEST, "backbone", *OTHERS} <= {p.parent.name for p in files}
    assert sum(p.stat().st_size for p in files) < LIMIT
