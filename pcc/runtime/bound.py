"""Rows of GPU results: a round's time beside the time that its bytes take, and what follows.

The bound of a round is what it must move, `pcc.runtime.traffic`, at the bandwidth of a copy on the
same device in the same run. Nothing here touches a device.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Times = Mapping[str, float]
REQUIRED = ("name", "backend", "shape", "architecture", "n", "r", "batch", "context", "precision",
            "round_ms", "p10", "p90", "repeats", "bytes_moved", "bandwidth_tb_s",
            "ratio_to_bound", "torch_graph_ms", "versions", "gpu", "commit")  # fmt: skip


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return p10, p50 and p90; two or more times are needed."""
    cut = statistics.quantiles(times, n=10, method="inclusive")
    return {"p10": cut[0], "p50": statistics.median(times), "p90": cut[-1]}


def bound_ms(moved: Mapping[str, int], bandwidth_tb_s: float) -> float:
    """Return the ms that some bytes take at a bandwidth in TB/s."""
    return sum(moved.values()) / bandwidth_tb_s / 1e9


def row(
    about: Mapping[str, Any],
    times: Times,
    moved: Mapping[str, int],
    bandwidth_tb_s: float,
    repeats: int,
) -> dict[str, Any]:
    """Return one row of the results. `times`: p10, p50, p90 in ms."""
    bound = bound_ms(moved, bandwidth_tb_s)
    return {
        **about,
        "round_ms": times["p50"], "p10": times["p10"], "p90": times["p90"], "repeats": repeats,
        "bytes_moved": dict(moved), "bandwidth_tb_s": bandwidth_tb_s, "bound_ms": bound,
        "ratio_to_bound": times["p50"] / bound if bound else None,
        "copy_share": bound / times["p50"] if times["p50"] else None,
    }  # fmt: skip


def rates(round_ms: float, decode_ms: float | None, accepted: float, batch: int) -> dict[str, Any]:
    """Return what a round's time is worth at `accepted` drafts a round.

    A round emits from `accepted` to `accepted + 1` tokens: published counts may or may not have the
    token that every round adds, so that both ends are given. `break_even`: the tokens it must emit
    to be as fast as one-token passes of the same engine.
    """
    per_second = [tokens * batch * 1e3 / round_ms for tokens in (accepted, accepted + 1)]
    plain = None if decode_ms is None else batch * 1e3 / decode_ms
    return {
        "acceptance": accepted,
        "tokens_per_second": per_second,
        "autoregressive_tokens_per_second": plain,
        "speedup": None if plain is None else [v / plain for v in per_second],
        "break_even_tokens": None if decode_ms is None else round_ms / decode_ms,
    }


def complete(r: Mapping[str, Any]) -> list[str]:
    """Return which required entries a row lacks."""
    return [k for k in REQUIRED if k not in r]


SAME = ("shape", "architecture", "n", "r", "batch", "context", "gpu")
HALVES = ("fp16", "bf16")  # they move the same bytes; other precisions begin with them


def with_yardstick(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fill `torch_graph_ms` and `torch_precision` from the torch row of the same work and GPU.

    A torch row of the same precision comes first; fp16 and bf16 may stand for each other, fp32 for
    nothing else; beside 8-bit weights stands torch's round in half. Of several the newest by
    `date` is taken, of equal dates the last.
    """
    torch = [r for r in rows if r.get("backend") == "torch-cuda-graph"]
    out = []
    for r in rows:
        same = [x for x in torch if all(x.get(k) == r.get(k) for k in SAME)]
        fair = [x for x in same if x.get("precision") == r.get("precision")]
        if not fair and str(r.get("precision")).startswith(HALVES):  # "bf16, head int8" too
            fair = [x for x in same if x.get("precision") in HALVES]
        fair.sort(key=lambda x: str(x.get("date", "")))  # stable: equal dates keep their order
        beside = fair[-1] if fair else {}
        more = {
            "torch_graph_ms": beside.get("round_ms"),
            "torch_precision": beside.get("precision"),
        }
        out.append({**r, **more})
    return out
