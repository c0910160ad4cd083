"""What each TensorRT takes, as data: the rest of this package asks these fields, never a version.

| field | says |
|---|---|
| `target` | of `compile` |
| `module`, `least`, `below` | the Python module, and the versions that a description is of |
| `opset` | of the ONNX graphs that its parser reads |
| `precisions` | of stored weights and caches |
| `typed` | strongly typed: types are those of the graph. Else they are hints, and are pinned |
| `network`, `always` | flags of every network, and of every build |
| `options` | build options by our name, with the flags that they set in this release |
| `hardware` | levels of compatibility by our name, with the member of HardwareCompatibilityLevel |
| `wide` | 64-bit integers cross the engine's border; else they cross as pairs of 32 bits |
| `aliased` | a cache is updated in place; else the runtime copies what the engine returns |
| `fused` | ONNX's attention operator, by the precisions that it may have |
| `spelled` | operators that are written out: `CumSum`, of which the parser makes a loop; `LogSoftmax`, of which it makes log(softmax), -inf where a probability leaves float32; `ArgMax`, which gives no index of a row that is all -inf |
| `unrolled` | up to how many elements a reduction is written out element by element |
| `refused` | operators that the parser refuses or understands otherwise |
| `attributes` | attributes that it drops, or reads otherwise, unless they have this value |
| `benign` | how warnings begin that say nothing about the result, after the place in the parser's source; regular expressions |
| `previews` | features that engines with profiles need: several contexts of one profile |
| `timings` | keeps a cache of timed tactics |
| `doubtful` | precisions in which every verifier so far was refused once it was built: floats that enter or leave were stored as halves |
| `offline` | builds without a GPU, for a named compute capability |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcc.errors import PccError

# Counter-based random numbers, powers and reductions while scattering are in no release.
NOWHERE = frozenset(
    ("Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Compress",
     "CumProd", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike", "Unique")
)  # fmt: skip
NOT_BEFORE_10 = frozenset(("Attention", "Gelu", "RMSNormalization", "RotaryEmbedding", "Swish",
                           "TensorScatter"))  # fmt: skip


@dataclass(frozen=True)
class TensorRt:
    """One kind of TensorRT."""

    name: str
    target: str
    module: str
    package: str
    least: tuple[int, int]
    below: tuple[int, int]
    opset: int
    precisions: tuple[str, ...]
    typed: bool
    network: tuple[str, ...]
    always: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    hardware: Mapping[str, str]
    wide: bool
    aliased: bool
    fused: tuple[str, ...]
    spelled: tuple[str, ...]
    unrolled: int
    refused: frozenset[str]
    attributes: Mapping[tuple[str, str], object]
    benign: tuple[str, ...]
    previews: tuple[str, ...] = ()
    timings: bool = True
    doubtful: tuple[str, ...] = ()
    offline: bool = False

    def takes(self, precision: str) -> None:
        """Refuse a precision that this runtime lacks."""
        if precision not in self.precisions:
            what = f"TensorRT {self.name} has no {precision}"
            raise PccError("E141", what, hint=f"it has {', '.join(self.precisions)}")


OLD_OPTIONS = {"version_compatible": ("VERSION_COMPATIBLE",), "refit": ("REFIT",)}
NEW_OPTIONS = {**OLD_OPTIONS, "refit_identical": ("REFIT_IDENTICAL",), "strip": ("STRIP_PLAN",)}
NEW_HARDWARE = {"ampere_plus": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
ATTRIBUTES: dict[tuple[str, str], object] = {
    ("Attention", "is_causal"): 0,  # read as "from the upper left", whatever the rows mean
    ("Attention", "softcap"): 0.0,
    # In which type squares are summed: some parsers obey, some do not, and half overflows.
    ("LayerNormalization", "stash_type"): 1,
    ("RMSNormalization", "stash_type"): 1,
    ("TensorScatter", "mode"): "linear",
    ("ScatterElements", "reduction"): "none",
    ("ScatterND", "reduction"): "none",
}
# That an input has 64-bit integers, as it should; that there is one logger to a process.
BINDINGS = (r"Make sure (input|output) .* has Int64 binding", "The logger passed into ")
# Of 8.6, in parsers and builder of that release:
OLD_REMARKS = (
    # Said of the first one. What 32 bits do not hold is refused before, but for open ends of
    # slices, which a clamped end leaves open.
    "Your ONNX model has been generated with INT64 weights, while TensorRT does not natively "
    r"support INT64\. Attempting to cast down to INT32\.",
    "One or more weights outside the range of INT32 was clamped",
    # The parser sets the type of the indices of each ArgMax, to what it is.
    r"Tensor DataType is determined at build time for tensors not marked as input or output\.",
    "CUDA lazy loading is not enabled",
)
MODERN: dict[str, Any] = {
    "opset": 24,
    "precisions": ("fp32", "fp16", "bf16"),
    "typed": True,
    "wide": True,
    "aliased": True,
    "fused": ("fp16", "bf16"),
    "spelled": ("LogSoftmax",),
    "unrolled": 4,
    "refused": NOWHERE,
    "attributes": ATTRIBUTES,
    "benign": BINDINGS,
}

RUNTIMES: dict[str, TensorRt] = {
    r.name: r
    for r in (
        TensorRt(
            "8.6",
            target="tensorrt",
            module="tensorrt",
            package="tensorrt==8.6.*",
            least=(8, 6),
            below=(8, 7),
            opset=17,
            precisions=("fp32", "fp16"),
            typed=False,
            network=("EXPLICIT_BATCH",),
            always=("OBEY_PRECISION_CONSTRAINTS",),
            options=OLD_OPTIONS,
            hardware={"ampere_plus": "AMPERE_PLUS"},
            wide=False,
            aliased=False,
            fused=(),
            spelled=("LogSoftmax", "CumSum", "Div", "Equal", "Where", "ArgMax"),
            unrolled=4,
            refused=NOWHERE | NOT_BEFORE_10,
            attributes=ATTRIBUTES,
            benign=(*BINDINGS, *OLD_REMARKS),
            previews=("PROFILE_SHARING_0806",),  # later releases do so anyway
            doubtful=("fp16",),
        ),
        TensorRt(
            "10",
            target="tensorrt-10",
            module="tensorrt",
            package="tensorrt>=10.15,<11",
            least=(10, 15),
            below=(11, 0),
            network=("STRONGLY_TYPED",),
            always=(),
            options=NEW_OPTIONS,
            hardware=NEW_HARDWARE,
            **MODERN,
        ),
        TensorRt(
            "11",
            target="tensorrt-11",
            module="tensorrt",
            package="tensorrt>=11,<12",
            least=(11, 0),
            below=(12, 0),
            network=(),  # every network is strongly typed
            always=(),
            options=NEW_OPTIONS,
            hardware=NEW_HARDWARE,
            **MODERN,
        ),
        TensorRt(
            "rtx",
            target="tensorrt-rtx",
            module="tensorrt_rtx",
            package="tensorrt-rtx",
            least=(1, 3),
            below=(2, 0),
            network=("STRONGLY_TYPED",),
            always=(),
            # Without a GPU, plans with exchangeable weights do not build; there is no lean runtime.
            options={"version_compatible": ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")},
            hardware={},  # it warns, and writes the same plan: `capability` says where one runs
            timings=False,
            offline=True,
            **MODERN,
        ),
    )
}


def runtime_of(target: str) -> TensorRt:
    """Return the description of a target."""
    for r in RUNTIMES.values():
        if r.target == target:
            return r
    known = ", ".join(r.target for r in RUNTIMES.values())
    raise PccError("E430", f"no TensorRT is called {target[:40]!r}", hint=f"one of {known}")


def runtime_for(module: str, version: str) -> TensorRt:
    """Return the description of an installed version. Raises X331 where there is none."""
    parts = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
    for r in RUNTIMES.values():
        if r.module == module and r.least <= parts < r.below:
            return r
    known = ", ".join(r.package for r in RUNTIMES.values())
    raise PccError("X331", f"no description of {module} {version[:40]}", hint=f"known are {known}")
