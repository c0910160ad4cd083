"""Head folders: `config.yaml` and `model@STEP.safetensors`, the published layout with additions.

Additions, under `mt_head.hyperparameters` of the configuration: `expander_type: low-rank` (keys
`.base`, `.factor`, `.code`, `.bias` in place of `.proj`), `trunk` (keys `mt_head.trunk.up`,
`.down`) and `sum_bias` (`.bias` beside each sum's `.proj`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from pcc.frontends.mtpc_checkpoint import SCOPE
from pcc.frontends.mtpc_experts import quantise
from pcc.frontends.state import find_model
from pcc.train import config as cfg
from pcc.train.files import DTYPES, read_tensors, write, write_tensors
from pcc.train.head import CircuitHead
from pcc.train.lora import DraftLayers

NAMES = {"ff": "fully_factorized", "cp": "cp", "hmm": "hmm", "btree": "btree"}


def describe(config: cfg.Config, head: CircuitHead, draft: DraftLayers | None) -> dict[str, Any]:
    """Return `config.yaml` of a head."""
    lora = config.lora
    start = draft.start if draft is not None else 0
    adaptor: dict[str, Any] = {"name": "none", "hyperparameters": None}
    if draft is not None:
        adaptor = {
            "name": "lora",
            "hyperparameters": {
                "r": lora.r,
                "lora_alpha": lora.alpha,
                "target_modules": list(lora.targets),
                "layers_to_transform": list(range(start, start + lora.layers)),
            },
        }
    sizes = head.sizes
    return {
        "circuit": {
            "name": NAMES[head.kind],
            "n_token": head.n,
            "n_component": head.r,
            "n_repetition": sizes.repetitions,
            "model": {"kind": "random-btree" if sizes.shuffle else head.kind},
        },
        "data": {"vocab_size": head.vocab},
        "mt_head": {
            "hyperparameters": {
                "n_embd": head.width,
                "transformer_n_layer": 0,
                "expander_type": sizes.emissions,
                "share_sum_weights": False,
                "trunk": sizes.trunk,
                "sum_bias": sizes.sum_bias and bool(head.shapes),
            }
        },
        "adaptor": adaptor,
        "lm": {"n_embd": head.width, "model": {"from_huggingface": None}},
        "model": {"model": {"beta": config.loss.distill, "gamma": config.loss.gamma}},
        "expname": config.name or Path(config.out).name,
    }


def save_head(
    folder: Path, config: cfg.Config, head: CircuitHead, draft: DraftLayers | None, step: int
) -> Path:
    """Write a head folder; LoRA factors stay float32, as published."""
    tensors = {k: v.detach().cpu() for k, v in head.tensors().items()}
    dtype = DTYPES[config.run.storage]
    wide = {k: v.to(dtype) for k, v in tensors.items()}
    if draft is not None:
        wide |= {k: v.detach().cpu() for k, v in draft.trained().items()}
    wide[SCOPE] = torch.tensor(head.scope, dtype=torch.int64)[:, None]
    path = folder / f"model@{step}.safetensors"
    backbone = Path(config.backbone) / "model.safetensors"
    meta = {"producer": "pcc train", "step": str(step)}
    if backbone.is_file():
        meta["backbone_sha256"] = hashlib.sha256(backbone.read_bytes()).hexdigest()
    write_tensors(path, wide, None, meta)
    text = yaml.safe_dump(describe(config, head, draft), sort_keys=False)
    write(folder / "config.yaml", text.encode())
    return path


def quantise_head(source: Path, out: Path) -> Path:
    """Copy a head folder with its large tensors as int8 rows and scales (LoRA factors stay)."""
    path = find_model(source)
    tensors, meta = read_tensors(path)
    small: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if value.ndim > 1 and value.is_floating_point() and key.startswith("mt_head."):
            if key.endswith(".bias"):
                small[key] = value.half()
                continue
            rows, scale = quantise(value.float().numpy())
            small[key], small[f"{key}.scale"] = torch.from_numpy(rows), torch.from_numpy(scale)
        else:
            small[key] = value
    write(out / "config.yaml", (source / "config.yaml").read_bytes())
    write_tensors(out / path.name, small, None, meta | {"storage": "int8 rows"})
    return out / path.name
