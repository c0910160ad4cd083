"""Which kernels of a graph take its time, as the driver traces them.

python benchmarks/gpu/device_kernels.py BUNDLE [--query step] [--provider cuda] [--out FILE.json]

The graph is launched as `pcc bench --gpu` launches it, as one CUDA graph on plausible inputs, under
torch's profiler (CUPTI): so it works for every backend, ONNX Runtime's too, whose own profiler has
the host's times. Kernels are grouped by what their names say. `between` is what the launch takes
beyond its kernels one after another: gaps, less what runs side by side. Times under a tracer are
longer than without, so the round is timed before it starts. Prints a table; `--out` writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROUNDS = 5
KEPT = 25  # kernels by name in the file
FAMILIES = (  # the first that is found in a kernel's name
    ("attention", r"attention|attend|fmha|flash"),
    ("products", r"gemm|gemv|nvjet|cutlass|splitk|xmma|linear|narrow|dot_kernel"),
    ("softmax", r"softmax"),
    ("norms, reductions", r"norm|reduce|argm|topk|cumsum|scan"),
    ("moves", r"transpose|concat|slice|gather|scatter|expand|where|copy|memcpy|memset|split|pad"),
    ("casts", r"cast"),
    ("element-wise", r"elementwise|unary|binary|_op|pow|sqrt|mul|add"),
)  # fmt: skip


def family(name: str) -> str:
    """Return what a kernel does, by its name."""
    low = name.lower()
    return next((f for f, pattern in FAMILIES if re.search(pattern, low)), "other")


def traced(launch: Any, wait: Any) -> list[tuple[str, float]]:
    """Return (name, microseconds) of every kernel of `ROUNDS` launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as tracer:
        for _ in range(ROUNDS):
            launch()
        wait()
    return [
        (e.name, e.time_range.elapsed_us())
        for e in tracer.events() or ()
        if str(e.device_type).endswith("CUDA")
    ]


def summary(events: Iterable[tuple[str, float]], round_us: float) -> dict[str, Any]:
    """Return launches and microseconds of a round: by family, by kernel, and what is between."""
    groups: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    names: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, us in events:
        for table, key in ((groups, family(name)), (names, name)):
            table[key][0] += 1 / ROUNDS
            table[key][1] += us / ROUNDS
    whole = sum(us for _, us in groups.values())
    rows = [
        {"family": k, "launches": round(n), "us": round(us, 1), "of_round": round(us / round_us, 3)}
        for k, (n, us) in sorted(groups.items(), key=lambda x: -x[1][1])
    ]
    kernels = [
        {"name": k[:100], "family": family(k), "launches": round(n), "us": round(us, 1)}
        for k, (n, us) in sorted(names.items(), key=lambda x: -x[1][1])[:KEPT]
    ]
    return {"round_us": round(round_us, 1), "between_us": round(round_us - whole, 1),
            "launches": sum(r["launches"] for r in rows), "families": rows,
            "kernels": kernels}  # fmt: skip


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--query", default="step")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    import torch

    import pcc
    from pcc.circuit.text import write
    from pcc.errors import PccError
    from pcc.runtime.measure_gpu import bench_of

    try:
        engine = pcc.load(a.bundle, provider=a.provider)
        bench = bench_of(engine, a.query, a.context, int(engine.queries[a.query]["batch"]))
    except PccError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    torch.cuda.init()
    round_us = bench.times(50)["p50"] * 1e3
    device, stream = bench.timer.device, bench.timer.stream
    events = traced(bench.launch, lambda: device.wait(stream))
    if not events:
        print("the tracer saw no kernel", file=sys.stderr)
        return 1
    found = {"bundle": a.bundle.name, "query": a.query, "context": a.context, "gpu": device.name,
             **summary(events, round_us)}  # fmt: skip
    print(f"{a.query}: {round_us:.0f} us, {found['launches']} kernels")
    for r in found["families"]:
        print(
            f"  {r['family']:20} {r['launches']:6} launches {r['us']:9.1f} us  {r['of_round']:.1%}"
        )
    print(f"  {'between':20} {'':15} {found['between_us']:9.1f} us")
    if a.out is not None:
        write(a.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
