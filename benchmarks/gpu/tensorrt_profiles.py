"""A part of `tensorrt_check.py`: the pass of one engine at each width, its sizes and its numbers.

Each context is opened as a bundle's is, and its numbers are compared with the float64 evaluator. If
one differs, other builds of the same graph are tried, which says what the builder is at odds with;
they are no part of pcc, and do not decide whether the part fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Values = np.ndarray[Any, Any]
MODELS = ("llama", "evabyte")
WIDTHS, ROWS, AT = (4, 8), 264, 5
BOUND = 1e-3  # of the largest number of an output
# Profiles of the contexts of one engine, in the order in which they are opened.
ORDERS = ((0, 1), (1, 0), (1,), (0, 0, 1, 1))
FEATURES = {"no shared profiles": {"PROFILE_SHARING_0806": False},
            "no faster shapes": {"FASTER_DYNAMIC_SHAPES_0805": False}}  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """A verifier's pass: what it means at each width, and one graph of it on disk."""

    graphs: Sequence[Any]
    model: Any
    tables: Mapping[str, Sequence[Values]]
    shapes: Sequence[Mapping[str, Sequence[int]]]
    path: Path
    known: dict[int, tuple[dict[str, Values], dict[str, Values]]] = field(default_factory=dict)

    def case(self, at: int) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return inputs at a width and what the float64 evaluator gives, by the engine's names."""
        from pcc.interp.run import run
        from pcc.ir.semiring import Real

        if at not in self.known:
            spec, module = self.spec(at), self.graphs[at].module
            feed = feed_of(spec, at)
            values = run(module.roots, dict(feed), Real())
            outs = dict(zip([k for k, _ in module.outputs], values, strict=True))
            want = {o["onnx"]: np.asarray(outs[o["name"]]) for o in spec["outputs"]}
            self.known[at] = feed | {k: v[at] for k, v in self.tables.items()}, want
        return self.known[at]

    def spec(self, at: int) -> Row:
        """Return inputs and outputs at a width, as a manifest has them."""
        from pcc.emission import Emission, listed

        graph = self.graphs[at]
        return {"batch": 1, **listed(Emission(graph.module, graph.inputs))}


def pass_of(kind: str, target: str, folder: Path) -> Pass:
    """Write the merged graph of a tiny verifier's pass."""
    from pcc.backends.onnx.lower import lower
    from pcc.backends.onnx.weights import save_models
    from pcc.backends.tensorrt.forms import prepare
    from pcc.backends.tensorrt.merge import merge
    from pcc.backends.tensorrt.parts import Engines
    from pcc.backends.tensorrt.runtimes import runtime_of
    from pcc.conformance import models
    from pcc.conformance.verifiers import KINDS
    from pcc.models.load import load_model
    from pcc.models.step import Steps
    from pcc.targets import TARGETS

    r = runtime_of(target)
    source, model = KINDS[kind](folder)
    loaded = load_model(model, max_rows=ROWS, precision="fp32")
    source = source or models.head("ff", 4, 1, vocab=loaded.vocab)
    graphs = [Steps(loaded, source, ROWS).passed(w) for w in WIDTHS]
    merged = merge([prepare(lower(g.module, TARGETS[target], batch=1, inputs=g.inputs), r)
                    for g in graphs], wide=r.wide)  # fmt: skip
    engines = Engines({"pass": merged.model}, {"pass": merged}, {"pass": WIDTHS}, {},
                      {"pass": ("pass",)})  # fmt: skip
    (folder / "graphs").mkdir()
    save_models(engines.models, folder / "graphs")
    shapes = engines.profiles("pass")
    return Pass(graphs, merged.model, merged.tables, shapes, folder / "graphs/pass.onnx")


def feed_of(spec: Row, seed: int) -> dict[str, Values]:
    """Return inputs: ids, a length of 5, and whatever in the states."""
    rng, feed = np.random.default_rng(seed), dict[str, Values]()
    for i in spec["inputs"]:
        shape = [1 if d in ("B", "Bc") else d for d in i["shape"]]
        if i["name"] == "length":
            feed["length"] = np.full(shape, AT, np.int64)
        elif i["dtype"] == "i64":
            feed[i["name"]] = rng.integers(0, 200, shape)
        else:
            feed[i["name"]] = rng.normal(size=shape).astype(np.float32)
    return feed


