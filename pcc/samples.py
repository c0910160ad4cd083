"""Samples: seeded inputs of every query, their expected outputs, and ONNX Runtime's error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.interp.rounding import TOLERANCE, bounds, error
from pcc.interp.run import run
from pcc.ir.core import Op, Values
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.knobs import CHECK_PARAMETERS
from pcc.tensor.core import Const

ROWS = 3


def sample_inputs(
    circuit: Circuit, spec: Mapping[str, Any], seed: int, rows: int = ROWS
) -> dict[str, Values]:
    """Return seeded inputs for a query of the manifest: values in range, exact in float32."""
    rng = np.random.default_rng([seed, 29])
    out: dict[str, Values] = {}
    for i in spec["inputs"]:
        shape = (rows if i["shape"][0] == "B" else 1, *i["shape"][1:])
        name = i["name"]
        if name == "x":
            cards = np.array([v or 3 for v in circuit.cards])
            x = rng.integers(0, cards, shape)
            out[name] = x if i["dtype"] == "i64" else x.astype(np.float32)
        elif name == "carry":
            out[name] = rng.integers(0, circuit.cards[0], shape)
        elif i["dtype"] == "bool":
            out[name] = rng.random(shape) < 0.5
        elif name == "u":
            out[name] = (rng.integers(0, 1 << 24, shape) / (1 << 24)).astype(np.float32)
        else:
            out[name] = rng.normal(size=shape).astype(np.float32)
    return out


def write_samples(
    circuit: Circuit,
    modules: Mapping[str, Module],
    specs: Mapping[str, Any],
    folder: Path,
    *,
    measure: bool = True,
) -> dict[str, tuple[float, float]]:
    """Write `samples/QUERY.npz` (inputs `in.*`, float64 outputs `out.*`).

    Returns each query's measured error and how large it may be (`pcc.interp.rounding`). Nothing is
    measured where onnxruntime is not installed, or without `measure`. Heads that are not in memory
    and too large for float64 have no samples.
    """
    (folder / "samples").mkdir()
    measured: dict[str, tuple[float, float]] = {}
    for q, module in modules.items():
        if sum(n.value.size for n in module.nodes() if _unread(n)) > CHECK_PARAMETERS:
            continue  # `pcc verify` says so
        inputs = sample_inputs(circuit, specs[q], 0)
        wanted = [np.asarray(v) for v in run(module.roots, inputs, Real())]
        wanted = [v.astype(np.float64) if v.dtype.kind == "f" else v for v in wanted]
        named = dict(zip([o for o, _ in module.outputs], wanted, strict=True))
        arrays = {f"in.{k}": v for k, v in inputs.items()} | {
            f"out.{k}": v for k, v in named.items()
        }
        np.savez_compressed(folder / "samples" / f"{q}.npz", **arrays)
        if not measure:
            continue
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            continue
        from pcc.runtime.ort import open_session

        session = open_session(folder / specs[q]["graph"], "cpu", 1)
        got = session.run([o["onnx"] for o in specs[q]["outputs"]], inputs)
        measured[q] = worst(circuit, q, inputs, named, dict(zip(named, got, strict=True)))
    return measured


def _unread(n: Op) -> TypeGuard[Const]:
    return isinstance(n, Const) and n.value.recipe is not None


def worst(
    circuit: Circuit,
    query: str,
    inputs: Mapping[str, Values],
    want: Mapping[str, Values],
    got: Mapping[str, Values],
) -> tuple[float, float]:
    """Return the error that is largest beside its bound, and that bound."""
    limits = bounds(circuit, query, inputs, want)
    found = [error(np.asarray(want[k]), v, limits[k]) for k, v in got.items()]
    return max(found, key=lambda f: f[0] / (f[1] or TOLERANCE))
