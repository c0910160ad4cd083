"""e_t = A3 relu(A2 relu(A1 [emb(x_{t-23}), ..., emb(x_t)] + b1) + b2) + b3.

A context encoder in plain numpy: the last 24 bytes in, one vector of D numbers out. It stands in
for the last hidden state of a byte-level language model, so that a circuit whose parameters are
functions of e_t can be tried without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]

VOCAB = 128
WINDOW = 24
NAMES = ("embedding", "A1", "b1", "A2", "b2", "A3", "b3")
FILE = "encoder.safetensors"


class Encoder:
    """Weights by name, and the two directions: ids to context, context gradient to gradients."""

    def __init__(self, weights: dict[str, Array]) -> None:
        if sorted(weights) != sorted(NAMES):
            raise ValueError(f"encoder weights must be {NAMES}, got {tuple(sorted(weights))}")
        self.weights = weights

    @property
    def dim(self) -> int:
        return int(self.weights["b3"].shape[0])

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        dim: int,
        embed: int = 16,
        hidden: tuple[int, int] = (224, 128),
        dtype: npt.DTypeLike = np.float32,
    ) -> Encoder:
        """A_ij ~ N(0, 2 / fan-in), biases 0, embeddings ~ N(0, 1)."""
        first, second = hidden

        def dense(rows: int, cols: int, gain: float) -> Array:
            drawn: Array = (rng.standard_normal((rows, cols)) * np.sqrt(gain / rows)).astype(dtype)
            return drawn

        return cls(
            {
                "embedding": rng.standard_normal((VOCAB, embed)).astype(dtype),
                "A1": dense(WINDOW * embed, first, 2.0),
                "b1": np.zeros(first, dtype),
                "A2": dense(first, second, 2.0),
                "b2": np.zeros(second, dtype),
                "A3": dense(second, dim, 1.0),
                "b3": np.zeros(dim, dtype),
            }
        )

    def forward(self, ids: Ids) -> list[Array]:
        """h0 = emb(ids), h1 = relu(h0 A1 + b1), h2 = relu(h1 A2 + b2), e = h2 A3 + b3: all four."""
        w = self.weights
        h0 = w["embedding"][ids].reshape(len(ids), len(w["A1"]))
        h1 = np.maximum(h0 @ w["A1"] + w["b1"], 0)
        h2 = np.maximum(h1 @ w["A2"] + w["b2"], 0)
        return [h0, h1, h2, h2 @ w["A3"] + w["b3"]]

    def backward(self, ids: Ids, states: list[Array], grad: Array) -> dict[str, Array]:
        """dL/dA_k = h_{k-1}^T g_k with g_{k-1} = (g_k A_k^T) * [h_{k-1} > 0]; grad is dL/de."""
        w = self.weights
        h0, h1, h2, _ = states
        out = {"A3": h2.T @ grad, "b3": grad.sum(0)}
        grad = (grad @ w["A3"].T) * (h2 > 0)
        out |= {"A2": h1.T @ grad, "b2": grad.sum(0)}
        grad = (grad @ w["A2"].T) * (h1 > 0)
        out |= {"A1": h0.T @ grad, "b1": grad.sum(0)}
        grad = grad @ w["A1"].T
        rows, width = w["embedding"].shape
        cells = (ids.astype(np.int64)[..., None] * width + np.arange(width)).ravel()
        summed = np.bincount(cells, grad.ravel(), rows * width).reshape(rows, width)
        return out | {"embedding": summed.astype(grad.dtype)}

    def context(self, prefixes: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """e_t for each prefix x_1..x_t, shape [B, D]; short prefixes are padded with byte 0."""
        return self.forward(pad(prefixes))[3].astype(np.float32)

    def save(self, folder: str | Path) -> None:
        """Write the weights in fp16, one tensor per name."""
        half = {name: np.ascontiguousarray(self.weights[name], np.float16) for name in NAMES}
        path = Path(folder) / FILE
        save_file(half, path)
        path.chmod(0o644)


def pad(prefixes: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """row_b = the last 24 bytes of 0...0 + prefix_b; bytes of 128 and above read as 127."""
    rows = [np.frombuffer(p[-WINDOW:].rjust(WINDOW, b"\0"), np.uint8) for p in prefixes]
    return np.minimum(np.array(rows, np.uint8).reshape(-1, WINDOW), VOCAB - 1)


def load(folder: str | Path) -> Encoder:
    """Read the encoder stored in a folder: fp16 on disk, fp32 in memory."""
    stored = load_file(Path(folder) / FILE)
    return Encoder({name: value.astype(np.float32) for name, value in stored.items()})
