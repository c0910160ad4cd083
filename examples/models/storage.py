"""What storage costs: stored folders against the trained ones, on the same held-out bytes.

    python examples/models/storage.py .train        # TRAINED/backbone and TRAINED/heads/*

32 prompts of `heldout.npz`; bits per byte of the backbone at every byte, nats per byte of each
head's joint at 50 positions a prompt. Differences are paired, with 1.96 standard errors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcc.train import backbone as bb
from pcc.train.evaluate import half_width
from pcc.train.layout import read_head

HERE = Path(__file__).resolve().parent
HEADS = ("ff-n8", "cp-n8", "hmm-n8", "btree-n8", "btree-n8-lora")
Values = np.ndarray[Any, Any]


@torch.no_grad()
def losses(backbone: Path, heads: Path, rows: torch.Tensor) -> tuple[dict[str, Values], Values]:
    """Return each model's loss by sample, and the backbone's most likely bytes."""
    model = bb.load(backbone)
    found: dict[str, Values] = {}
    at = torch.arange(40, 240, 4)
    x = rows[:, at[:, None] + torch.arange(1, 9)].flatten(0, 1)
    below = model.states(rows, model.depth - 1)
    e = model.finish(below, model.depth - 1)
    logp = torch.log_softmax(model.lm_head(e[:, :-1]), -1)
    bits = -logp.gather(-1, rows[:, 1:, None])[..., 0].double() / np.log(2)
    found["backbone"] = bits.mean(1).numpy()
    for name in HEADS:
        head, draft = read_head(heads / name, model)
        features = (draft(below) if draft else e)[:, at].flatten(0, 1)
        found[name] = -head(features, x).double().mean(1).numpy()
    return found, logp.argmax(-1).numpy()


def main() -> int:
    """Print trained loss, stored loss and their difference."""
    trained = Path(sys.argv[1] if len(sys.argv) > 1 else ".train")
    rows = torch.from_numpy(np.load(HERE / "heldout.npz")["prompts"].astype(np.int64))[::8]
    before, first = losses(trained / "backbone", trained / "heads", rows)
    after, second = losses(HERE / "backbone", HERE, rows)
    print(f"most likely byte unchanged at {(first == second).mean():.2%} of positions")
    for name, values in before.items():
        change = after[name] - values
        print(f"{name}: {values.mean():.4f} -> {after[name].mean():.4f}, "
              f"{change.mean():+.4f} +- {half_width(change):.4f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
