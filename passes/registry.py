"""Passes by name, and pipelines as text: `fuse-tucker,numerics{linear=false}`."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any

from pcc.errors import PccError
from pcc.passes.manager import Pass

PASSES: dict[str, str] = {
    "canonicalize": "canonicalize:Canonicalize",
    "prune-zero": "prune:PruneZero",
    "prune-unreachable": "prune:PruneUnreachable",
    "layerize": "stacking:Layerize",
    "sum-collapse": "collapse:SumCollapse",
    "fold-leaf-sums": "leaf_sums:FoldLeafSums",
    "fold-layers": "stacking:FoldLayers",
    "fuse-tucker": "fuse:FuseTucker",
    "fuse-cpt": "fuse:FuseCpt",
    "fuse-cp": "fuse:FuseCp",
    "fold-constants": "fold_constants:FoldConstants",
    "dce": "dce:Dce",
    "expand-query": "expand_query:ExpandQuery",
    "to-tensor": "to_tensor:ToTensor",
    "draw-maps": "draw_maps:DrawMaps",
    "lazy-experts": "lazy_experts:LazyExperts",
    "contraction-order": "contraction_order:ContractionOrder",
    "numerics": "numerics:Numerics",
    "integer-projections": "integer_projections:IntegerProjections",
    "half-projections": "half_projections:HalfProjections",
}
_ITEM = re.compile(r"\s*([a-z-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def make(name: str, **options: Any) -> Pass:
    """Return a pass by name."""
    if name not in PASSES:
        raise PccError("E320", f"unknown pass {name!r}", hint=f"one of {', '.join(PASSES)}")
    module, _, cls = PASSES[name].partition(":")
    made: type[Pass] = getattr(importlib.import_module(f"pcc.passes.{module}"), cls)
    fields = {f.name: f.default for f in dataclasses.fields(made)}
    for k, v in options.items():
        if k not in fields or type(v) is not type(fields[k]):
            raise PccError(
                "E320", f"pass {name!r} has no option {k}={v!r}", hint=f"its options are {fields}"
            )
        if isinstance(v, int | float) and not isinstance(v, bool) and not 0 < v < math.inf:
            what = f"{k}={v!r} of pass {name!r} is out of range"
            raise PccError("E320", what, hint="a number above 0")
    return made(**options)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Read `name{option=value,...},name,...`."""
    out: list[Pass] = []
    at = 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if not m or m.end() == at:
            raise PccError(
                "E321",
                f"cannot read the pipeline at {text[at : at + 40]!r}",
                hint="e.g. 'canonicalize,fold-leaf-sums{grow=2},dce'",
            )
        pairs = (p.split("=", 1) for p in (m[2] or "").split(",") if p.strip())
        out.append(make(m[1], **{p[0].strip(): _value(p[-1].strip()) for p in pairs}))
        at = m.end()
    return tuple(out)


def _value(s: str) -> object:
    if s in ("true", "false"):
        return s == "true"
    for kind in (int, float):
        try:
            return kind(s)
        except ValueError:
            continue
    return s


def describe(p: Pass) -> str:
    """Return the text that `parse_pipeline` reads back as this pass."""
    changed = [
        f"{f.name}={str(v).lower() if isinstance(v, bool) else v}"
        for f in dataclasses.fields(p)
        if (v := getattr(p, f.name)) != f.default
    ]
    return p.name + ("{" + ",".join(changed) + "}" if changed else "")
