"""The pipelines, as data, and the order that they must keep, with reasons."""

from __future__ import annotations

from pcc.errors import PccError
from pcc.passes.manager import Pass
from pcc.passes.registry import make

CIRCUIT = (
    "canonicalize",
    "prune-zero",
    "canonicalize",
    "layerize",
    "prune-unreachable",
    "sum-collapse",
    "fold-leaf-sums",
    "fold-layers",
    "prune-unreachable",
    "canonicalize",
    "fuse-tucker",
    "fuse-cpt",
    "fuse-cp",
    "fold-constants",
    "dce",
)
TENSOR = (
    "expand-query",
    "to-tensor",
    "contraction-order",
    "numerics",
    "fold-constants",
    "dce",
)
MAPS = ("draw-maps",)  # right before LAZY, or after "to-tensor", for targets on GPUs
LAZY = (  # from tensors that select experts
    "lazy-experts",
    "contraction-order",
    "numerics",
    "fold-constants",
    "dce",
)
STORAGE = ("integer-projections", "half-projections")  # of a head as it comes, where asked for
ORDER: tuple[tuple[str, str, str], ...] = (
    ("integer-projections", "half-projections", "integers are of the weights as they were trained"),
    ("prune-zero", "layerize", "a dropped term changes the fan-in that nodes are grouped by"),
    ("sum-collapse", "fold-leaf-sums", "a collapsed sum over inputs is folded as one table"),
    ("fold-leaf-sums", "fold-layers", "folded tables stack; sums over inputs would hide them"),
    ("fold-layers", "fuse-tucker", "a stacked product layer is fused once, for all folds"),
    ("fold-layers", "fuse-cpt", "a stacked product layer is fused once, for all folds"),
    ("fuse-tucker", "fold-constants", "fused weights are built symbolically"),
    ("expand-query", "to-tensor", "compound queries have no lowering of their own"),
    ("to-tensor", "contraction-order", "contractions exist only as tensors"),
    ("contraction-order", "numerics", "orders are chosen on linear expressions"),
    ("to-tensor", "draw-maps", "draws exist only as tensors"),
    ("draw-maps", "lazy-experts", "a row selected from a product hides its table"),
    ("draw-maps", "numerics", "tables are joined before their logarithms are chosen"),
    ("lazy-experts", "numerics", "a look-up in a whole table would keep that table computed"),
    ("numerics", "fold-constants", "logarithms of trained tables are taken at compile time"),
)


def check(pipeline: tuple[str, ...]) -> None:
    """Refuse an order that ORDER forbids: of two passes, the first runs before the last one."""
    last = {name: i for i, name in enumerate(pipeline)}
    first = {name: i for i, name in reversed(list(enumerate(pipeline)))}
    for before, after, reason in ORDER:
        if before in first and after in last and first[before] > last[after]:
            what = f"'{before}' must come before '{after}': {reason}"
            raise PccError("E322", what, hint="--any-order runs it as it is, checked as ever")


check(CIRCUIT)
check(TENSOR)
check((*MAPS, *LAZY))
check(STORAGE)


def circuit_pipeline(*, maximise: bool = False) -> tuple[Pass, ...]:
    """Return the passes over circuits; with `maximise`, those that also keep max-product."""
    made = (make(name) for name in CIRCUIT)
    return tuple(p for p in made if p.keeps_max or not maximise)


def tensor_pipeline(*, maps: bool = False) -> tuple[Pass, ...]:
    """Return the passes from a query to tensors; with `maps`, chains of draws as maps (GPUs)."""
    made = [make(name) for name in TENSOR]
    if maps:
        at = TENSOR.index("to-tensor") + 1
        made[at:at] = [make(name, whole=True) for name in MAPS]
    return tuple(made)


def storage_pipeline(dtype: str, *, int8: bool = False) -> tuple[Pass, ...]:
    """Return the passes that choose in what trained arrays are stored; none for f32 alone."""
    wanted = {"integer-projections": int8, "half-projections": dtype != "f32"}
    return tuple(make(name, dtype=dtype) for name in STORAGE if wanted[name])


def lazy_pipeline(*, maps: bool = False) -> tuple[Pass, ...]:
    """Return the passes over tensors in which few of the experts are selected; `maps` as above."""
    return tuple(make(name) for name in ((*MAPS, *LAZY) if maps else LAZY))
