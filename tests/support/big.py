"""Compiles a model folder in a process of its own and prints its peaks: run by `test_big.py`.

    python big.py FOLDER WIDTH LAYERS PRECISION

The first compilation, of a model as deep but thin, shows what program and graphs take; the second,
of `WIDTH`, shows what its weights add.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

import pcc
from pcc.frontends import templates

VOCAB, HEADS = 258, 8
BLOCK = 1 << 20


def write_model(folder: Path, width: int, layers: int) -> tuple[int, int]:
    """Write a Llama in bf16; return the bytes of its weights and of the largest matrix in f32."""
    inner, head = 4 * width, width // HEADS
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": head, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, width), "lm_head.weight": (VOCAB, width),
        "model.norm.weight": (width,),
    }  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{c}_proj.weight": (width, width) for c in "qkvo"}
        shapes |= {f"{at}mlp.{c}_proj.weight": (inner, width) for c in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{at}{c}_layernorm.weight": (width,) for c in ("input", "post_attention")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).normal(size=BLOCK).astype(np.float32) * width**-0.5
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _ in range(end // len(block)):
            out.write(block)
        out.write(block[: end % len(block)])
    return end, 4 * 2 * inner * width  # gate and up are one matrix


def main() -> None:
    """Compile twice."""
    path, width, layers, precision = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
    peaks = []
    half, _, int8 = precision.partition("+")
    how: dict[str, Any] = {"precision": half, "target": "onnx-cuda"}
    if int8:
        how |= {"int8": "verifier", "target": "onnx"}
    for name, size in (("thin", 64), ("wide", int(width))):
        total, largest = write_model(path / name, size, int(layers))
        pcc.compile(
            templates.cp(4, 2, VOCAB, context=size), verifier=path / name, queries=["draft"],
            max_seq=64, chunk=8, out=path / f"{name}.pcc", **how,
        )  # fmt: skip
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps({"peaks": peaks, "total": total, "largest": largest}))


if __name__ == "__main__":
    main()
