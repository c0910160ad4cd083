"""A device in the memory of the host, whose graphs run under ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import Cuda

import pcc
from pcc.bundle import inside
from pcc.runtime.device.driver import Device
from pcc.runtime.device.gpu import DeviceRunner
from pcc.runtime.dtypes import STORED
from pcc.runtime.ort import open_session
from pcc.runtime.weights import mapped

Spoil = Callable[[dict[str, Any]], None]


class Graph:
    """An executor: reads its inputs where they lie when its turn comes, and writes its outputs."""

    def __init__(self, graphs: Graphs, query: str) -> None:
        self.graphs, self.query = graphs, query
        self.spec = graphs.manifest["queries"][query]
        self.at: dict[str, int] = {}

    def bind(self, name: str, address: int) -> None:
        self.at[name] = address

    def enqueue(self, stream: int) -> None:
        at = dict(self.at)  # a captured graph keeps the addresses that it was captured with
        self.graphs.cu.enqueue(lambda: self._run(at))

    def _view(self, at: int, io: Mapping[str, Any]) -> Any:
        batch, (state, _, name) = int(self.spec["batch"]), io["name"].partition(".")
        shape = [batch if d in ("B", "Bc") else d for d in io["shape"]]
        if state in ("past", "present"):
            shape = [batch, *self.graphs.manifest["generation"]["buckets"][-1]["states"][name]]
        kind = np.dtype(STORED[io["dtype"]])
        raw = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(at)
        return np.frombuffer(raw, kind).reshape(shape)

    def _run(self, at: Mapping[str, int]) -> None:
        self.graphs.runs.append(self.query)
        feed = {i["name"]: self._view(at[i["name"]], i).copy() for i in self.spec["inputs"]}
        weights = mapped(self.graphs.folder, self.spec.get("weights", ()), {})
        session = self.graphs.session(self.query)
        names = [o["onnx"] for o in self.spec["outputs"]]
        values = session.run(names, {**feed, **weights})
        found = {o["name"]: v for o, v in zip(self.spec["outputs"], values, strict=True)}
        if self.graphs.spoil is not None:
            self.graphs.spoil(found)
        for o in self.spec["outputs"]:
            self._view(at[o["onnx"]], o)[:] = found[o["name"]]


class Graphs:
    """The opener of a bundle's graphs."""

    def __init__(self, cu: Cuda, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.cu, self.folder, self.manifest = cu, folder, manifest
        self.runs: list[str] = []
        self.spoil: Spoil | None = None
        self._sessions: dict[str, Any] = {}

    def session(self, query: str) -> Any:
        name = self.manifest["queries"][query]["graph"]
        if name not in self._sessions:
            self._sessions[name] = open_session(inside(self.folder, name), "cpu", 1)
        return self._sessions[name]

    def executor(self, query: str) -> Graph:
        return Graph(self, query)


class _Runner(DeviceRunner):
    def __init__(self, engine: Any, on: Device) -> None:
        super().__init__(engine, "onnx", on)

    def _opener(self, kind: str) -> Any:
        return Graphs(self.device.cu, self.path, self.manifest)


def on_device(path: Path, cu: Cuda | None = None, *, ahead: bool = True) -> Any:
    """Open a static bundle of ONNX graphs on a fake device; `engine.cu` is its driver."""
    engine: Any = pcc.load(path, threads=1)
    engine.cu = cu or Cuda()
    engine.run_ahead = ahead
    engine.runner = _Runner(engine, Device(0, engine.cu))
    return engine
