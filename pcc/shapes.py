"""Verifiers and heads of true shape with random weights: what a benchmark needs of a checkpoint.

Time per round depends on shapes, not on what was learned. Weights are runs of one block of normal
numbers, begun elsewhere for each matrix and scaled by (fan-in)^(-1/2): deterministic in the seed,
made at the speed of memory, never held. Their outputs are noise; manifests say "synthetic".

Sizes are those of the published configurations. Two of byte-Llama's are not published: the longest
key of its dictionary (taken as 16 bytes), and its rows (128256, from the size of the file).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.ir.array import Array
from pcc.ir.noise import Noise
from pcc.ir.recipe import Recipe, named
from pcc.knobs import LAZY_ELEMENTS, MAX_WINDOW
from pcc.models.config import Config
from pcc.models.matrix import Matrix

Values = np.ndarray[Any, Any]
MAX_RANK = 1024
EVABYTE: dict[str, Any] = {
    "model_type": "evabyte", "vocab_size": 320, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
    "rms_norm_eps": 1e-5, "norm_add_unit_offset": True, "rope_theta": 100000.0,
    "window_size": 2048, "chunk_size": 16, "num_pred_heads": 8, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 11, "pad_token_id": 0, "max_position_embeddings": 32768,
}  # fmt: skip
BYTE_LLAMA: dict[str, Any] = {
    "model_type": "tpu_llama", "vocab_size": 268, "hidden_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "bos_token_id": 256, "eos_token_id": 259, "pad_token_id": 258, "byte_offset": 0,
    "expand_input_ids": True, "expand_input_ids_maxlen": 16,
    "expand_input_ids_vocab_size": 128256,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "head_dim": 16,
}  # fmt: skip
SHAPES: Mapping[str, dict[str, Any]] = {
    "evabyte-6.5b": EVABYTE,
    "byte-llama-3.2-3b": BYTE_LLAMA,
    "evabyte-tiny": {
        **EVABYTE, **TINY, "num_key_value_heads": 4, "window_size": 64, "num_pred_heads": 4,
    },
    "byte-llama-tiny": {
        **BYTE_LLAMA, **TINY, "num_key_value_heads": 2, "expand_input_ids_vocab_size": 600,
        "expand_input_ids_maxlen": 6,
    },
}  # fmt: skip
SILENCE = Noise(0, "", 1.0)
HEADS = ("ff", "cp", "hmm", "btree")
_HEAD = re.compile(r"(\w+),n=(\d{1,5}),r=(\d{1,5})")


@dataclass(frozen=True)
class Synthetic:
    """A verifier's shape and the seed of its numbers. Errors: M160 (no such shape, or seed)."""

    shape: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            hint = f"known are: {', '.join(SHAPES)}"
            raise PccError("M160", f"unknown shape {str(self.shape)[:60]!r}", hint=hint)
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise PccError("M160", f"seed={str(self.seed)[:40]!r} is not an int below 2^32")

    @property
    def config(self) -> Config:
        """The configuration, as if read from a folder."""
        data = dict(SHAPES[self.shape])
        if data.get("expand_input_ids"):
            data["expand_input_ids_dict"] = dictionary(
                data["expand_input_ids_vocab_size"], data["expand_input_ids_maxlen"], self.seed
            )
        return Config(data, {}, {}, Path(f"<{self.shape}>"))

    @property
    def config_hash(self) -> str:
        """SHA-256 of what is fixed by name and seed."""
        text = repr((self.shape, self.seed, sorted(SHAPES[self.shape].items())))
        return hashlib.sha256(text.encode()).hexdigest()

    def weights(self) -> RandomWeights:
        """Return tensors of any name and shape."""
        unit = bool(SHAPES[self.shape].get("norm_add_unit_offset"))
        return RandomWeights(self.seed, unit, Path(f"<{self.shape}>"))

    def head(self, text: str) -> Circuit:
        """Return the contextual head that `KIND,n=N,r=R` describes. Errors: M161."""
        kind, n, r = parse_head(text)
        data = SHAPES[self.shape]
        width, vocab = data["hidden_size"], data["vocab_size"]

        def draw(name: str, shape: tuple[int, ...]) -> Array:
            noise = Noise(self.seed, f"head.{kind}.{name}", width**-0.5)
            return Array.lazy("f32", shape, noise.recipe("f32"))

        sizes = (n, vocab) if kind == "ff" else (n, r, vocab)
        make = getattr(templates, kind)
        return make(*sizes, context=width, weights=draw)  # type: ignore[no-any-return]


