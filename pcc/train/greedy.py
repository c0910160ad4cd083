"""The verifier's own greedy continuations of training text, as a file that heads train on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from pcc.frontends.provenance import SINGLE, sha256
from pcc.train import backbone as bb
from pcc.train import config as cfg
from pcc.train import data
from pcc.train.evaluate import continuations
from pcc.train.files import write_tensors
from pcc.train.given import BACKBONE
from pcc.train.lock import exclusive
from pcc.train.loop import device_of
from pcc.train.tasks import documents


def make(c: cfg.Config, *, progress: bool = True) -> dict[str, float]:
    """Write rows [BOS, prompt, greedy bytes] to the file `out`; a pure function of the seed.

    Errors: N122, N130, N140 to N142; N152 (another run writes this file).
    """
    out = Path(c.out)
    with exclusive(out.parent, "run", cannot="N130", taken="N152", name=f".{out.name}.lock"):
        return _make(c, out, progress=progress)


def _make(c: cfg.Config, out: Path, *, progress: bool) -> dict[str, float]:
    g, device = c.greedy, device_of(c.run)
    model = bb.load(Path(c.backbone)).to(device).requires_grad_(False)
    if c.run.bf16:
        model.to(torch.bfloat16)
    packed = data.pack(documents(c.data)[0])
    parts, began = [], time.perf_counter()
    for i, start in enumerate(range(0, g.rows, g.batch)):
        count = min(g.batch, g.rows - start)
        ids, _ = packed.rows(c.seed, i, count, g.prompt)
        whole = continuations(model, torch.from_numpy(ids).to(device), g.length)
        parts.append(whole.to(torch.int16).cpu())
        if progress:
            spent = time.perf_counter() - began
            print(f"greedy: {start + count}/{g.rows} rows, {spent:.0f} s", file=sys.stderr)
    meta = {
        "prompt": str(g.prompt),
        "seed": str(c.seed),
        BACKBONE: sha256(Path(c.backbone) / SINGLE),
    }
    rows = torch.cat(parts)
    write_tensors(out, {"ids": rows}, None, meta)
    return {
        "rows": float(len(rows)),
        "distinct_bytes": float(torch.unique(rows[:, g.prompt :]).numel()),
    }
