"""The torch round that GPU results are compared with computes what a round is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcc.frontends import templates
from pcc.interp.reference import reference

ROOT = Path(__file__).resolve().parents[2]
N, R, V, D = 8, 3, 7, 5


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def head(kind: str, n: int = N, v: int = V, d: int = D) -> Any:
    from benchmarks.gpu.torch_circuit import Head

    torch.manual_seed(0)
    made = Head(kind, n, R, v, d, device="cpu", dtype=torch.float32)
    made.w *= 6
    return made


@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_drafts_have_the_conditionals_of_the_circuit(kind: str) -> None:
    """Q of every position, for what was drawn, against the compiler's reference."""
    made = head(kind)
    e, carry, u = torch.randn(2, D), torch.tensor([3, 0]), torch.rand(2, 3 * N)
    x, q = made.draft(e, carry, u)
    logs, sums = made.parameters(e)
    for b in range(2):
        weights = {"emissions": logs[b].exp().numpy(), "sums": [s[b].numpy() for s in sums]}
        args = (N, V) if kind == "ff" else (N, R, V)
        circuit = getattr(templates, kind)(*args, weights=weights)
        whole = np.concatenate([[int(carry[b])], x[b].numpy()])[None]
        want = np.exp(reference(circuit, "conditionals", {"x": whole})["log_cond"])[0, 1:]
        np.testing.assert_allclose(q[b].numpy(), want, atol=2e-6)


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_draws_follow_the_circuit(kind: str) -> None:
    """Frequencies of each position against the mean of its conditionals."""
    made, count = head(kind, 4, 5, 6), 40_000
    e, carry = torch.randn(1, 6).expand(count, 6), torch.full((count,), 2)
    x, q = made.draft(e, carry, torch.rand(count, 16))
    for i in range(3):
        seen = torch.bincount(x[:, i], minlength=5) / count
        assert float((seen - q[:, i].mean(0)).abs().max()) < 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("shape", ["tiny-eva", "tiny-llama"])
@pytest.mark.parametrize("context", [50, 130])  # inside the first window, and past two of them
def test_a_round_is_whole(shape: str, context: int) -> None:
    from benchmarks.gpu.torch_model import SHAPES, Decoder
    from benchmarks.gpu.torch_round import Round

    torch.manual_seed(1)
    decoder = Decoder(SHAPES[shape], 2, 208, device="cpu", dtype=torch.float32)
    made = Round(decoder, head("btree", 8, SHAPES[shape].vocab, 64), context)
    for _ in range(3):
        before = made.window.clone()
        made.whole()
        for row in range(2):
            out = made.emitted[row]
            count = int((out >= 0).sum())
            assert count >= 1
            assert out[: count - 1].tolist() == before[row, 1:count].tolist()
            assert int(made.window[row, 0]) == int(out[count - 1])
        assert float((made.q.sum(-1) - 1).abs().max()) < 1e-5
    part = decoder.bytes_kv(context) / decoder.bytes_kv(1)
    window = SHAPES[shape].window
    assert part == (context if not window or context < window else context % 64 + context // 64 * 4)


def test_a_pass_reads_what_it_may() -> None:
    """Keys beyond a query's position, and EvaByte's of older windows, change nothing."""
    from benchmarks.gpu.torch_model import SHAPES, Decoder

    for name, context, hidden in (("tiny-llama", 50, 90), ("tiny-eva", 130, 70)):
        torch.manual_seed(2)
        d = Decoder(SHAPES[name], 1, 208, device="cpu", dtype=torch.float32)
        ids, length = torch.arange(4)[None], torch.tensor([context])
        want = d(ids, length)[1]
        d.k[:, :, :, hidden] += 9.0
        d.v[:, :, :, hidden] += 9.0
        assert torch.equal(d(ids, length)[1], want), name
