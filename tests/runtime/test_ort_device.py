"""ONNX Runtime on a GPU: never a silent step back to the host, never a silent copy of a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import engines
import numpy as np
import onnxruntime as ort
import pytest
from fake_cuda import Cuda
from shipped import refused

import pcc
from pcc.conformance.models import head
from pcc.runtime.device.driver import Device
from pcc.runtime.device.ort_cuda import OrtExecutor, OrtGraphs, watched
from pcc.runtime.ort import import_ort
from pcc.runtime.runner import format_of
from pcc.runtime.weights import mapped, pieces


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("ort")
    pcc.compile(
        head("cp", 4, 2, vocab=258), verifier=engines.llama_folder(at / "model"),
        out=at / "m.pcc", target="onnx-cuda", max_seq=128, chunk=8, queries=["draft"],
    )  # fmt: skip
    return at / "m.pcc"


def bound(engine: Any, *, aliased: bool) -> Any:
    """Return a run of `verify` whose caches are written in place, or not."""
    options = ort.SessionOptions()
    options.log_severity_level = 2
    path = engine.path / engine.queries["verify"]["graph"]
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding, spec = session.io_binding(), engine.queries["verify"]
    states = engine.generation()["buckets"][-1]["states"]
    held: dict[str, Any] = {}
    for io in (*spec["inputs"], *spec["outputs"]):
        kind, _, name = io["name"].partition(".")
        shape = [1, *states[name]] if kind in ("past", "present") else [1, *io["shape"][1:]]
        dtype = {"f32": np.float32, "i64": np.int64}[io["dtype"]]
        key = f"past.{name}" if aliased and kind == "present" else io["name"]
        if key not in held:
            held[key] = import_ort().OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        if io in spec["inputs"]:
            binding.bind_ortvalue_input(io["name"], held[key])
        else:
            binding.bind_ortvalue_output(io["onnx"], held[key])
    return lambda: session.run_with_iobinding(binding)


def test_a_cache_that_is_copied_is_an_error(bundle: Path) -> None:
    engine = pcc.load(bundle, threads=1)
    watched(bound(engine, aliased=True), "here")
    error = refused("B223", lambda: watched(bound(engine, aliased=False), "here"))
    assert "a cache is copied" in error.what


LOG = b"2026-01-02 03:04:05.678 [W:onnxruntime:, a.cc:1 Work] "


def test_standard_error_is_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert watched(lambda: os.write(2, LOG + b"2 Memcpy node is fine\n") and 5, "here") == 5
    refused("B223", lambda: watched(lambda: os.write(2, LOG + b"3 Memcpy nodes are added"), "here"))

    def fails() -> None:
        os.write(2, LOG + b"Failed to create CUDAExecutionProvider. Require cuDNN 9.*")
        raise ValueError("nodes are assigned to the default CPU EP")

    assert "cuDNN" in refused("X203", lambda: watched(fails, "here")).what
    with pytest.raises(ValueError, match="seven"):
        watched(lambda: int("seven"), "here")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_no_step_back_to_the_host(bundle: Path) -> None:
    engine = pcc.load(bundle, threads=1)
    graphs = OrtGraphs(Device(0, Cuda()), bundle, engine.manifest, 1)
    refused("X202", lambda: graphs.executor("verify"))
    error = refused("X202", lambda: pcc.load(bundle, provider="cuda"))
    assert error.exit_code == 3


def test_weights_are_on_the_device_once(bundle: Path) -> None:
    engine = pcc.load(bundle, threads=1)
    listed = [w for s in engine.queries.values() for w in s.get("weights", ())]
    device = Device(0, Cuda())
    graphs = OrtGraphs(device, bundle, engine.manifest, 1)
    if not listed:  # this model is small: list what its file holds
        size = (bundle / "graphs/weights.bin").stat().st_size // 4
        listed = [{"name": n, "dtype": "f32", "shape": [size // 8, 4], "offset": o}
                  for n, o in (("a", 0), ("b", 64), ("c", 0))]  # fmt: skip
        for spec in engine.queries.values():
            spec["weights"] = listed
    where = graphs.weights(listed)
    assert where == graphs.weights(listed)
    assert where["a"] == where["c"] != where["b"]
    values = mapped(bundle, listed, {})
    for name, value in values.items():
        got = np.empty_like(value)
        device.download(got.ctypes.data, where[name], got.nbytes, 1)
        device.wait(1)
        np.testing.assert_array_equal(got, value)
    beyond = {"name": "z", "dtype": "f32", "shape": [1 << 30], "offset": 0}
    refused("B216", lambda: pieces(bundle, [beyond]))
    refused("R114", lambda: mapped(bundle, [{**beyond, "dtype": "bf16", "shape": [1]}], {}))


@pytest.mark.parametrize("variants", [7, [5], [{"format": "wasm"}], [{"format": {}}]])
def test_formats_are_known(variants: Any) -> None:
    refused("B215", lambda: format_of({"variants": variants}, "here"))
    assert format_of({"variants": [{"format": "cuda"}]}, "") == "cuda"
    assert format_of({}, "") == "onnx"


def test_a_provider_must_fit_the_format(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcc.runtime.runner.format_of", lambda *_: "cuda")
    error = refused("R112", lambda: pcc.load(bundle))
    assert "provider='cuda'" in error.hint
    error = refused("R112", lambda: pcc.load(bundle, provider="tensorrt"))


class Binding:
    """Records what is bound."""

    def __init__(self) -> None:
        self.into: dict[str, Any] = {}
        self.out: dict[str, Any] = {}

    def bind_input(self, name: str, *rest: Any) -> None:
        self.into[name] = rest

    def bind_output(self, name: str, *rest: Any) -> None:
        self.out[name] = rest


def test_inputs_and_outputs_of_one_name_are_two_arrays(tmp_path: Path) -> None:
    x = {"name": "x", "dtype": "i64", "shape": ["B", 4]}
    past = {"name": "past.k", "dtype": "f16", "shape": ["B", "rows", 2]}
    spec = {"batch": 2, "inputs": [x, past],
            "outputs": [{**x, "onnx": "x_out"},
                        {**past, "name": "present.k", "onnx": "present.k"}]}  # fmt: skip
    manifest = {"queries": {"mode": spec}, "generation": {
        "states": [{"name": "k", "shape": [8, 2], "rows_axis": 0}],
        "buckets": [{"rows": 999, "states": {"k": [999, 2]}}]}}  # fmt: skip
    graphs: Any = OrtGraphs(Device(0, Cuda()), tmp_path, manifest, 1)
    made = Binding()
    session: Any = type("Session", (), {"io_binding": lambda _: made})()
    run = OrtExecutor(graphs, session, spec, "mode")
    for i, name in enumerate(("x", "x_out", "past.k", "present.k")):
        run.bind(name, 256 * (i + 1))
    assert made.into == {"x": ("cuda", 0, 7, [2, 4], 256),
                         "past.k": ("cuda", 0, 10, [2, 8, 2], 768)}  # fmt: skip
    assert made.out == {"x_out": ("cuda", 0, 7, [2, 4], 512),
                        "present.k": ("cuda", 0, 10, [2, 8, 2], 1024)}  # fmt: skip
    refused("R102", lambda: run.bind("y", 256))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("running MatMul node. BFCArena::AllocateRawInternal Failed to allocate memory for "
         "requested buffer of size 1073741824", "X305"),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size);", "X305"),
        ("running MatMul node. CUBLAS failure 13", "B222"),
    ],
)  # fmt: skip
def test_a_run_that_lacks_memory_says_so(tmp_path: Path, said: str, code: str) -> None:
    """Its arena grows while a graph runs for the first time: missing memory is no wrong bundle."""

    class Session:
        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, *_: Any) -> None:
            raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {said}")

    spec: dict[str, Any] = {"batch": 1, "inputs": [], "outputs": []}
    graphs = OrtGraphs(Device(0, Cuda()), tmp_path, {"queries": {"step": spec}}, 1)
    run = OrtExecutor(graphs, Session(), spec, "step")
    error = refused(code, lambda: run.enqueue(1))
    assert "'step'" in error.what
    assert error.exit_code == (3 if code == "X305" else 2)
