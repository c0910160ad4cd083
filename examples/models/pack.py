"""Make the shipped folders from trained ones: coded rows of integers, and the held-out text.

    python examples/models/pack.py .train examples/models --bits 7

Reads TRAINED/backbone, TRAINED/heads/* and TRAINED/stdlib.npz; needs torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pcc.train import data
from pcc.train.layout import also_on, quantise_backbone, quantise_head

HEADS = ("ff-n8", "cp-n8", "hmm-n8", "btree-n8", "btree-n8-lora")
PROMPTS, LENGTH, SEED = 256, 256, 0


def main() -> int:
    """Write the folders and `heldout.npz`.

    `prompts` u16[256,256], each BOS and 255 bytes; `shared` f32[256], the share of a prompt's
    48-byte shingles that occur in the training text.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=7)
    args = parser.parse_args()
    trained, out = args.trained, args.out
    quantise_backbone(trained / "backbone", out / "backbone", args.bits)
    for name in HEADS:
        quantise_head(trained / "heads" / name, out / name, args.bits)
        also_on(out / name, out / "backbone")
    train, held = data.load_packed(trained / "stdlib.npz")
    rows = data.prompts(held, PROMPTS, LENGTH, SEED)
    texts = [bytes(row[1:].astype(np.uint8)) for row in rows]
    known = data.shared(texts, train.values()).astype(np.float32)
    np.savez_compressed(out / "heldout.npz", prompts=rows.astype(np.uint16), shared=known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
