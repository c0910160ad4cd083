"""The graphs of a bundle as TensorRT engines, `engines/VARIANT/QUERY.plan`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pcc.backends.onnx.lower import lower
from pcc.backends.onnx.weights import save_models
from pcc.backends.tensorrt.build import Builder, Built
from pcc.backends.tensorrt.compare import Constant
from pcc.backends.tensorrt.forms import prepare
from pcc.backends.tensorrt.library import gpu_architecture
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.parts import Engines, Tables, document, engines_of
from pcc.backends.tensorrt.runtimes import TensorRt, runtime_of
from pcc.backends.tensorrt.taken import Taken
from pcc.backends.tensorrt.worker import Task
from pcc.backends.tensorrt.worker import run as side_by_side
from pcc.bundle import REFIT, WEIGHTS
from pcc.emission import Emission, Order, Say, Written
from pcc.errors import PccError
from pcc.files import read_bounded

CACHE, MAX_CACHE = "timing.cache", 1 << 28
TABLES = "tables.bin"


def write_graphs(order: Order, folder: Path, say: Say) -> Written:
    """Write an engine for every query, from ONNX graphs that share one weight file."""
    r = runtime_of(order.target.name)
    r.takes(order.precision)
    options = BuildOptions.of(order.engine)
    options.check_names(order.emissions)
    # First of all, so that a missing library costs nothing.
    builder: Builder | Taken
    if options.plans:
        builder = Taken(r, options, order.engine)
        options, arch = builder.options, builder.arch
    else:
        builder = Builder(r, _for_gpu(options, order.gpu, r), _timings(options))
        arch = _architecture(builder)

    verifies = any(e.parts is not None for e in order.emissions.values())
    if verifies and order.precision in r.doubtful and not isinstance(builder, Taken):
        say(f"TensorRT {r.name} has refused every verifier in {order.precision} so far, after it "
            "was built (E439, docs/tensorrt.md): --precision fp32, or --target cuda")  # fmt: skip

    def lowered(name: str, e: Emission) -> ir.Model:
        say(f"graph '{name}'")
        return static_model(order, name, e, r)

    engines = engines_of(order.emissions, lowered, divide=options.profiles, wide=r.wide,
                         layers=options.layers)  # fmt: skip
    graphs = folder / "graphs"
    graphs.mkdir()
    file = save_models(engines.models, graphs, say=say)
    place = f"engines/{r.target}-{arch}"
    (folder / place).mkdir(parents=True)
    built = _built(builder, engines, order.emissions, folder, place, say)
    tables = Tables()
    specs = {q: _spec(q, e, engines, built, tables, f"{place}/{TABLES}")
             for q, e in order.emissions.items()}  # fmt: skip
    if isinstance(builder, Taken):
        written = listed_weights(builder.weights, tables, f"{place}/{TABLES}")
        (folder / place / REFIT).write_text(json.dumps(written))
    tables.write(folder / place / TABLES)
    if builder.cache:
        (folder / place / CACHE).write_bytes(builder.cache)
    variant = _variant(builder, order, arch, engines, built)
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


def _built(
    builder: Builder | Taken,
    engines: Engines,
    queries: Collection[str],
    folder: Path,
    place: str,
    say: Say,
) -> dict[str, tuple[str, Built]]:
    """Build the engines that are asked for; return the file and the making of each by name."""
    wanted = {name for q in queries if builder.options.builds(q) for name in engines.of(q)}
    names = [name for name in engines.models if name in wanted]
    paths = {name: folder / "graphs" / f"{name}.onnx" for name in names}
    plans = {name: f"{place}/{name}.plan" for name in names}
    out: dict[str, tuple[str, Built]] = {}

    def done(name: str, made: Built) -> None:
        size = (folder / plans[name]).stat().st_size
        say(f"engine '{name}': {made.layers} layers, {size / 1e6:.1f} MB, {made.seconds:.1f} s")
        out[name] = plans[name], made

    if isinstance(builder, Taken) or builder.options.jobs == 1 or len(names) == 1:
        for name in names:
            made = builder.build(engines.models[name], paths[name], engines.profiles(name))
            with (folder / plans[name]).open("wb") as plan:
                plan.write(made.plan)
            made.plan = None  # it may be as large as the model
            done(name, made)
        return out
    options, cache = builder.options.document(), ""
    if builder.cache:
        (folder / place / CACHE).write_bytes(builder.cache)
        cache = str(folder / place / CACHE)
    tasks = [Task(builder.runtime.name, options, str(paths[name]), str(folder / plans[name]),
                  engines.profiles(name), cache) for name in names]  # fmt: skip
    tasks.sort(key=lambda t: -len(engines.models[t.name].graph))  # what takes longest goes first
    for task, made, timings in side_by_side(tasks, builder.options.jobs):
        builder.add_timings(timings)
        done(task.name, made)
    return {name: out[name] for name in names}


def _spec(
    query: str, emission: Emission, engines: Engines, built: Mapping[str, tuple[str, Built]],
    tables: Tables, file: str,
) -> dict[str, Any]:  # fmt: skip
    """Return what the manifest says of a query: its engine, the last of its parts."""
    names = engines.of(query)
    spec: dict[str, Any] = {
        "graph": f"graphs/{names[-1]}.onnx",
        "nodes": sum(len(engines.models[name].graph) for name in names),
    }
    if not all(name in built for name in names):
        return spec
    spec |= {
        "graph": built[names[-1]][0],
        "layers": sum(built[name][1].layers for name in names),
    }
    pinned = Counter[str]()
    for name in names:
        pinned.update(built[name][1].pinned)
    if pinned:
        spec["pinned"] = dict(pinned)
    plans = {name: built[name][0] for name in names}
    parts = document(engines, query, emission, plans, tables, file)
    return spec | ({"parts": parts} if parts else {})


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


def listed_weights(
    weights: Mapping[str, list[Constant]], tables: Tables, file: str
) -> dict[str, list[dict[str, Any]]]:
    """Return, by graph, where the runtime finds each float constant; `file`: those in no other."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, listed in weights.items():
        out[name] = []
        for w in listed:
            entry: dict[str, Any] = {"name": w.name, "dtype": w.dtype, "shape": w.shape,
                                     "changed": w.changed}  # fmt: skip
            if w.place is not None:
                entry |= {"file": WEIGHTS, "offset": w.place[0]}
            else:
                entry |= {"file": file, "offset": tables.place_bytes(w.raw)}
            out[name].append(entry)
    return out


def _architecture(builder: Builder) -> str:
    if builder.runtime.offline:
        return f"sm_{builder.options.capability.replace('.', '')}"
    return gpu_architecture()


def _variant(
    builder: Builder | Taken, order: Order, arch: str, engines: Engines,
    built: Mapping[str, tuple[str, Built]],
) -> dict[str, Any]:  # fmt: skip
    r, options = builder.runtime, builder.options
    said = [f"{name}: {x}" for name, (_, made) in built.items() for x in made.said]
    profiles = {
        file: [{"tokens": w, "shapes": s}
               for w, s in zip(engines.widths[name], engines.profiles(name), strict=True)]
        for name, (file, _) in built.items() if name in engines.merged
    }  # fmt: skip
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
        "engines": {
            file: {"layers": made.layers, "pinned": made.pinned} for file, made in built.values()
        },
        **({"profiles": profiles} if profiles else {}),
        **({"refit": True} if isinstance(builder, Taken) else {}),
    }
