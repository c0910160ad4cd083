"""Measure the shipped models on held-out text: quality, acceptance, what storage costs.

    python examples/models/evaluate.py    # writes examples/models/metrics.json
    python examples/models/evaluate.py --backbone .train/backbone --heads .train/heads --out x.json

256 held-out prompts (`heldout.npz`: BOS and 255 bytes, from a line's start) are continued greedily
by the compiled engine for 192 bytes; decoding with each head is replayed on that text in torch.
Accepted: drafted bytes of 7 per round, mean over prompts and 1.96 standard errors. float32, CPU.
NLL is measured twice, in nats per byte of 8-byte windows: on that text, and on the prompts
themselves (true text, from byte 64 on, a window every 4 bytes).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pcc
from pcc.frontends.state import find_model
from pcc.train import backbone as bb
from pcc.train import drafts
from pcc.train.evaluate import Acceptance, half_width
from pcc.train.files import write_json
from pcc.train.head import CircuitHead
from pcc.train.layout import read_head

HERE = Path(__file__).resolve().parent
HEADS = ("ff-n8", "cp-n8", "hmm-n8", "btree-n8", "btree-n8-lora")
BYTES, GRAM, ROWS, STRIDE, CONTEXT = 192, 8, 16, 4, 64


def mean_of(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return a mean and half its 95 % interval."""
    return {"mean": round(float(values.mean()), 4), "ci95": round(half_width(values), 4)}


def prompt_bits(texts: Acceptance) -> np.ndarray[Any, Any]:
    """Return -log2 p of each prompt's bytes, mean over its bytes, f64[B]."""
    model, rows = texts.model, []
    with torch.no_grad():
        for ids, h in texts.states(ROWS, model.depth - 1):
            e = model.finish(h[:, : texts.prompt - 1], model.depth - 1)
            logp = torch.log_softmax(model.lm_head(e), -1)
            rows.append(logp.gather(-1, ids[:, 1 : texts.prompt, None]).mean((1, 2)))
    return -torch.cat(rows).double().numpy() / np.log(2)


def repetition(texts: Acceptance) -> np.ndarray[Any, Any]:
    """Return the share of distinct 8-grams in each greedy text, f64[B]: low where it loops."""
    shares = []
    for row in texts.ids[:, texts.prompt :].tolist():
        grams = [tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)]
        shares.append(len(set(grams)) / len(grams))
    return np.array(shares)


@torch.no_grad()
def replayed(
    texts: Acceptance, head: CircuitHead, e: torch.Tensor, kind: str
) -> np.ndarray[Any, Any]:
    """Return accepted bytes per round of each prompt, f64[B]: the rounds of decoding, replayed.

    All prompts take their k-th round together; e [B,T,D] are the draft's features.
    """
    n, (count, length) = head.n, texts.ids.shape
    at, rounds, total = (np.full(count, v) for v in (texts.prompt - 1, 0, 0))
    while (live := np.flatnonzero(at < length - n)).size:
        start = torch.from_numpy(at[live])
        x = texts.ids[torch.from_numpy(live)[:, None], start[:, None] + torch.arange(1, n + 1)]
        made = drafts.draft(head, e[torch.from_numpy(live), start], x[:, 0], (kind,))[kind]
        right = (made == x)[:, 1:].long().cumprod(1).sum(1).numpy()
        rounds[live] += 1
        total[live] += right
        at[live] += right + 1
    return np.asarray(total / rounds)