class Opened:
    """One engine that was built, and what a bundle's opener gives to its executors."""

    def __init__(self, made: Pass, plan: Any, target: str) -> None:
        from pcc.backends.tensorrt.library import import_module, messages
        from pcc.backends.tensorrt.runtimes import runtime_of
        from pcc.runtime.device import gpu

        module = import_module(runtime_of(target))
        self.made, self.device, self.said = made, gpu.device(), messages(module)
        self.runtime = module.Runtime(self.said.logger)  # lives as long as the engine
        self.device.enter()
        self.stream = self.device.stream()
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.manifest = {"generation": None}
        self.held: dict[int, dict[str, Any]] = {}

    def why(self) -> str:
        """Return what TensorRT said last."""
        return "; ".join(text for _, text in self.said.take())[:300] or "nothing"

    def open(self, at: int) -> Any:
        """Open a context at a width. Errors: X334 where its arrays are not those of the width."""
        from pcc.runtime.device.handles import Memory
        from pcc.runtime.device.tensorrt import TensorRtExecutor

        tables = {name: v[at].nbytes for name, v in self.made.tables.items()}
        opener: Any = self
        spec, title = self.made.spec(at), f"profile {at}"
        context = TensorRtExecutor(opener, self.engine, spec, title, at, tables)
        self.held[id(context)] = {k: Memory(self.device, context.sizes[k]) for k in context.names}
        for name, memory in self.held[id(context)].items():
            context.bind(name, memory.address)
        return context

    def run(self, context: Any, at: int) -> float:
        """Run a context; return its largest error."""
        given, want = self.made.case(at)
        held = self.held[id(context)]
        here = {name: np.ascontiguousarray(v) for name, v in given.items()}
        for name, v in here.items():
            self.device.upload(held[name].address, v.ctypes.data, v.nbytes, self.stream)
        context.enqueue(self.stream)
        got = {name: np.full(v.shape, np.nan, np.float32) for name, v in want.items()}
        for name, v in got.items():
            self.device.download(v.ctypes.data, held[name].address, v.nbytes, self.stream)
        self.device.wait(self.stream)
        return max(_error(want[name], v) for name, v in got.items())

    def facts(self, at: int) -> Row:
        """Return what engine and context say of each array, whatever of it is right."""
        from pcc.errors import PccError
        from pcc.runtime.device.parts import select

        engine, out = self.engine, dict[str, Any]()
        context = engine.create_execution_context()
        try:
            select(engine, context, at, self.device, self.stream, "pass")
        except PccError as e:
            out["select"] = e.what
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if name.partition(".")[0] in ("past", "present"):
                continue
            out[name] = {"engine": _dims(engine.get_tensor_shape(name)),
                         "context": _dims(context.get_tensor_shape(name)), **_legacy(engine, at, i),
                         "right": self._right(at, name)}  # fmt: skip
        return out

    def _right(self, at: int, name: str) -> list[int]:
        """Return the shape that an array of the engine is to have at a width."""
        if name in self.made.shapes[at]:
            return list(self.made.shapes[at][name])
        if name in self.made.tables:
            return list(self.made.tables[name][at].shape)
        spec = self.made.spec(at)
        ios = {i["name"]: i for i in spec["inputs"]} | {o["onnx"]: o for o in spec["outputs"]}
        words = [2] if ios[name]["dtype"] == "i64" else []
        return [1 if d in ("B", "Bc") else d for d in ios[name]["shape"]] + words


def _dims(shape: Any) -> list[int]:
    return [int(d) for d in shape]


def _legacy(engine: Any, at: int, i: int) -> Row:
    """Return what the bindings of a profile say, where a release has them."""
    if not hasattr(engine, "num_bindings"):
        return {}
    number = i + at * engine.num_io_tensors
    return {"binding": engine.get_binding_name(number),
            "bound": _dims(engine.get_binding_shape(number))}  # fmt: skip


def _error(want: Values, got: Values) -> float:
    with np.errstate(invalid="ignore"):
        gap = float(np.abs(want - got).max() / max(1.0, float(np.abs(want).max())))
    return float("inf") if np.isnan(gap) else gap


# ---------------------------------------------------------------- the part


