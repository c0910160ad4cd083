"""Time the hand-written kernels against the bytes that they must move, and against torch.

    PYTHONPATH=. python3 benchmarks/gpu/kernels.py [--out FILE] [--only int8]

Everything runs as CUDA graphs over more weights than the L2 holds, on random data. A product is
timed alone (with and without overlap of launches), then whole layers of two models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.launcher import DTYPES, Module, room
from pcc.backends.cuda import library
from pcc.backends.cuda.kernel import Kernel

COLD = 600 << 20  # bytes of weights in one graph: twelve times the L2
LAYERS = 4  # of a chain; their weights exceed the L2 many times
DTYPE = "bf16"


def timed(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median seconds of one replay of `work` as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        for _ in range(3):
            graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        stream.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) * 1e-3


def copy_bandwidth() -> float:
    """Return bytes read plus bytes written a second of a large copy on the device."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed(lambda: torch.neg(a, out=b))


def tensors_of(kernel: Kernel) -> dict[str, torch.Tensor]:
    """Return random inputs and room for the rest."""
    out = {}
    for a in kernel.args:
        out[a.name] = room(a)
        if a.role in ("read", "update") and DTYPES[a.dtype].is_floating_point:
            out[a.name] = (torch.randn(a.shape, device="cuda") * 0.02).to(DTYPES[a.dtype])
        if a.dtype == "u8":
            out[a.name] = other(out[a.name])
    return out


def other(w: torch.Tensor) -> torch.Tensor:
    """Return other weights of the same kind."""
    return torch.randint_like(w, 256) if w.dtype == torch.uint8 else torch.randn_like(w)


# ---------------------------------------------------------------- products alone

SHAPES = {
    "evabyte qkv": (4096, 12288, {"source": "norm", "eps": 1e-5}),
    "evabyte out": (4096, 4096, {"source": "half", "epilogue": "residual", "squares": True}),
    "evabyte gate/up": (
        4096, 22016, {"source": "norm", "eps": 1e-5, "epilogue": "gated", "out": "half"},
    ),
    "evabyte down": (11008, 4096, {"source": "half", "epilogue": "residual", "squares": True}),
    "evabyte logits": (4096, 320, {"source": "f32"}),
    "llama qkv": (3072, 5120, {"source": "norm", "eps": 1e-5}),
    "llama out": (3072, 3072, {"source": "half", "epilogue": "residual", "squares": True}),
    "llama gate/up": (
        3072, 16384, {"source": "norm", "eps": 1e-5, "epilogue": "gated", "out": "half"},
    ),
    "llama down": (8192, 3072, {"source": "half", "epilogue": "residual", "squares": True}),
    "head n=16 r=32": (4096, 16 * 32 * 320, {"source": "f32"}),
}  # fmt: skip


Case = tuple[str, int, int | None, Kernel]  # shape, rows, slabs asked for, kernel
SHAPES |= {f"{name} int8": (k, n, how | {"integers": True}) for name, (k, n, how) in SHAPES.items()}


def product_cases(sweep: bool) -> Iterator[Case]:
    """Yield shape, rows, slabs asked for, kernel."""
    for name, (k, n, options) in SHAPES.items():
        for rows in (1,) if name.startswith("head") else (1, 8, 16, 64):
            chosen = [None, *SWEEP] if sweep and rows == 16 else [None]
            for slabs in chosen:
                label = f"k{len(name)}_{k}_{n}_{rows}_{slabs or 0}"
                made = library.linear(
                    label, rows=rows, k=k, n=n, dtype=DTYPE, slabs=slabs, **options
                )
                if made.shared < 220 << 10:
                    yield name, rows, slabs, made


SWEEP = (2, 3, 4, 6, 8, 11, 12, 16)