def synthetic(shape: str | None, head: str | None, seed: int, *others: object) -> Synthetic | None:
    """Return the shape that is asked for instead of `others` (a source, a verifier), if one is.

    Errors: M160, M162 (a head without a shape, or a shape beside a source or a verifier).
    """
    if shape is None and head is None:
        return None
    if shape is None or any(x is not None for x in others):
        what = "a head of random weights needs a shape" if shape is None else "a shape is all of it"
        hint = "--shape NAME [--head KIND,n=N,r=R], without a source and a verifier"
        raise PccError("M162", what, hint=hint)
    found = Synthetic(shape, seed)
    if head is not None:
        parse_head(head)
    return found


def parse_head(text: str) -> tuple[str, int, int]:
    """Read `KIND,n=N,r=R`; `r` may be left out for ff. Errors: M161."""
    found = _HEAD.fullmatch(text if ",r=" in text else f"{text},r=1")
    kind, n, r = (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)
    if kind not in HEADS or not 2 <= n <= MAX_WINDOW or not 1 <= r <= MAX_RANK:
        what = f"the head {text[:60]!r} is not KIND,n=N,r=R"
        hint = f"KIND: {', '.join(HEADS)}; N from 2 to {MAX_WINDOW}, R from 1 to {MAX_RANK}"
        raise PccError("M161", what, hint=hint)
    if kind == "ff" and r != 1:
        raise PccError("M161", f"a fully factorised head has r=1, not r={r}", hint="ff,n=16")
    return kind, n, r


@dataclass(frozen=True)
class RandomMatrix(Matrix):
    """A matrix of noise: turned or not, its numbers are drawn in the order they are stored in."""

    noise: Noise = SILENCE

    def cut(self, start: int, stop: int) -> Matrix:
        """Return rows of the matrix as it is when it is not turned."""
        plain = Matrix(self.identity, self.shape, self.rows, self.at)
        return plain.cut(start, stop)

    def in_order(self, dtype: str) -> Recipe:
        """Return the recipe of the numbers, row by row."""
        return self.noise.recipe(dtype)

    def turned(self, others: Sequence[Matrix], dtype: str) -> Recipe:
        """Return the recipe of `[D, sum K]`, drawn as one matrix if all are random."""
        if all(isinstance(m, RandomMatrix) for m in others):
            return self.noise.recipe(dtype)
        return super().turned(others, dtype)


class RandomWeights:
    """Stands for the tensors of a model folder: any name and shape that a reader asks for."""

    def __init__(self, seed: int, unit: bool, folder: Path) -> None:
        self.seed, self.unit, self.folder = seed, unit, folder
        self.left: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return False  # nothing that a reader could do without

    def take(self, name: str, *shape: int) -> Values:
        """Return a small tensor: norms scale by one, biases are zero, others are noise."""
        if "norm" in name:
            return np.full(shape, 0.0 if self.unit else 1.0, np.float32)
        if name.endswith(".bias"):
            return np.zeros(shape, np.float32)
        size = int(np.prod(shape))
        return Noise(self.seed, name, shape[-1] ** -0.5).read("f32", 0, size).reshape(shape)

    def matrix(self, name: str, *shape: int) -> Values | Matrix:
        """Return a matrix: rows of an embedding have unit numbers, products keep the scale."""
        rows, width = shape
        noise = Noise(self.seed, name, 1.0 if "embed" in name else width**-0.5)

        def read(start: int, stop: int) -> Values:
            return noise.read("f32", start * width, stop * width).reshape(-1, width)

        if rows * width < LAZY_ELEMENTS:
            return read(0, rows)
        identity = named("random", self.seed, name, shape)
        return RandomMatrix(identity, (rows, width), read, f"{self.folder}:{name}", noise)

    def skip(self, *names: str) -> None:
        """Let tensors go unread: there are none."""

    def close(self) -> None:
        """Nothing is left over."""


def dictionary(words: int, longest: int, seed: int) -> list[Any]:
    """Return a dictionary of byte-Llama's form: `words` random keys of up to `longest` bytes.

    Every byte is a key; lengths of the others are about those of English subwords.
    """
    rng = np.random.default_rng([seed, 62])
    keys = {(b,): None for b in range(min(256, words))}
    while len(keys) < words:
        lengths = 2 + np.minimum(rng.poisson(3.5, words), longest - 2)
        letters = rng.integers(0, 256, (words, longest))
        for size, row in zip(lengths.tolist(), letters.tolist(), strict=True):
            if len(keys) < words:
                keys[tuple(row[:size])] = None
    entries = {",".join(str(i + 1) for i in key): row for row, key in enumerate(keys, 1)}
    return [entries, []]
