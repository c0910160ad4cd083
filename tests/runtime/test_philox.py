"""Uniforms: published vectors of Philox4x32-10, and the committed ones of pcc's counters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.runtime.philox import AHEAD, ROLES, Uniforms, philox, uniforms

VECTORS = Path(__file__).with_name("philox.json")
F = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((F, F, F, F), (F, F), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    assert " ".join(f"{int(w):08x}" for w in philox(counter, key)) == words


def test_committed_vectors() -> None:
    rows = json.loads(VECTORS.read_text())
    assert len(rows) >= 16
    for row in rows:
        u = uniforms(row["seed"], ROLES[row["role"]], row["slot"], row["length"], row["stream"])
        assert float(u) == row["u_times_2_24"] / (1 << 24)


def test_uniforms_are_multiples_below_one_and_look_uniform() -> None:
    u = uniforms(5, 3, np.arange(64), np.arange(2000)[:, None], 0).astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    assert (u * (1 << 24) == np.floor(u * (1 << 24))).all()
    counts = np.histogram(u, 256, (0, 1))[0]
    expected = u.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 5 * np.sqrt(512)


def test_rows_are_their_own_streams_and_blocks_do_not_show() -> None:
    slots = [("accept", 0), ("accept", 1), ("carry", 0), ("latent", 4), ("token", 2)]
    together, alone = Uniforms(9, slots, [3, 8]), Uniforms(9, slots, [8])
    a, b = np.empty((2, 5), np.float32), np.empty((1, 5), np.float32)
    for length in (0, 1, 7, AHEAD - 1, AHEAD, 5 * AHEAD + 3, 2):
        together.fill([length + 50, length], a)
        alone.fill([length], b)
        assert (a[1] == b[0]).all()
        want = [float(uniforms(9, ROLES[r], s, length, 8)) for r, s in slots]
        assert b[0].tolist() == want
    assert (a[0] != a[1]).any()


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5, True, "1"])
def test_seeds_out_of_range(seed: object) -> None:
    with pytest.raises(PccError, match="S101"):
        uniforms(seed, 0, 0, 0, 0)  # type: ignore[arg-type]