def widths(target: str, folder: Path) -> Iterator[Row]:
    """Contexts of one engine in several orders; other builds if any of them is wrong."""
    for kind in MODELS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        made, wrong = pass_of(kind, target, folder / kind), False
        plan = built(made, target)
        for at in range(len(WIDTHS)):
            facts = Opened(made, plan, target).facts(at)
            print(f"  {kind}, profile {at}:", *(f"\n    {k}: {v}" for k, v in facts.items()))
            yield {"suite": "widths", "case": f"{kind} as pcc builds it", "what": f"facts of {at}",
                   "verdict": "skipped", "note": "not judged", "facts": facts}  # fmt: skip
        for order in ORDERS:
            row = tried(made, plan, target, f"{kind} as pcc builds it", order)
            wrong |= row["verdict"] != "ok"
            yield row
        if wrong:
            yield from others(made, target, kind)


def others(made: Pass, target: str, kind: str) -> Iterator[Row]:
    """Other builds of the same graph; their verdicts are notes."""
    alone = [{"shapes": [s]} for s in made.shapes]
    builds: dict[str, Row] = {
        "ranges": {"ranges": True},
        **{name: {"features": f} for name, f in FEATURES.items()},
        **{f"profile {at} alone": a for at, a in enumerate(alone)},
    }
    for name, how in builds.items():
        title = f"{kind}, {name}"
        try:
            plan = built(made, target, **how)
        except Exception as e:  # a builder may refuse; the next one is still worth trying
            yield {"suite": "widths", "case": title, "what": "build", "verdict": "skipped",
                   "note": f"refused: {str(e)[:300]}"}  # fmt: skip
            continue
        one = made
        if "shapes" in how:
            at = made.shapes.index(how["shapes"][0])
            one = Pass(made.graphs[at : at + 1], made.model,
                       {k: v[at : at + 1] for k, v in made.tables.items()},
                       made.shapes[at : at + 1], made.path)  # fmt: skip
        orders = ((0,),) if one is not made else ((0, 1), (1, 0))
        for order in orders:
            row = tried(one, plan, target, title, order, exact="ranges" not in how)
            found = f"{row['verdict']}: {row.get('note', '')}"
            yield {**row, "verdict": "skipped", "note": found}


def tried(
    made: Pass, plan: Any, target: str, title: str, order: Sequence[int], *, exact: bool = True
) -> Row:
    """Open contexts of one engine in an order, then run them in that order, twice."""
    from pcc.errors import PccError

    opened = Opened(made, plan, target)
    if not exact:
        opened.engine = Exact(opened.engine)
    row: Row = {"suite": "widths", "case": title, "what": f"profiles {order}", "bound": BOUND}
    try:
        contexts = [(opened.open(at), at) for at in order]
        worst = max(opened.run(*each) for each in contexts * 2)
    except PccError as e:
        row |= {"verdict": "differs", "error": float("inf"), "note": f"[{e.code}] {e.what}"}
    else:
        row |= {"verdict": "ok" if worst <= BOUND else "differs", "error": worst}
    print(f"  {title}, {row['what']}: {row['verdict']} {row['error']} {row.get('note', '')}")
    return row


class Exact:
    """An engine whose profiles are ranges, each taken for its best shape."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        """Return the best shape as the only one."""
        return [self._engine.get_tensor_profile_shape(name, profile)[1]] * 3


def built(
    made: Pass, target: str, *, shapes: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ranges: bool = False, features: Mapping[str, bool] | None = None,
) -> Any:  # fmt: skip
    """Return a plan of the merged graph: as pcc builds it, or with what is said otherwise."""
    from pcc.backends.tensorrt import write
    from pcc.backends.tensorrt.options import BuildOptions
    from pcc.backends.tensorrt.runtimes import runtime_of

    every = made.shapes

    class Builder(write.Builder):  # type: ignore[misc]
        def _profile(self, config: Any, best: Mapping[str, Sequence[int]]) -> None:
            if not ranges:
                super()._profile(config, best)
            else:  # each size from its least to its most
                profile = self.builder.create_optimization_profile()
                for name, shape in best.items():
                    both = [[s[name][i] for s in every] for i in range(len(shape))]
                    ends = [tuple(end(sizes) for sizes in both) for end in (min, max)]
                    profile.set_shape(name, ends[0], tuple(shape), ends[1])
                config.add_optimization_profile(profile)
            shared = dict.fromkeys(self.runtime.previews, True)
            for feature, on in (shared | dict(features or {})).items():
                config.set_preview_feature(getattr(self.module.PreviewFeature, feature), on)

    builder = Builder(runtime_of(target), BuildOptions(level=0))
    return builder.build(made.model, made.path, shapes or made.shapes).plan
