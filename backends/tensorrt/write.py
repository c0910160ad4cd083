"""The graphs of a bundle as TensorRT engines, `engines/VARIANT/QUERY.plan`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pcc.backends.onnx.lower import lower
from pcc.backends.onnx.weights import save_models
from pcc.backends.tensorrt.build import Builder
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.library import gpu_architecture
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import TensorRt, runtime_of
from pcc.emission import Emission, Order, Say, Written
from pcc.errors import PccError
from pcc.files import read_bounded

CACHE, MAX_CACHE = "timing.cache", 1 << 28


def write_graphs(order: Order, folder: Path, say: Say) -> Written:
    """Write an engine for every query, from ONNX graphs that share one weight file."""
    r = runtime_of(order.target.name)
    r.takes(order.precision)
    options = BuildOptions.of(order.engine)
    options.check_names(order.emissions)
    # First of all, so that a missing library costs nothing.
    builder = Builder(r, _for_gpu(options, order.gpu, r), _timings(options))
    arch = _architecture(builder)
    models: dict[str, ir.Model] = {}
    for q, e in order.emissions.items():
        say(f"graph '{q}'")
        models[q] = static_model(order, q, e, r)
    graphs = folder / "graphs"
    graphs.mkdir()
    file = save_models(models, graphs, say=say)
    place = f"engines/{r.target}-{arch}"
    (folder / place).mkdir(parents=True)
    specs, said = _engines(builder, models, folder, place, say)
    if builder.cache:
        (folder / place / CACHE).write_bytes(builder.cache)
    variant = _variant(builder, order, arch, said)
    if not options.keep_onnx:
        shutil.rmtree(graphs)
        return Written(specs, (variant,))
    return Written(specs, (variant,), file, {f"graphs/{file.path.name}": file.sha256})


def _timings(options: BuildOptions) -> bytes:
    """Return the timing cache of an earlier build, if one is named."""
    if not options.timings:
        return b""
    try:
        return read_bounded(Path(options.timings), MAX_CACHE, "E430")
    except OSError as e:
        raise PccError("E430", f"cannot read timings: {e.strerror}", at=options.timings) from None


def static_model(order: Order, query: str, e: Emission, r: TensorRt) -> ir.Model:
    """Return a query's graph at one batch size and one cache size, in the forms of a runtime."""
    doc = {"pcc.query": query, "pcc.circuit": order.name}
    target = order.target
    if order.precision not in r.fused:
        target = replace(target, attention="parts")
    return prepare(lower(e.module, target, batch=order.batch, inputs=e.inputs, doc=doc), r)


def _engines(
    builder: Builder, models: dict[str, ir.Model], folder: Path, place: str, say: Say
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    specs: dict[str, dict[str, Any]] = {}
    said: list[str] = []
    for q, model in models.items():
        specs[q] = {"graph": f"graphs/{q}.onnx", "nodes": len(model.graph)}
        if not builder.options.builds(q):
            continue
        made = builder.build(model, folder / "graphs" / f"{q}.onnx")
        name = f"{place}/{q}.plan"
        with (folder / name).open("wb") as out:
            out.write(made.plan)
        size = (folder / name).stat().st_size
        say(f"engine '{q}': {made.layers} layers, {size / 1e6:.1f} MB, {made.seconds:.1f} s")
        specs[q] |= {"graph": name, "layers": made.layers}
        if made.pinned:
            specs[q]["pinned"] = made.pinned
        said += [f"{q}: {x}" for x in made.said]
    return specs, said


def _for_gpu(options: BuildOptions, gpu: str, r: TensorRt) -> BuildOptions:
    """Take the compute capability of `gpu`, "sm_89", for a builder that works without one."""
    if not gpu:
        return options
    if not r.offline:
        what = f"TensorRT {r.name} builds for the GPU that is present, not for gpu={gpu[:40]!r}"
        raise PccError("E430", what, hint="leave gpu out, or --target tensorrt-rtx")
    digits = gpu.removeprefix("sm_")
    if not digits.isdigit() or not 2 <= len(digits) <= 3:
        raise PccError("E430", f"gpu={gpu[:40]!r}", hint="like sm_89")
    return replace(options, capability=f"{digits[:-1]}.{digits[-1]}")


def _architecture(builder: Builder) -> str:
    if builder.runtime.offline:
        return f"sm_{builder.options.capability.replace('.', '')}"
    return gpu_architecture()


def _variant(builder: Builder, order: Order, arch: str, said: list[str]) -> dict[str, Any]:
    r, options = builder.runtime, builder.options
    return {
        "provider": "tensorrt",
        "format": "tensorrt",
        "gpu": arch,
        "runtime": r.name,
        "module": r.module,
        "version": str(builder.module.__version__),
        "precision": order.precision,
        "aliased": r.aliased,
        "options": options.document(),
        "flags": options.flags(r),
        "said": said[:100],
    }
