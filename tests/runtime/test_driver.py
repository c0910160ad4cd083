"""Failures of the driver are one line each, exit code 3; uniforms of a device are the host's."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Cuda
from shipped import refused

from pcc.runtime.device import driver
from pcc.runtime.device.driver import Device
from pcc.runtime.device.fit import check_arch
from pcc.runtime.device.handles import Kernel, Memory, Pinned
from pcc.runtime.device.moves import Moves
from pcc.runtime.device.philox import Draws
from pcc.runtime.device.upload import upload
from pcc.runtime.philox import ROLES, Uniforms


def one_line(code: str, call: Any) -> str:
    error = refused(code, call)
    assert error.exit_code == 3
    assert "\n" not in error.what
    return error.what


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("cuda"):
            raise ModuleNotFoundError("No module named 'cuda'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "cuda-bindings is not installed" in one_line("X301", Device)


class Broken:
    """What the bindings do where libcuda.so is not found."""

    def cuInit(self, flags: int) -> Any:  # noqa: N802
        raise RuntimeError("cannot find libcuda.so.1")


def test_no_driver() -> None:
    assert "no NVIDIA driver" in one_line("X302", lambda: Device(0, Broken()))


@pytest.mark.parametrize(
    ("function", "code", "want", "text"),
    [
        ("cuInit", 100, "X303", "there is no GPU"),
        ("cuInit", 803, "X302", "CUDA_ERROR_803"),
        ("cuDevicePrimaryCtxRetain", 46, "X304", "cuDevicePrimaryCtxRetain"),
    ],
)
def test_a_driver_that_does_not_start(function: str, code: int, want: str, text: str) -> None:
    cu = Cuda()
    cu.fails[function] = code
    assert text in one_line(want, lambda: Device(0, cu))


def test_no_such_gpu_and_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no GPU 3" in one_line("X303", lambda: Device(3, Cuda()))
    monkeypatch.setattr(driver, "OLDEST", 14000)
    assert "supports CUDA 13.0" in one_line("X302", lambda: Device(0, Cuda()))


def test_too_little_memory_says_how_much() -> None:
    device = Device(0, Cuda(memory=1 << 30))
    what = one_line("X305", lambda: Memory(device, 3 << 30))
    assert "3.0 GB needed" in what
    assert "1.0 GB of 1.0 GB free" in what


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.stream(),
        lambda d: d.capture(1, lambda: None),
        lambda d: d.launch(3, 1),
        lambda d: d.start(Kernel(None, (1, 1, 1), (1, 1, 1)), [], 1),
        lambda d: d.load(b"", []),
    ],
)
def test_memory_that_other_calls_lack(call: Any) -> None:
    device = Device(0, Cuda())
    for name in ("cuStreamCreate", "cuGraphInstantiate", "cuGraphLaunch", "cuLaunchKernelEx",
                 "cuModuleLoadData"):  # fmt: skip
        device.cu.fails[name] = 2
    assert "too little memory on Fake GPU" in one_line("X305", lambda: call(device))


def test_streams_events_and_modules_are_given_back() -> None:
    device = Device(0, Cuda())
    stream, event = device.stream(), device.event()
    device.record(event, stream)
    functions = device.load(b".version", [])
    assert device.cu.open == {"stream": 1, "event": 1, "module": 1}
    device.wait(stream)
    del stream, event
    functions.free()
    functions.free()
    for _ in range(2):  # nothing at once: finalizers of the same garbage may still wait for them
        assert device.cu.open["event"] == device.cu.open["module"] == 1
        device.stream()
    assert device.cu.open == {"stream": 2, "event": 0, "module": 0}
    source = Uniforms(1, [("token", 0)], [0])
    for _ in range(3):
        Moves(device, [], Draws(device, source, 0, 0, device.stream()))
    assert device.cu.open["module"] == device.cu.calls["cuModuleLoadData"] - 1 == 1


def test_what_a_kernel_takes_where_the_driver_says() -> None:
    device = Device(0, Cuda())
    assert device.parameters(lambda a, b: None, 9) == [8, 8]
    assert device.parameters(lambda a, b: None, 1) == [8, 8]  # one more than asked for
    device.cu.fails["cuFuncGetParamInfo"] = 801
    assert device.parameters(lambda a, b: None, 9) is None
    device.version = 12030
    assert device.parameters(lambda a, b: None, 9) is None


def test_code_for_another_gpu() -> None:
    device = Device(0, Cuda(capability=(8, 9)))
    for arch in ("sm_90", "sm_80a", "sm_75", "sm_90a"):
        assert "sm_89" in one_line("X306", lambda a=arch: check_arch(device, a, "here"))
    for arch in ("sm_80", "sm_86", "sm_89", "sm_89a", "sm_80f"):
        check_arch(device, arch, "here")
    device.cu.fails["cuModuleLoadData"] = 209
    assert "--gpu sm_89" in refused("X306", lambda: device.load(b"", [])).hint
    device.cu.fails["cuModuleLoadData"] = 200
    assert refused("B241", lambda: device.load(b"", [])).exit_code == 2


def test_a_failing_capture_ends_it() -> None:
    device = Device(0, Cuda())
    stream = device.stream()

    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        device.capture(stream, work)
    assert device.cu.recorded is None


def test_launches_carry_their_attributes() -> None:
    device = Device(0, Cuda())
    seen: list[tuple[int, int]] = []
    device.cu.kernels["k"] = lambda a, b: seen.append((a, b))
    function = device.load(b"cubin", ["k"])["k"]
    for kernel in (
        Kernel(function, (3, 2, 1), (64, 1, 1), 1 << 16, cooperative=True),
        Kernel(function, (1, 1, 1), (32, 1, 1), overlap=True),
    ):
        device.start(kernel, [256, 1 << 40], 1)
    device.wait(1)
    assert seen == [(256, 1 << 40)] * 2  # 64 bits, read when the kernel is launched
    assert device.cu.launched == [
        ((3, 2, 1), (64, 1, 1), 1 << 16, {2: {"cooperative": 1}}),
        ((1, 1, 1), (32, 1, 1), 0, {6: {"programmaticStreamSerializationAllowed": 1}}),
    ]


def test_pinned_memory_lives_as_long_as_its_arrays() -> None:
    device = Device(0, Cuda())
    view = Pinned(device, 64).array[8:16]
    assert device.cu.held
    view[:] = 7
    assert view.tolist() == [7] * 8
    del view
    assert not device.cu.held


@pytest.mark.parametrize("rows", [1, 3])
def test_uniforms_are_those_of_the_host(rows: int) -> None:
    device = Device(0, Cuda())
    slots = [(role, 5 * k + 7) for k, role in enumerate([*ROLES] * 12)] + [("token", 2**32 - 1)]
    source = Uniforms(2**64 - 3, slots, [2**32 - 1 - i for i in range(rows)])
    lengths = np.array([0, 12345, 2**31 + 5][:rows], np.int64)
    at, u = Memory(device, 8 * rows), Memory(device, 4 * rows * len(slots))
    draws = Moves(device, [], Draws(device, source, at.address, u.address, 1))
    want, got = (np.empty((rows, len(slots)), np.float32) for _ in range(2))
    for _ in range(2):
        device.upload(at.address, lengths.ctypes.data, lengths.nbytes, 1)
        draws.enqueue(1)
        device.download(got.ctypes.data, u.address, got.nbytes, 1)
        device.wait(1)
        source.fill(lengths, want)
        assert got.tobytes() == want.tobytes()
        lengths += 3
    assert len(np.unique(want)) > 40 * rows


def test_large_files_go_up_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcc.runtime.device.upload.PIECE", 1000)
    device, data = Device(0, Cuda()), np.random.default_rng(0).bytes(10_000)
    (tmp_path / "w").write_bytes(data)
    parts = [(0, 2500, 0), (7001, 2999, 0), (4000, 7, 0)]
    held = [Memory(device, size) for _, size, _ in parts]
    said: list[str] = []
    placed = [(o, s, m.address) for (o, s, _), m in zip(parts, held, strict=True)]
    upload(device, tmp_path / "w", placed, 1, said.append)
    for (offset, size, _), m in zip(parts, held, strict=True):
        got = np.empty(size, np.uint8)
        device.download(got.ctypes.data, m.address, size, 1)
        device.wait(1)
        assert got.tobytes() == data[offset : offset + size]
    assert len(said) == 3 + 3 + 1
    short = [(9_000, 2_000, held[0].address)]
    refused("B212", lambda: upload(device, tmp_path / "w", short, 1))