def time_product(module: Module, kernel: Kernel, against: bool) -> dict[str, float]:
    """Return seconds of one product: in turn, overlapped, and torch's matmul."""
    base = tensors_of(kernel)
    copies = max(2, min(64, -(-COLD // base["w"].nbytes)))
    sets = [base | {"w": other(base["w"])} for _ in range(copies)]

    def run(overlap: bool) -> Callable[[], None]:
        def work() -> None:
            for s in sets:
                module.launch(kernel, s, overlap)

        return work

    result = {"bytes": base["w"].nbytes}
    result["turn"] = timed(run(False)) / copies
    result["overlap"] = timed(run(True)) / copies
    if against:
        rows, k = base["x"].shape
        n = sets[0]["w"].numel() // k
        x = torch.randn(rows, k, device="cuda", dtype=DTYPES[DTYPE])
        weights = [s["w"][: k * n].view(k, n) for s in sets]

        def multiply() -> None:
            for w in weights:
                torch.matmul(x, w)

        result["torch"] = timed(multiply) / copies
    return result


# ---------------------------------------------------------------- whole layers

Launches = list[tuple[Kernel, dict[str, str]]]


@dataclass(frozen=True)
class Form:
    """Of a layer: norms inside products or before them, 8-bit weights."""

    fused: bool
    integers: bool = False

    def __str__(self) -> str:
        parts = ("fused" if self.fused else "norms", "int8" * self.integers)
        return " ".join(filter(None, parts))


FORMS = (Form(False), Form(True), Form(True, True))


def norm_then(name: str, rows: int, k: int, n: int, fused: bool, **options: Any) -> Launches:
    """A norm and a product: one launch or two."""
    if fused:
        made = library.linear(
            f"{name}_f", rows=rows, k=k, n=n, dtype=DTYPE, source="norm", eps=1e-5, **options
        )
        return [(made, {"x": "stream", "squares": "squares"})]
    norm = library.rms_norm(f"{name}_norm", rows=rows, width=k, eps=1e-5, dtype=DTYPE)
    made = library.linear(name, rows=rows, k=k, n=n, dtype=DTYPE, source="half", **options)
    return [(norm, {"x": "stream", "y": "normed"}), (made, {"x": "normed"})]


def layer(model: str, rows: int, form: Form) -> Launches:
    """The launches of one layer; names say which buffers its kernels share."""
    eva = model == "evabyte"
    d, inner, heads, keys = (4096, 11008, 32, 32) if eva else (3072, 8192, 24, 8)
    at, fused = f"{model[0]}{rows}{str(form).replace(' ', '')}", form.fused
    wide = (heads + 2 * keys) * 128
    kind = {"integers": form.integers}
    back = {"x": "y", "y": "stream", "squares_out": "squares"}
    options = {"epilogue": "residual", "squares": fused, "source": "half", "dtype": DTYPE}
    sizes = {
        "batch": 1, "count": rows, "heads": heads, "width": 128, "angles": 64, "positions": 4096,
        "scale": 128**-0.5, "dtype": DTYPE,
    }  # fmt: skip
    if eva:
        sizes |= {"ring": 2304, "older": 257, "window": 2048, "chunk": 16}
        mixed = library.eva_attend(f"{at}_attend", **sizes)
    else:
        mixed = library.attend(f"{at}_attend", **sizes, key_heads=keys, rows=2064)
    out = library.linear(f"{at}_out", rows=rows, k=heads * 128, n=d, **options, **kind)
    down = library.linear(f"{at}_down", rows=rows, k=inner, n=d, **options, **kind)
    qkv = norm_then(f"{at}_qkv", rows, d, wide, fused, **kind)
    up = norm_then(f"{at}_up", rows, d, 2 * inner, fused, epilogue="gated", out="half", **kind)
    qkv[-1][1]["y"], up[-1][1]["y"] = "qkv", "gated"
    return [
        *qkv, (mixed, {"qkv": "qkv", "y": "y"}), (out, back),
        *up, (down, back | {"x": "gated"}),
    ]  # fmt: skip


def chain(module: Module, launches: Launches, start: int) -> dict[str, Any]:
    """Return the seconds of one layer, with and without overlap, and of each kernel in turn."""
    shared: dict[str, torch.Tensor] = {}
    layers = []
    for _ in range(LAYERS):
        for kernel, names in launches:
            mine = tensors_of(kernel)
            for name, buffer in names.items():
                if name in mine:
                    mine[name] = shared.setdefault(buffer, mine[name])
            if "start" in mine:
                mine["start"].fill_(start)
            layers.append((kernel, mine))
    weights = sum(mine["w"].nbytes for _, mine in layers if "w" in mine) / LAYERS
    caches = 0  # what of the keys and values is read
    for kernel, _ in launches:
        for a in kernel.args:
            if a.name in ("key", "value"):
                caches += a.bytes // a.shape[2] * start

    def work(overlap: bool, only: str = "") -> Callable[[], None]:
        def run() -> None:
            for kernel, mine in layers:
                if only in kernel.name:
                    module.launch(kernel, mine, overlap)

        return run

    kernels = [k.name for k, _ in launches]
    return {
        "weights": weights,
        "bytes": weights + caches,
        "turn": timed(work(False)) / LAYERS,
        "overlap": timed(work(True)) / LAYERS,
        "each": {k: timed(work(False, k)) / LAYERS for k in kernels},
    }


Chain = tuple[str, int, Form]


def products(module: Module, cases: list[Case], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Print and yield a row for each product."""
    for name, rows, slabs, kernel in cases:
        r = time_product(module, kernel, against=slabs is None and "int8" not in name)
        best = r["bytes"] / bandwidth
        print(
            f"{name:21} rows {rows:3} grid {kernel.grid!s:14} {r['bytes'] / 1e6:7.1f} MB"
            f"  bound {best * 1e6:7.2f} us  {r['turn'] * 1e6:7.2f} ({best / r['turn']:4.0%})"
            f"  overlap {r['overlap'] * 1e6:7.2f} ({best / r['overlap']:4.0%})"
            f"  torch {r.get('torch', 0) * 1e6:7.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()
        yield {"shape": name, "rows": rows, "grid": kernel.grid, "asked": slabs, **r}


def layers(
    module: Module, chains: dict[Chain, Launches], bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Print and yield a row for each layer."""
    for (model, rows, form), launches in chains.items():
        r = chain(module, launches, 1024)
        best = r["bytes"] / bandwidth
        each = "  ".join(f"{k.split('_', 1)[1]} {v * 1e6:.1f}" for k, v in r["each"].items())
        print(
            f"{model:8} rows {rows:3} {form!s:16} bound {best * 1e6:6.1f} us"
            f"  layer {r['turn'] * 1e6:6.1f} ({r['turn'] / best:.2f}x)"
            f"  overlap {r['overlap'] * 1e6:6.1f} ({r['overlap'] / best:.2f}x)  {each}",
            flush=True,
        )
        torch.cuda.empty_cache()
        yield {"model": model, "rows": rows, **asdict(form), **r}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="", help="in the name of a product or layer, e.g. int8")
    given = parser.parse_args()
    cases = [c for c in product_cases(given.sweep) if given.only in c[0]]
    chains = {
        (model, rows, form): layer(model, rows, form)
        for model in ("evabyte", "llama")
        for rows in (1, 8, 16)
        for form in FORMS
        if given.only in f"{model} {form}"
    }
    bandwidth, card = copy_bandwidth(), torch.cuda.get_device_name()
    print(f"{card}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    unique = {k.name: k for k in [c[3] for c in cases] + [k for c in chains.values() for k, _ in c]}
    module = Module(list(unique.values()))
    report: dict[str, Any] = {
        "card": card, "copy": bandwidth, "products": list(products(module, cases, bandwidth)),
        "layers": list(layers(module, chains, bandwidth)),
    }  # fmt: skip
    if given.out:
        with open(given.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
