"""One ONNX graph to one engine: parse, compare with the graph, pin, build."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pcc.backends.tensorrt import borders
from pcc.backends.tensorrt.legal import (
    check_build,
    check_messages,
    check_model,
    check_network,
    summary,
)
from pcc.backends.tensorrt.library import import_module, messages, need_driver
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.precision import pin, types_of
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.backends.tensorrt.stored import check_stored
from pcc.errors import PccError

Sizes = Mapping[str, Sequence[int]]  # of inputs by name


@dataclass
class Built:
    """An engine's bytes and what its build did."""

    plan: Any
    layers: int
    seconds: float
    said: list[str]
    pinned: dict[str, int] = field(default_factory=dict)


class Builder:
    """Builds engines with one TensorRT; the timing cache is shared by all of them."""

    def __init__(self, r: TensorRt, options: BuildOptions, cache: bytes = b"") -> None:
        options.check(r)
        self.runtime, self.options = r, options
        self.module = import_module(r)
        need_driver(r)
        self.messages = messages(self.module)
        self.builder = self.module.Builder(self.messages.logger)
        self.messages.take()  # what it says of the machine is not about a graph
        self.cache, self._timings = cache, None
        self._opener: Any = None

    def build(self, model: ir.Model, path: Path, profiles: Sequence[Sizes] = ()) -> Built:
        """Build a prepared graph that lies at `path`, beside its weights.

        `profiles`: of a graph with open sizes the shapes of its inputs at each width.
        Errors: E431 to E435, E439 where the engine would not be the graph, or is not to be had.
        """
        start, r = time.perf_counter(), self.runtime
        check_model(model, r)
        network, _parser = self._parse(path)  # the parser owns weights until the build is over
        check_network(network, model, r, self.module)
        types = types_of(model)
        pinned = {} if r.typed else pin(network, types, self.module)
        half = bool(pinned.get("HALF"))
        config = self._config(half=half)
        if half:
            borders.keep(network, config, self.module)
        for shapes in profiles:
            self._profile(config, shapes)
        plan, said = self._planned(network, config)
        if plan is None:
            raise PccError("E435", f"TensorRT {r.name} builds no engine: {_why(said)}",
                           at=path.stem)  # fmt: skip
        check_build(said, r, {str(v.name) for v in model.graph.inputs if not v.uses()})
        if self._timings is not None:
            self.cache = bytes(memoryview(self._timings.serialize()))
        notes = summary(said, r)
        if half:
            engine = self._opened(plan, path.stem)
            notes += check_stored(engine, model, types, self.module)
        seconds = time.perf_counter() - start
        return Built(plan, network.num_layers, seconds, notes, pinned)

    def add_timings(self, other: bytes) -> None:
        """Take over what another builder has measured."""
        if not (other and self.options.timing_cache and self.runtime.timings):
            return
        config = self.builder.create_builder_config()
        known = config.create_timing_cache(self.cache)
        known.combine(config.create_timing_cache(other), ignore_mismatch=False)
        self.cache = bytes(memoryview(known.serialize()))

    def _parse(self, path: Path) -> tuple[Any, Any]:
        flags = 0
        for name in self.runtime.network:
            flags |= 1 << int(getattr(self.module.NetworkDefinitionCreationFlag, name))
        network = self.builder.create_network(flags)
        parser = self.module.OnnxParser(network, self.messages.logger)
        good = parser.parse(path.read_bytes(), str(path))
        said = self.messages.take()
        if not good:
            first = parser.get_error(0) if parser.num_errors else None
            why = " ".join(first.desc().split())[:240] if first is not None else _why(said)
            what = f"TensorRT {self.runtime.name} cannot read the graph: {why}"
            raise PccError("E434", what, at=path.stem)
        check_messages(said, self.runtime)
        return network, parser

    def _config(self, *, half: bool) -> Any:
        module, options = self.module, self.options
        config = self.builder.create_builder_config()
        for name in options.flags(self.runtime):
            config.set_flag(getattr(module.BuilderFlag, name))
        config.clear_flag(module.BuilderFlag.TF32)  # fp32 is 24 bits everywhere
        if half:
            config.set_flag(module.BuilderFlag.FP16)
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
        config.builder_optimization_level = options.level
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if options.hardware != "none":
            level = self.runtime.hardware[options.hardware]
            kinds = module.HardwareCompatibilityLevel
            config.hardware_compatibility_level = getattr(kinds, level)
        if self.runtime.offline:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._capability(), 0)
        if options.timing_cache and self.runtime.timings:
            self._timings = config.create_timing_cache(self.cache)
            config.set_timing_cache(self._timings, ignore_mismatch=False)
        return config

    def _planned(self, network: Any, config: Any) -> tuple[Any, list[tuple[str, str]]]:
        """Return a plan, or None, and what was said of it.

        Where borders cannot be kept it is built without: what they then store is looked up.
        """
        plan = self.builder.build_serialized_network(network, config)
        said = self.messages.take()
        if plan is None and any(borders.REFUSED in text for _, text in said):
            config.clear_flag(self.module.BuilderFlag.DIRECT_IO)
            plan = self.builder.build_serialized_network(network, config)
            said = [("NOTE", "inputs and outputs may be converted"), *self.messages.take()]
        return plan, said

    def _opened(self, plan: Any, name: str) -> Any:
        """Return the engine of a plan. Errors: E435."""
        self._opener = self.module.Runtime(self.messages.logger)  # it must outlive its engines
        engine = self._opener.deserialize_cuda_engine(plan)
        said = self.messages.take()
        if engine is None:
            what = f"TensorRT {self.runtime.name} does not open the engine: {_why(said)}"
            raise PccError("E435", what, at=name)
        return engine

    def _profile(self, config: Any, shapes: Sizes) -> None:
        """Add a profile of exactly these shapes."""
        profile = self.builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, *[tuple(shape)] * 3)  # the least, the best, the most
        if config.add_optimization_profile(profile) < 0:
            what = f"TensorRT {self.runtime.name} refuses a profile: {_why(self.messages.take())}"
            raise PccError("E435", what)
        for name in self.runtime.previews:
            config.set_preview_feature(getattr(self.module.PreviewFeature, name), True)

    def _capability(self) -> Any:
        name = f"SM{self.options.capability.replace('.', '')}"
        found = getattr(self.module.ComputeCapability, name, None)
        if found is None:
            known = ", ".join(x for x in dir(self.module.ComputeCapability) if x.startswith("SM"))
            what = f"TensorRT {self.runtime.name} builds no {name}"
            raise PccError("E430", what, hint=f"it knows {known}")
        return found


def _why(said: list[tuple[str, str]]) -> str:
    errors = [text for severity, text in said if severity != "WARNING"]
    return " ".join((errors or ["it gives no reason"])[0].split())[:300]
