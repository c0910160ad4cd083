"""Runs at toy size: the text, the sizes and the configurations that the training tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pcc.train import checkpoint, files

TEXT = {f"f{i}": b"def f%d(x):\n    return x + %d\n" % (i, i) * 8 for i in range(9)}
SIZES = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24, "max_length": 96}


def backbone(root: Path, out: Path, **optim: Any) -> dict[str, Any]:
    return {
        "kind": "backbone", "out": str(out), "model": SIZES, "multi_byte": {"n": 4},
        "data": {"packed": str(root / "d.npz"), "length": 32},
        "optim": {"steps": 6, "batch": 2, "lr": 0.01, "warmup": 2, "accumulate": 2, **optim},
        "run": {"device": "cpu", "save_every": 2, "log_every": 2, "eval_every": 6},
    }  # fmt: skip


def head(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    run = {"device": "cpu", "log_every": 2, "eval_every": 4, "eval_prompts": 3,
           "eval_prompt": 24, "eval_bytes": 16, "save_every": 2}  # fmt: skip
    base = {
        "kind": "head", "out": str(out), "backbone": str(root / "backbone"),
        "data": {"packed": str(root / "d.npz"), "length": 32},
        "head": {"kind": "cp", "n": 4, "r": 3, "emissions": "low-rank", "rank": 2, "trunk": 8},
        "loss": {"greedy": str(root / "g.safetensors"), "distill": 0.5, "positions": 30},
        "optim": {"steps": 4, "batch": 2, "lr": 0.01, "warmup": 1}, "run": run,
    }  # fmt: skip
    return base | more


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(folder)
    assert path is not None
    return files.read_tensors(path)[0]
