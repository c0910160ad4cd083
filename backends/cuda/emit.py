"""The graphs of a bundle as an engine of our own: plans, machine code and packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.gpu import gpu_of
from pcc.backends.cuda.nvcc import check_listed, compile_all, find
from pcc.backends.cuda.partition import partition
from pcc.backends.cuda.weights import WeightFile
from pcc.emission import Order, Say, Written

FOLDER = "engines/cuda"


def write_graphs(order: Order, folder: Path, say: Say) -> Written:
    """Write `engines/cuda/QUERY.json` and `.cubin`, and `weights.bin`. Errors: X401-X403, E180."""
    nvcc = find()  # first: a missing compiler costs nothing
    gpu = gpu_of(order.gpu or None)
    check_listed(nvcc, gpu.arch)
    say(f"work is divided for {gpu.processors} multiprocessors of {gpu.arch}")
    weights = WeightFile()
    built: dict[str, Builder] = {}
    for q, e in order.emissions.items():
        say(f"graph '{q}'")
        built[q] = partition(e.module, e.inputs, order.batch, weights, q, gpu)
    say(f"compiling the kernels of {len(built)} graphs for {gpu.arch}")
    codes = compile_all({q: b.source() for q, b in built.items()}, gpu.arch, say)
    place = folder / FOLDER
    place.mkdir(parents=True)
    specs: dict[str, dict[str, Any]] = {}
    for q, b in built.items():
        cubin = f"{FOLDER}/{q}.cubin"
        (folder / cubin).write_bytes(codes[q])
        plan = b.plan(cubin)
        (place / f"{q}.json").write_bytes(plan.dumps())
        specs[q] = {"graph": f"{FOLDER}/{q}.json", "nodes": len(plan.launches)}
    say(f"weights: {weights.size / 2**30:.2f} GiB")
    digest = weights.write(place / "weights.bin", say)
    variant = {
        "provider": "cuda", "format": "cuda", "gpu": gpu.arch, "multiprocessors": gpu.processors,
        "batch": order.batch,
    }  # fmt: skip
    return Written(specs, (variant,), None, {f"{FOLDER}/weights.bin": digest})
