"""What a row of GPU results is called: two bundles that differ in speed never share a name.

`benchmarks/gpu/merge.py` lets a newer row of a name replace an older one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcc import knobs
from pcc.backends.tensorrt.options import BuildOptions

# Options of a TensorRT build that choose other kernels; the others decide what lies where.
KERNELS = ("profiles", "refit", "version_compatible", "hardware", "level", "workspace")


def mixture(precision: Mapping[str, str]) -> str:
    """Return the one word for a manifest's map of precisions.

    "bf16" or "bf16+int8" where head and verifier have 8-bit integers both or neither, else whose
    they are: "bf16, head int8".
    """
    usual = precision["default"]
    verifier = precision.get("verifier", usual)
    integers = [p for p in ("head", "verifier") if precision.get(p, usual).endswith("+int8")]
    if len(integers) != 1:
        return verifier
    return f"{verifier.removesuffix('+int8')}, {integers[0]} int8"


def forms(manifest: Mapping[str, Any]) -> list[str]:
    """Return what of a bundle's rounds and engines is not the default, in a word each."""
    generation = manifest["generation"]
    out = [generation["proposal"]] * (generation["proposal"] != knobs.PROPOSAL)
    inputs = {i["name"] for i in manifest["queries"]["step"]["inputs"]}
    out += ["truncation"] * ("draft_temperature" in inputs)
    variant = (manifest.get("variants") or [{}])[0]
    given, usual = variant.get("options") or {}, BuildOptions().document()
    for name in KERNELS:
        value = given.get(name, usual[name])
        if value != usual[name]:
            out.append(name if value is True else f"{name}={value}")
    return out


def name_of(about: Mapping[str, Any], context: int) -> str:
    """Return the name of a row from its entries."""
    sizes = (f"n{about['n']}", f"r{about['r']}", f"b{about['batch']}", f"c{context}")
    precision = about["precision"].replace(", ", "-").replace(" ", "-")
    parts = (about["backend"], about["shape"], about["architecture"], *sizes, precision)
    return "-".join(map(str, (*parts, *about["forms"])))
