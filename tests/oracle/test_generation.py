"""Published checkpoints with their verifiers, through sessions: the published greedy text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pcc
from pcc.runtime.measure import Autoregressive

Shared = Callable[[str], Path]
EVABYTE, LLAMA = "EvaByte-tiny-backbone", "Llama3-2-3B-IT-Byte-tiny-backbone"
VERIFIERS = {
    "evabyte-tiny-btree-n-6-r-4": EVABYTE,
    "evabyte-tiny-btree-n-8-r-4": EVABYTE,
    "evabyte-tiny-hmm-n-8-r-4": EVABYTE,
    "evabyte-tiny-lora-last-1-btree-n-8-r-4": EVABYTE,
    "llama-tiny-hmm-n-4-r-4": LLAMA,
    "nanogpt-tiny-cp-n-4-r-4": "nanogpt-tiny-cp-n-4-r-4",
}
LATENT = ("evabyte-tiny-lora-last-1-btree-n-8-r-4", "llama-tiny-hmm-n-4-r-4")


def text_of(shared: Shared, folder: str) -> tuple[list[int], list[int]]:
    told = json.loads((shared(f"oracle/checkpoints/{folder}") / "expected.json").read_text())
    return told["prompt"], told["ar_greedy_f32_tokens"]


def compiled(shared: Shared, folder: str, out: Path, **options: Any) -> Any:
    how = {"max_seq": 160, "chunk": 7, "queries": ["draft"], "validate": False} | options
    verifier = shared(f"oracle/checkpoints/{VERIFIERS[folder]}")
    source = shared(f"oracle/checkpoints/{folder}")
    return pcc.load(pcc.compile(source, verifier=verifier, out=out, **how).path, threads=1)


@pytest.mark.parametrize(
    ("folder", "mode"),
    [*((f, "max-product") for f in VERIFIERS), *((f, "latent-first") for f in LATENT)],
)
def test_greedy_text(folder: str, mode: str, shared: Shared, tmp_path: Path) -> None:
    """80 tokens, past EvaByte's window of 64; alone, and in a batch beside another prompt."""
    prompt, want = text_of(shared, folder)
    engine = compiled(shared, folder, tmp_path / "m.pcc", draft_mode=mode)
    assert engine.session(greedy=True).generate_ids(prompt, len(want)) == want
    beside = engine.session(greedy=True).generate_ids([prompt[:3], prompt], len(want))
    assert beside[1] == want
    plain, _ = Autoregressive(engine).generate(prompt[:3], len(want))
    assert beside[0] == plain


def test_a_verifier_drafts_with_its_own_heads(shared: Shared, tmp_path: Path) -> None:
    """EvaByte without a checkpoint of a head: slot 1 is head 0."""
    prompt, want = text_of(shared, "evabyte-tiny-btree-n-8-r-4")
    backbone = shared(f"oracle/checkpoints/{EVABYTE}")
    made = pcc.compile(
        None, verifier=backbone, out=tmp_path / "m.pcc", max_seq=160, queries=["draft"],
        validate=False,
    )  # fmt: skip
    engine = pcc.load(made.path, threads=1)
    assert engine.generation()["n"] == 8
    assert engine.session(greedy=True).generate_ids(prompt, len(want)) == want
