"""The models of `step_cpu.py`: a small Llama and heads that guess right some of the time.

Token v has a random code; output matrix i reads the code of the (i+1)-th successor of v on one
cycle through all tokens. Layers of random weights disturb what reaches the output, and every expert
of a head has noise of its own, so that drafts are rejected at every position now and then. Nothing
is trained: acceptance compares proposals of one head, and says nothing of quality.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.baselines import sum_shapes

VOCAB, WIDTH, LAYERS, HEADS, INNER = 320, 256, 4, 4, 704
SHARPNESS, NOISE, EXPERTS = 0.45, 0.3, 0.5
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A verifier folder, its weights, and the head's weights `[n,r,V,D]`, `[F,Ko,Ki,D]`."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    emission: Values
    sums: list[Values]

    @property
    def head_bytes(self) -> int:
        """What one round reads of the head."""
        return int(self.emission.nbytes + sum(s.nbytes for s in self.sums))


CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "intermediate_size": INNER, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 256, "eos_token_id": None, "byte_offset": 0,
}  # fmt: skip


def make(folder: Path, kind: str, n: int, r: int, seed: int = 0) -> Case:
    """Write the verifier and return it with a head."""
    rng = np.random.default_rng(seed)
    code = rng.standard_normal((VOCAB, WIDTH))
    cycle = rng.permutation(VOCAB)
    weights = _verifier(code, cycle, rng)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, folder / "model.safetensors")
    emission = rng.standard_normal((n, r, VOCAB, WIDTH), np.float32)
    emission *= EXPERTS / np.sqrt(WIDTH) if r > 1 else 0.0
    for i in range(n):
        emission[i] += _successors(code, cycle, i + 1)
    sums = [
        rng.standard_normal((*s, WIDTH), np.float32) / np.sqrt(WIDTH).astype(np.float32)
        for s in sum_shapes(kind, n, r)
    ]
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    return Case(folder, dict(CONFIG), state, emission, sums)


def _verifier(code: Values, cycle: Values, rng: np.random.Generator) -> dict[str, Values]:
    """Return the weights f32 of a Llama that guesses the successor, and is disturbed."""
    t: dict[str, Values] = {
        "model.embed_tokens.weight": code,
        "model.norm.weight": np.ones(WIDTH),
        "lm_head.weight": _successors(code, cycle, 1),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (WIDTH, WIDTH)), ("self_attn.k_proj", (WIDTH, WIDTH)),
            ("self_attn.v_proj", (WIDTH, WIDTH)), ("self_attn.o_proj", (WIDTH, WIDTH)),
            ("mlp.gate_proj", (INNER, WIDTH)), ("mlp.up_proj", (INNER, WIDTH)),
            ("mlp.down_proj", (WIDTH, INNER)),
        ):  # fmt: skip
            scale = NOISE if name.endswith(("o_proj", "down_proj")) else 1.0
            t[f"{at}{name}.weight"] = rng.standard_normal(shape) * scale / np.sqrt(shape[1])
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[f"{at}{name}.weight"] = np.ones(WIDTH)
    return {k: v.astype(np.float32) for k, v in t.items()}


def _successors(code: Values, cycle: Values, steps: int) -> Values:
    """Output matrix `[V,D]` whose row f^steps(v) reads the code of v."""
    out = np.empty_like(code)
    out[cycle[(np.arange(VOCAB) + steps) % VOCAB]] = code[cycle] * SHARPNESS / np.sqrt(WIDTH)
    return out
