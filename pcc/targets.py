"""What each target can do, as data: lowering reads it; nothing asks for a target by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pcc.errors import PccError

HALF_OF: Mapping[str, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
PRECISIONS = tuple(HALF_OF)
INT8 = ("head", "verifier", "all")  # whose matrices may be 8-bit integers

# Faults. The largest of numbers that are all -inf is the lowest finite one, and its index may be
# out of range: a reduction begins at the lowest number.
INFINITE_MAX = "infinite-max"
# TopK takes the numbers with which it fills a row for larger than -inf, so that indices lie beyond
# the row; in wide rows equal elements come in any order.
ORDER = "order"
# LogSoftmax is x - (max + log sum): where |x| is large it rounds by 2^-24 |x|.
LOG_SOFTMAX = "log-softmax"
FAULTS = (INFINITE_MAX, ORDER, LOG_SOFTMAX)  # of ONNX Runtime's CUDA kernels
# Running sums, which are products with a triangle there, take subnormal numbers for zero.
SUBNORMAL = "subnormal"


@dataclass(frozen=True)
class Target:
    """A runtime, and the form of graphs that it wants.

    `format`: who writes the files: "onnx", "tensorrt" or "cuda". `provider`: of `pcc.load`.
    `opset`: of the ONNX graphs, 0 for none. `precisions`: of stored weights and caches.
    `int8`: the precisions beside which matrices may be 8-bit integers.
    `static`: the batch and the rows of caches are fixed when compiling, and no node computes a
    size. `branches`: graphs may skip work by `If`.
    `weights`: "file", initializers in one file beside the graphs, or "inputs", where large ones are
    graph inputs that all graphs share. `one_row`: a second graph for calls of one row.
    `attention`: "parts", scores and softmax spelled out; "mask", the fused operator with an
    additive mask over the whole cache; "nonpad", the fused operator with the number of valid rows
    where no row is hidden otherwise, else parts. `kv`: caches are written by "scatter"
    (TensorScatter), "scatter_nd" (ScatterND), or "scatter_io": TensorScatter where the cache is an
    input of the graph and what becomes of it an output, else ScatterND. `rings`: TensorScatter may
    wrap around.
    `runtime`: the least release of it, where that is not what the opset says.
    `typed`: a graph's types are the engine's; without, the writer pins the precision of each layer.
    `wide`: results of products of halves are f32, as in the IR; without, they are halves as well.
    `faults`: what its kernels get wrong, by the names above; lowering goes round it.
    """

    name: str
    format: str
    provider: str
    opset: int
    precisions: tuple[str, ...] = PRECISIONS
    int8: tuple[str, ...] = ()
    static: bool = False
    branches: bool = True
    weights: str = "file"
    one_row: bool = False
    attention: str = "parts"
    kv: str = "scatter"
    rings: bool = False
    runtime: str = ""  # the least ONNX Runtime, where it is not the opset that says it
    typed: bool = True
    wide: bool = False
    faults: tuple[str, ...] = ()

    def at_opset(self, opset: int | None) -> Target:
        """Return this target at another opset. Errors: E410."""
        if opset is None or opset == self.opset:
            return self
        known = OPSETS.get(self.name, (self.opset,))
        if opset not in known:
            what = f"opset {opset} is not supported by target {self.name!r}"
            hint = f"choose one of {known}" if self.opset else "it has no ONNX graphs"
            raise PccError("E410", what, hint=hint)
        return replace(self, opset=opset, kv="scatter_nd" if opset < 24 else self.kv)


OPSETS: Mapping[str, tuple[int, ...]] = {"onnx": (17, 24)}
_ALL = (
    # ONNX Runtime on a CPU has no bf16 products.
    Target("onnx", "onnx", "cpu", 24, ("fp32", "fp16"), ("fp32", "fp16"), one_row=True),
    Target(
        "onnx-cuda", "onnx", "cuda", 24, int8=PRECISIONS,
        static=True, branches=False, weights="inputs", attention="nonpad", rings=True,
        runtime="1.28",  # before, causal attention over a cache was wrong, or missing
        faults=FAULTS,  # seen with 1.31.1
    ),
    # 8.6, the last release that PyPI has: no bf16, no type but what the builder chooses.
    Target(
        "tensorrt", "tensorrt", "tensorrt", 17, ("fp32", "fp16"),
        static=True, branches=False, kv="scatter_nd", typed=False,
        faults=(ORDER, SUBNORMAL),  # of `ArgMax`: backends/tensorrt/largest.py
    ),
    Target(
        "tensorrt-10", "tensorrt", "tensorrt", 24,
        static=True, branches=False, attention="mask", kv="scatter_io",
    ),
    Target(
        "tensorrt-11", "tensorrt", "tensorrt", 24,
        static=True, branches=False, attention="mask", kv="scatter_io",
    ),
    Target(
        "tensorrt-rtx", "tensorrt", "tensorrt", 24,
        static=True, branches=False, attention="mask", kv="scatter_io",
    ),
    # Its products round x to a half type: f32 products use no tensor cores.
    Target(
        "cuda", "cuda", "cuda", 0, int8=("fp16", "bf16"),
        static=True, branches=False, wide=True,
    ),
)  # fmt: skip
TARGETS: Mapping[str, Target] = {t.name: t for t in _ALL}


def target_of(name: object, precision: object = "fp32", opset: int | None = None) -> Target:
    """Return a target by name that has this precision and opset. Errors: E141, E410."""
    found = TARGETS.get(name) if isinstance(name, str) else None
    if found is None:
        hint = f"known are: {', '.join(TARGETS)}"
        raise PccError("E141", f"target={str(name)[:60]!r} is not supported", hint=hint)
    if precision not in found.precisions:
        what = f"precision={str(precision)[:60]!r} is not supported by target {found.name!r}"
        raise PccError("E141", what, hint=f"it has: {', '.join(found.precisions)}")
    return found.at_opset(opset)


def int8_of(target: Target, precision: str, int8: object) -> tuple[bool, bool]:
    """Return whether the head's, and the verifier's, matrices become integers. Errors: E141."""
    if int8 is None:
        return False, False
    if int8 not in INT8:
        raise PccError("E141", f"int8={str(int8)[:60]!r}", hint=f"one of {', '.join(INT8)}")
    if precision not in target.int8:
        what = f"int8 is not supported by target {target.name!r} with precision {precision!r}"
        known = (f"{t.name} ({', '.join(t.int8)})" for t in TARGETS.values() if t.int8)
        raise PccError("E141", what, hint=f"it is by: {', '.join(known)}")
    return int8 != "verifier", int8 != "head"
