"""A TensorRT whose engines run their ONNX graph on the CPU, in the memory of `fake_cuda`.

A plan is JSON: the graph's name, the shapes of its profiles, and the weights that it was built
with, which are what it computes with until it is refitted. The builder parses nothing; what the
real one refuses is tested with the real one.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fake_cuda import Cuda

from pcc.backends.tensorrt import write
from pcc.backends.tensorrt.build import Built
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.runtime.device import gpu
from pcc.runtime.device.driver import Device

TYPES = {1: "FLOAT", 10: "HALF", 7: "INT64", 6: "INT32", 9: "BOOL"}  # of ONNX
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32,
         "BOOL": np.bool_}  # fmt: skip


class Builder:
    """Stands in for `pcc.backends.tensorrt.build.Builder`."""

    def __init__(self, r: TensorRt, options: BuildOptions, cache: bytes = b"") -> None:
        options.check(r)
        self.runtime, self.options, self.cache = r, options, cache
        self.module = SimpleNamespace(__version__=".".join(map(str, (*r.least, 0))))

    def build(self, model: Any, path: Path, profiles: Sequence[Mapping[str, Any]] = ()) -> Built:
        """Return a plan that names the graph of the finished bundle."""
        weights = {} if self.options.strip else weights_of(path)
        text = json.dumps({"name": path.stem, "profiles": list(profiles), "weights": weights})
        return Built(text.encode(), len(model.graph), 0.0, [])


def weights_of(path: Path) -> dict[str, str]:
    """Return the float constants of a graph as text."""
    return {
        i.name: base64.b64encode(onnx.numpy_helper.to_array(i, str(path.parent)).tobytes()).decode()
        for i in onnx.load(str(path), load_external_data=False).graph.initializer
        if i.data_type in (1, 10)
    }


class Engine:
    """A plan and its graph."""

    def __init__(self, plan: Mapping[str, Any], folder: Path, cu: Cuda) -> None:
        self.cu, self.name, self.profiles = cu, plan["name"], plan["profiles"]
        self.path = folder / "graphs" / f"{self.name}.onnx"
        graph = onnx.load(str(self.path), load_external_data=False).graph
        self.types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output)}
        self.inputs = {v.name for v in graph.input}
        self.outputs = [v.name for v in graph.output]
        self.names = list(self.types)
        self.num_io_tensors, self.device_memory_size = len(self.names), 0
        self.num_optimization_profiles = max(len(self.profiles), 1)
        self.contexts: list[Context] = []
        self.weights = {k: base64.b64decode(v) for k, v in plan["weights"].items()}
        self._session: ort.InferenceSession | None = None

    @property
    def session(self) -> ort.InferenceSession:
        """The graph with the engine's own weights, not those of the bundle."""
        if self._session is None:
            model = onnx.load(str(self.path))
            for i in model.graph.initializer:
                if i.data_type in (1, 10):
                    i.CopyFrom(onnx.helper.make_tensor(
                        i.name, i.data_type, i.dims, self.weights[i.name], raw=True))  # fmt: skip
            options = ort.SessionOptions()
            options.log_severity_level = 3
            data = model.SerializeToString()
            self._session = ort.InferenceSession(data, options, ["CPUExecutionProvider"])
        return self._session

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self.types[name].elem_type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return a shape; of outputs that of the first profile, which a builder may fix."""
        if self.profiles and name not in self.inputs:
            return self.sized(name, self.profiles[0])
        return tuple(-1 if d.dim_param else d.dim_value for d in self.types[name].shape.dim)

    def sized(self, name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Return a shape where inputs have these: open axes of one name have one size."""
        known = dict[str, int]()
        for other, shape in shapes.items():
            for d, size in zip(self.types[other].shape.dim, shape, strict=True):
                known[d.dim_param] = size
        dims = self.types[name].shape.dim
        return tuple(known.get(d.dim_param, -1) if d.dim_param else d.dim_value for d in dims)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        return [tuple(self.profiles[profile][name])] * 3

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """Runs the graph when its turn comes, on the addresses that it had when it was enqueued."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at: dict[str, int] = {}
        self.runs = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.shapes[name] = tuple(shape)
        return tuple(shape) == tuple(self.engine.profiles[self.profile][name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.sized(name, self.shapes)

    def infer_shapes(self) -> list[str]:
        """Return the inputs of which no shape is known."""
        return [k for k in self.engine.names if -1 in self.get_tensor_shape(k)]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        at = dict(self.at)
        self.engine.cu.enqueue(lambda: self._run(at))
        return True

    def _view(self, name: str, at: int) -> Any:
        shape, kind = self.get_tensor_shape(name), self.engine.get_tensor_dtype(name).name
        dtype = np.dtype(NUMPY[kind])
        raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(at)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _run(self, at: Mapping[str, int]) -> None:
        self.runs += 1
        engine = self.engine
        feed = {k: self._view(k, at[k]).copy() for k in engine.names if k in engine.inputs}
        values = engine.session.run(engine.outputs, feed)
        for name, value in zip(engine.outputs, values, strict=True):
            view = self._view(name, at[name])
            assert value.shape == view.shape, (engine.name, name, value.shape, view.shape)
            view[:] = value


class Refitter:
    """Exchanges weights of an engine by name; `partners` must be given together."""

    partners: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine = engine
        self.given: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return [k for k in self.engine.weights if k not in self.refuses]

    def set_named_weights(self, name: str, value: Any) -> bool:
        self.given[name] = value.tobytes()
        return len(self.given[name]) == len(self.engine.weights[name])

    def get_missing_weights(self) -> list[str]:
        return [k for k in self.partners if k not in self.given] if self.given else []

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        self.engine.weights |= self.given
        self.engine._session = None
        return True


class OnnxParserRefitter:
    """Takes the weights of a graph, as later releases do."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        found = {k: base64.b64decode(v) for k, v in weights_of(Path(path)).items()}
        self.refitter.given = found
        return True


def stand_in(monkeypatch: Any, r: TensorRt, folder: Path) -> Any:
    """Let bundles for `r` be built here, and opened in `folder`; `engines` of it are those open."""
    cu = Cuda()
    module: Any = ModuleType(r.module)
    module.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, WARNING=2)})
    module.__version__ = ".".join(map(str, (*r.least, 0)))
    module.engines, module.cu = {}, cu
    module.Refitter = type("Refitter", (Refitter,), {})
    if r.name != "8.6":
        module.OnnxParserRefitter = OnnxParserRefitter

    def deserialize(data: Any) -> Any:
        plan = json.loads(bytes(data))
        return module.engines.setdefault(plan["name"], Engine(plan, folder, cu))

    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
    monkeypatch.setitem(__import__("sys").modules, r.module, module)
    monkeypatch.setattr(write, "Builder", Builder)
    monkeypatch.setattr(write, "gpu_architecture", lambda: "sm_90")
    monkeypatch.setattr(gpu, "device", lambda: Device(0, cu))
    return module