def windows(low: int, high: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions t, i64[P], and their windows t+1..t+n, i64[P,n], all of them in low..high-1.

    The last known id of the first window is at `low` - 1.
    """
    at = torch.arange(low - 1, high - n, STRIDE)
    return at, at[:, None] + torch.arange(1, n + 1)


def measured(texts: Acceptance, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is reported of a head, and its NLL and accepted bytes by prompt."""
    head, draft = read_head(folder, texts.model)
    began, model = time.perf_counter(), texts.model
    own = windows(texts.prompt, texts.ids.shape[1], head.n)
    true = windows(CONTEXT + 1, texts.prompt, head.n)
    features, nll, of_prompts = [], [], []
    with torch.no_grad():
        for ids, h in texts.states(ROWS, model.depth - 1):
            e = draft(h) if draft else model.finish(h, model.depth - 1)
            features.append(e)
            for made, (at, window) in ((nll, own), (of_prompts, true)):
                found = -head(e[:, at].flatten(0, 1), ids[:, window].flatten(0, 1))
                made.append(found.view(len(ids), len(at), head.n))
    each, text, e = torch.cat(nll), torch.cat(of_prompts), torch.cat(features)
    slots = each.mean((0, 1))
    accepted = {k: replayed(texts, head, e, k) for k in ("stepwise", "max_product")}
    by_prompt = {
        "nll": each.mean((1, 2)).double().numpy(),
        "true_nll": text.mean((1, 2)).double().numpy(),
        **accepted,
    }
    report: dict[str, Any] = {
        "file_bytes": find_model(folder).stat().st_size,
        "nll_per_byte": mean_of(by_prompt["nll"]),
        "nll_of_slot": [round(float(v), 4) for v in slots],
        "true_text_nll_per_byte": mean_of(by_prompt["true_nll"]),
        "true_text_nll_of_slot": [round(float(v), 4) for v in text.mean((0, 1))],
        "accepted": {k: mean_of(v) for k, v in accepted.items()},
    }
    print(f"{folder.name}: {report} ({time.perf_counter() - began:.0f} s)", flush=True)
    return report, by_prompt


def greedy_texts(backbone: Path, head: Path, rows: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return prompts and greedy continuations, i64[B,T], by the compiled engine (any head will do).

    The engine's own mean of accepted bytes is printed: the replay below must come to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.pcc"
        pcc.compile(
            head, verifier=backbone, queries=("prefix",), max_seq=512, chunk=64,
            draft_mode="stepwise", out=out,
        )  # fmt: skip
        session = pcc.load(out).session(greedy=True)
        made, means = [], []
        for row in rows.tolist():
            made.append([*row, *session.generate_ids(row, BYTES)])
            means.append(session.stats["effective_k"])
    print(f"{head.name}: {np.mean(means):.3f} bytes accepted by the engine", flush=True)
    return torch.tensor(made)


def gains(
    first: dict[str, Any], own: dict[str, Any], share: np.ndarray[Any, Any],
    new: np.ndarray[Any, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return a head's means beside those of the first, and where texts are hard.

    All are by prompt, f64[B]: `share` of distinct 8-grams; `new`, where no shingle is known.
    """
    gain = first["true_nll"] - own["true_nll"]
    return {
        "stepwise_gain_over_ff": mean_of(own["stepwise"] - first["stepwise"]),
        "nll_gain_over_ff": mean_of(first["nll"] - own["nll"]),
        "stepwise_where_texts_do_not_loop": mean_of(own["stepwise"][share >= 0.5]),
        "stepwise_where_no_shingle_is_known": mean_of(own["stepwise"][new]),
        "nll_where_no_shingle_is_known": mean_of(own["nll"][new]),
        "true_text_nll_gain_over_ff": mean_of(gain),
        "true_text_nll_where_no_shingle_is_known": mean_of(own["true_nll"][new]),
        "true_text_nll_gain_where_no_shingle_is_known": mean_of(gain[new]),
    }


def main() -> int:
    """Measure and write; nothing is drawn at random."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, default=HERE / "backbone")
    parser.add_argument("--heads", type=Path, default=HERE)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "metrics.json")
    args = parser.parse_args()
    held = np.load(HERE / "heldout.npz")
    chosen = np.linspace(0, len(held["prompts"]) - 1, args.prompts).round().astype(int)
    rows, new = held["prompts"][chosen].astype(np.int64), held["shared"][chosen] == 0
    model = bb.load(args.backbone).requires_grad_(False)
    ids = greedy_texts(args.backbone, args.heads / HEADS[-1], rows)
    texts = Acceptance(model, ids, rows.shape[1], {})
    share = repetition(texts)
    card: dict[str, Any] = {
        "prompts": len(rows),
        "prompt_bytes": texts.prompt - 1,
        "greedy_bytes": BYTES,
        "true_text_windows": f"from byte {CONTEXT} on, every {STRIDE} bytes",
        "backbone": {
            "file_bytes": (args.backbone / "model.safetensors").stat().st_size,
            "bits_per_byte_of_prompts": mean_of(prompt_bits(texts)),
            "distinct_8_grams": mean_of(share),
        },
        "heads": {},
    }
    print(card, flush=True)
    first: dict[str, Any] = {}
    for name in HEADS:
        report, by_prompt = measured(texts, args.heads / name)
        first = first or by_prompt
        card["heads"][name] = report | gains(first, by_prompt, share, new)
    card["texts_that_do_not_loop"] = int((share >= 0.5).sum())
    card["prompts_without_known_shingles"] = int(new.sum())
    write_json(args.out, card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
