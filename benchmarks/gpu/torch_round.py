"""The yardstick: a whole speculative round in plain torch, as one CUDA graph, on true shapes.

    python benchmarks/gpu/torch_round.py --shape evabyte-6.5b --head btree --context 1024 --json OUT

Random weights; nothing here is tuned but the absence of host work. Times are of graph launches by
CUDA events, in turn for the whole round and its parts; the copy bandwidth is measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.torch_circuit import Head, pick
from benchmarks.gpu.torch_model import SHAPES, Decoder

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Round:
    """State of B rows, and the round that takes it one step on: what `step` does in pcc."""

    def __init__(self, decoder: Decoder, head: Head, context: int) -> None:
        b, n, v, device = decoder.batch, head.n, head.vocab, decoder.device
        self.decoder, self.head = decoder, head
        self.window = torch.randint(0, v, (b, n), device=device)
        self.q = torch.full((b, n - 1, v), 1.0 / v, device=device)
        self.length = torch.full((b,), context, device=device)
        self.u = torch.rand(b, 5 * n, device=device)
        self.hidden = torch.randn(b, n, decoder.shape.width, device=device)
        self.emitted = torch.zeros(b, n, dtype=torch.int64, device=device)
        self.context = context

    @torch.no_grad()
    def whole(self) -> None:
        """Verify the window, decide, draw the carry, draft the next window."""
        n, length = self.head.n, self.length
        hidden, logits = self.decoder(self.window, length)
        count, carry = self.decide(logits)
        row = (count - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        e = hidden.gather(1, row)[:, 0]
        x, q = self.head.draft(e, carry, self.u[:, n + 1 :])
        at = torch.arange(n, device=length.device)
        moved = torch.cat((self.window[:, 1:], carry[:, None]), 1)
        out = torch.where(at < count[:, None] - 1, moved, -1)
        out = torch.where(at == count[:, None] - 1, carry[:, None], out)
        self.emitted.copy_(out)
        self.window.copy_(torch.cat((carry[:, None], x), 1))
        self.q.copy_(q)
        # The length stays: every repeat is timed at the same context.

    @torch.no_grad()
    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens stay, and the carry."""
        n, p = self.head.n, logits.softmax(-1)
        at = self.window[:, 1:, None]
        p_of, q_of = p[:, :-1].gather(2, at)[..., 0], self.q.gather(2, at)[..., 0]
        stays = (self.u[:, : n - 1] * q_of < p_of).long().cumprod(1)
        count = stays.sum(1) + 1
        row = (count - 1)[:, None, None].expand(-1, 1, p.shape[-1])
        law = p.gather(1, row)[:, 0]
        none = torch.zeros_like(self.q[:, :1])
        rest = (law - torch.cat((self.q, none), 1).gather(1, row)[:, 0]).clamp_min(0)
        law = torch.where(rest.sum(-1, keepdim=True) > 0, rest, law)
        return count, pick(law, self.u[:, n - 1])

    @torch.no_grad()
    def verify(self) -> None:
        """The n-wide pass alone."""
        self.decoder(self.window, self.length)

    @torch.no_grad()
    def decode(self) -> None:
        """A one-token pass: what autoregressive decoding takes for each token, sampling aside."""
        self.decoder(self.window[:, :1], self.length)

    @torch.no_grad()
    def draft(self) -> None:
        """The head and the draft alone."""
        self.head.draft(self.hidden[:, 0], self.window[:, 0], self.u[:, self.head.n + 1 :])

    @torch.no_grad()
    def project(self) -> None:
        """The head's product alone."""
        self.head.parameters(self.hidden[:, 0])


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Return the launch of a CUDA graph of some work, warmed up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    launch: Callable[[], None] = graph.replay
    return launch


def timed(launch: Callable[[], None], repeats: int) -> dict[str, float]:
    """Return p10, p50 and p90 in ms of a launch, by events around each."""
    for _ in range(5):
        launch()
    torch.cuda.synchronize()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in pairs:
        begin.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairs]
    cut = statistics.quantiles(times, n=10, method="inclusive")
    return {"p10": cut[0], "p50": statistics.median(times), "p90": cut[-1]}


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Return bytes read and written per second by a copy on the device, in TB/s."""
    a = torch.empty(size, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = timed(lambda: b.copy_(a), 10)
    return 2 * size / times["p50"] * 1e3 / 1e12


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the results, with the times of the parts."""
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    shape = SHAPES[a.shape]
    n = a.n or shape.n
    rows = a.context + 64 if shape.window else max(a.context + 64, a.rows)
    made = {"device": "cuda", "dtype": DTYPES[a.precision]}
    decoder = Decoder(shape, a.batch, -(-rows // 16) * 16, **made)
    head = Head(a.head, n, a.r, shape.vocab, shape.width, **made)
    round_ = Round(decoder, head, a.context)
    parts = {k: timed(captured(getattr(round_, k)), a.repeats)
             for k in ("whole", "verify", "draft", "project", "decode")}  # fmt: skip
    moved = {"weights": decoder.bytes, "head": head.bytes, "kv": decoder.bytes_kv(a.context)}
    whole = parts.pop("whole")
    bound = sum(moved.values()) / bandwidth / 1e9
    return {
        "name": f"torch-{a.shape}-{a.head}-n{n}-r{a.r}-b{a.batch}-c{a.context}-{a.precision}",
        "backend": "torch-cuda-graph", "shape": a.shape, "architecture": a.head, "n": n, "r": a.r,
        "batch": a.batch, "context": a.context, "precision": a.precision,
        "round_ms": whole["p50"], "p10": whole["p10"], "p90": whole["p90"], "repeats": a.repeats,
        "bytes_moved": moved, "bandwidth_tb_s": bandwidth, "ratio_to_bound": whole["p50"] / bound,
        "parts": parts, "torch_graph_ms": whole["p50"], "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }  # fmt: skip


def main() -> None:
    """Measure one shape and print or write a row of the results."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--shape", choices=SHAPES, default="evabyte-6.5b")
    p.add_argument("--head", choices=("ff", "cp", "hmm", "btree"), default="btree")
    p.add_argument("--n", type=int, default=0, help="window; 0: the shape's own")
    p.add_argument("--r", type=int, default=32)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--rows", type=int, default=2064, help="rows of the caches, at least")
    p.add_argument("--precision", choices=DTYPES, default="bf16")
    p.add_argument("--repeats", type=int, default=50)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    row = measure(a)
    text = json.dumps(row, indent=1)
    if a.json:
        a.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
