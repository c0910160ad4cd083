"""Head folders: `config.yaml` and `model@STEP.safetensors`, the published layout with additions.

Additions, under `mt_head.hyperparameters` of the configuration: `expander_type: low-rank` (keys
`.base`, `.factor`, `.code`, `.bias` in place of `.proj`), `trunk` (keys `mt_head.trunk.up`,
`.down`) and `sum_bias` (`.bias` beside each sum's `.proj`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from pcc.frontends.coded import STREAMS, encode
from pcc.frontends.mtpc_checkpoint import SCOPE
from pcc.frontends.provenance import SINGLE, sha256
from pcc.frontends.region_wiring import parse_regions, show_regions
from pcc.frontends.rows import SCALE, quantise
from pcc.frontends.state import find_model, lookup, read_config
from pcc.train import config as cfg
from pcc.train.backbone import Backbone
from pcc.train.files import DTYPES, read_tensors, read_weights, write, write_tensors
from pcc.train.head import KEYS, CircuitHead
from pcc.train.lora import DraftLayers

NAMES = {
    "ff": "fully_factorized", "cp": "cp", "hmm": "hmm", "btree": "btree",
    "tree": "region-graph", "region-graph": "region-graph",
}  # fmt: skip


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
            "model": _structure(head),
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


def _structure(head: CircuitHead) -> dict[str, str]:
    """Return the kind, and the region graph where the kind does not say it all."""
    c = head.sizes
    if c.regions:
        graph = parse_regions(c.regions, c.n, "head.regions")
        return {"kind": "region-graph", "regions": show_regions(graph)}
    return {"kind": "random-btree" if c.shuffle else head.kind}


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
    backbone = Path(config.backbone) / SINGLE
    write_tensors(path, wide, None, {"producer": "pcc train", "step": str(step)})
    described = describe(config, head, draft)
    if backbone.is_file():
        described["lm"]["backbone_sha256"] = [sha256(backbone)]
    write(folder / "config.yaml", yaml.safe_dump(described, sort_keys=False).encode())
    return path


def also_on(head: Path, backbone: Path) -> None:
    """Add a copy of the backbone in other storage to those that a head folder names."""
    config = read_config(head / "config.yaml")
    known, new = config["lm"].setdefault("backbone_sha256", []), sha256(backbone / SINGLE)
    known += [] if new in known else [new]
    write(head / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())


def read_head(folder: Path, model: Backbone) -> tuple[CircuitHead, DraftLayers | None]:
    """Return a head on `model` from a folder of this layout, and its adapted layers if any."""
    config = read_config(folder / "config.yaml")
    values = read_weights(find_model(folder))
    options, kinds = lookup(config, "mt_head.hyperparameters"), {v: k for k, v in NAMES.items()}
    low = options["expander_type"] == "low-rank"
    sizes = cfg.Head(
        kind=kinds[lookup(config, "circuit.name")],
        n=lookup(config, "circuit.n_token"),
        regions=lookup(config, "circuit.model.regions") or "",
        r=lookup(config, "circuit.n_component"),
        repetitions=lookup(config, "circuit.n_repetition"),
        shuffle=lookup(config, "circuit.model.kind") == "random-btree",
        emissions="low-rank" if low else "linear",
        rank=len(values[KEYS["code"]]) if KEYS["code"] in values else 1,
        trunk=options["trunk"],
        sum_bias=options["sum_bias"],
    )
    head = CircuitHead(sizes, lookup(config, "data.vocab_size"), options["n_embd"])
    head.assign(values)
    if lookup(config, "adaptor.name") != "lora":
        return head, None
    given = lookup(config, "adaptor.hyperparameters")
    lora = cfg.Lora(
        layers=len(given["layers_to_transform"]),
        r=given["r"],
        alpha=given["lora_alpha"],
        targets=tuple(given["target_modules"]),
    )
    draft = DraftLayers(model, lora)
    with torch.no_grad():
        for key, p in draft.trained().items():
            p.copy_(values[key])
    return head, draft


def quantise_head(source: Path, out: Path, bits: int = 8) -> Path:
    """Copy a head folder: large tensors as coded rows of integers, adapters in fp16."""
    path = find_model(source)
    tensors, meta = read_tensors(path)
    small = _small(tensors, bits, lambda k: k.startswith("mt_head.") and not k.endswith(".bias"))
    write(out / "config.yaml", (source / "config.yaml").read_bytes())
    write_tensors(out / path.name, small, None, meta | {"storage": f"{bits}-bit rows, coded"})
    return out / path.name


def quantise_backbone(source: Path, out: Path, bits: int = 8) -> Path:
    """Copy a backbone folder: matrices as coded rows of integers, vectors in float32."""
    tensors, meta = read_tensors(source / SINGLE)
    write(out / "config.json", (source / "config.json").read_bytes())
    small = _small(tensors, bits, lambda _: True)
    write_tensors(out / SINGLE, small, None, meta | {"storage": f"{bits}-bit rows, coded"})
    return out / SINGLE


def _small(
    tensors: Mapping[str, torch.Tensor], bits: int, chosen: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Return the chosen matrices as coded rows with fp16 scales, others in fp16, vectors whole."""
    small: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if not value.is_floating_point():
            small[key] = value
        elif value.ndim < 2:
            small[key] = value.float()
        elif not chosen(key) or not value.numel():
            small[key] = value.half()
        else:
            rows, scale = quantise(value.float().numpy(), bits)
            named = zip((key, key + STREAMS, key + SCALE), (*encode(rows), scale), strict=True)
            small |= {k: torch.tensor(v) for k, v in named}
    return small
