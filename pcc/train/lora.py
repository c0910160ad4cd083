"""Draft layers: copies of the last k layers with y = W x + (alpha / r) B A x; W stays frozen.

Keys are those of published checkpoints (peft's names under `lm._lm.base_model.model.`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcc.errors import PccError
from pcc.train import config as cfg
from pcc.train.backbone import Backbone

PREFIX = "lm._lm.base_model.model.model.layers."


class Adapter(nn.Module):
    """y = W x + (alpha / r) B (A x); B starts at zero."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = base.weight  # the verifier's own, shared and frozen
        spread = base.in_features**-0.5
        first = spread * torch.randn(r, base.in_features, generator=generator)
        self.lora_A = nn.Parameter(first)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scale = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


class DraftLayers(nn.Module):
    """The last `c.layers` layers of a backbone with adapters, and its final norm."""

    def __init__(self, backbone: Backbone, c: cfg.Lora, seed: int = 0) -> None:
        super().__init__()
        if not 0 < c.layers <= backbone.depth:
            raise PccError("N113", f"{c.layers} adapted layers of {backbone.depth}")
        self.start = backbone.depth - c.layers
        self.backbone = [backbone]  # in a list: not a part of this module
        g = torch.Generator().manual_seed(seed)
        adapters: dict[str, Adapter] = {}
        for i in range(self.start, backbone.depth):
            layer = backbone.model.layers[i]
            for part in ("self_attn", "mlp"):
                for name, base in getattr(layer, part).named_children():
                    if name in c.targets:
                        adapters[f"{i}.{part}.{name}"] = Adapter(base, c.r, c.alpha, g)
        idle = sorted(set(c.targets) - {key.rpartition(".")[2] for key in adapters})
        if idle or not adapters:
            what = f"no layer has '{idle[0]}' to adapt" if idle else "lora.targets is empty"
            raise PccError("N113", what, hint=f"lora.targets may hold {list(cfg.Lora.targets)}")
        self.adapters = adapters
        for name, a in adapters.items():
            self.add_module(name.replace(".", "_"), a)

    def forward(self, shared: Tensor) -> Tensor:
        """Return the draft's hidden states of the shared layers' output [B,T,D]."""
        backbone = self.backbone[0]
        swapped: list[tuple[nn.Module, str, nn.Module]] = []
        for key, a in self.adapters.items():
            i, part, name = key.split(".")
            owner = getattr(backbone.model.layers[int(i)], part)
            swapped.append((owner, name, getattr(owner, name)))
            setattr(owner, name, a)
        try:
            return backbone.finish(shared, self.start)
        finally:
            for owner, name, base in swapped:
                setattr(owner, name, base)

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set the factors from a mapping of checkpoint names. Errors: N112."""
        mine = self.trained()
        hint = "adapt the layers and targets that were adapted there, with the same r"
        if differ := sorted(set(mine) ^ set(values)):
            what = f"{differ[0]} is adapted {'here' if differ[0] in mine else 'there'} only"
            raise PccError("N112", what, hint=hint)
        for key, p in mine.items():
            if values[key].shape != p.shape:
                what = f"{key} has shape {tuple(values[key].shape)}, expected {tuple(p.shape)}"
                raise PccError("N112", what, hint=hint)
            p.copy_(values[key].to(p))

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the factors by checkpoint name."""
        out = {}
        for key, a in self.adapters.items():
            out[f"{PREFIX}{key}.lora_A.default.weight"] = a.lora_A
            out[f"{PREFIX}{key}.lora_B.default.weight"] = a.lora_B
        return out
