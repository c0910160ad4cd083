"""Plans of the CUDA engine: run as they say, refused where they lie."""

from __future__ import annotations

import copy
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Cuda
from shipped import refused

from pcc.errors import PccError
from pcc.runtime import dtypes
from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory
from pcc.runtime.device.own import Plans
from pcc.runtime.device.plan import read_plan

STATES = [{"name": "key.0", "shape": [4], "dtype": "f16", "rows_axis": 0},
          {"name": "ids", "shape": [2], "dtype": "i64", "rows_axis": None}]  # fmt: skip


def io(name: str, dtype: str, *shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["B", *shape], "onnx": name}


SPEC = {
    "graph": "engines/cuda/step.json", "batch": 2,
    "inputs": [io("x", "f32", 3), io("past.key.0", "f16", "rows"), io("past.ids", "i64", 2)],
    "outputs": [io("y", "f32", 3), io("present.key.0", "f16", "rows"),
                io("present.ids", "i64", 2)],
}  # fmt: skip


def buffer(name: str, kind: str, dtype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    item = {"f32": 4, "i64": 8, "f16": 2, "u32": 4}[dtype]
    out = {"name": name, "kind": kind, "dtype": dtype, "shape": shape, "offset": 0, "zero": False}
    return {**out, "bytes": int(np.prod(shape)) * item, **more}


def launch(kernel: str, args: list[int], **more: Any) -> dict[str, Any]:
    return {"kernel": kernel, "grid": [1, 1, 1], "block": [32, 1, 1], "args": args, **more}


PLAN = {
    "version": 1, "graph": "step", "batch": 2, "arch": "sm_90", "scratch_bytes": 512,
    "cubin": "engines/cuda/step.cubin", "weights": "engines/cuda/weights.bin",
    "buffers": [
        buffer("x", "input", "f32", [2, 3]), buffer("y", "output", "f32", [2, 3]),
        buffer("w", "weight", "f32", [3], offset=256), buffer("key.0", "state", "f16", [2, 4]),
        buffer("past.ids", "state", "i64", [2, 2]), buffer("present.ids", "state", "i64", [2, 2]),
        buffer("count", "scratch", "u32", [1], offset=256, zero=True),
    ],
    "launches": [launch("scale", [0, 2, 1, 6]),
                 launch("settle", [3, 4, 5], cooperative=True, shared=100_000)],
}  # fmt: skip


def written(folder: Path, plan: Any) -> Path:
    at = folder / "engines" / "cuda"
    at.mkdir(parents=True, exist_ok=True)
    text = plan if isinstance(plan, str) else json.dumps(plan)
    (at / "step.json").write_text(text)
    (at / "step.cubin").write_bytes(b"code")
    weights = np.zeros(128, np.float32)
    weights[64:67] = [2, 3, 4]
    weights.tofile(at / "weights.bin")
    return folder


def view(address: int, dtype: Any, size: int) -> Any:
    raw = (ctypes.c_uint8 * (np.dtype(dtype).itemsize * size)).from_address(address)
    return np.frombuffer(raw, dtype)


def scale(x: int, w: int, y: int, count: int) -> None:
    assert view(count, np.uint32, 1)[0] == 0
    view(y, np.float32, 6)[:] = view(x, np.float32, 6) * np.tile(view(w, np.float32, 3), 2)


def settle(key: int, past: int, present: int) -> None:
    view(key, np.float16, 8)[:] += 1
    view(present, np.int64, 4)[:] = view(past, np.int64, 4) + 5


def opened(folder: Path) -> tuple[Device, Any]:
    device = Device(0, Cuda())
    device.cu.kernels.update(scale=scale, settle=settle)
    manifest = {"queries": {"step": SPEC}, "generation": {"states": STATES}}
    return device, Plans(device, folder, manifest, 1)


def test_a_plan_runs_over_what_is_bound(tmp_path: Path) -> None:
    device, plans = opened(written(tmp_path, PLAN))
    run = plans.executor("step")
    names = {"x": 24, "y": 24, "key.0": 16, "past.ids": 32, "present.ids": 32}
    held = {n: Memory(device, size) for n, size in names.items()}
    for m in held.values():
        device.zero(m.address, m.bytes, 1)
    device.wait(1)
    refused("R103", lambda: run.enqueue(1))
    for name in ("x", "y", "past.ids", "present.ids"):
        run.bind(name, held[name].address)
    run.bind("past.key.0", held["key.0"].address)
    run.bind("present.key.0", held["key.0"].address)  # one buffer, twice the same address
    run.bind("unread", 4096)
    view(held["x"].address, np.float32, 6)[:] = 1
    graph = device.capture(1, lambda: run.enqueue(1))
    for _ in range(2):
        device.launch(graph, 1)
    device.wait(1)
    assert view(held["y"].address, np.float32, 6).tolist() == [2, 3, 4, 2, 3, 4]
    assert view(held["key.0"].address, np.float16, 8).tolist() == [2] * 8
    assert view(held["present.ids"].address, np.int64, 4).tolist() == [5] * 4
    assert device.cu.launched[1][2:] == (100_000, {2: {"cooperative": 1}})
    assert run.document["launches"] == PLAN["launches"]
    again = plans.executor("step")
    assert again.loaded is run.loaded  # one copy of code, scratch and weights
    run.enqueue_some([0], 1)
    device.wait(1)
    assert len(device.cu.launched) == 3


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        at: Any = plan
        for k in keys:
            at = at[k]
        at[last] = value

    return change


BAD = {
    "version": True, "version ": "2", "batch": 1, "arch": "sm_90; rm", "scratch_bytes": -1,
    "buffers": {},
    "launches ": 3, "weights": 7, "scratch_bytes ": None,
    "buffers.0.bytes": 28, "buffers.0.shape": [2, 4], "buffers.0.kind": "else",
    "buffers.0.dtype": "f64", "buffers.0.name": "other", "buffers.1": 5, "buffers.1.kind": "input ",
    "buffers.1.name": "z", "buffers.2.offset": 504, "buffers.2.offset ": -256,
    "buffers.2.shape": [1 << 60, 1 << 60], "buffers.2.shape ": [True], "buffers.3.shape": [2, 5],
    "buffers.6.offset": 512, "buffers.6.offset ": 3, "buffers.6.zero": 1,
    "launches.0.args": [0, 2, 1, 7], "launches.0.args ": [-1], "launches.0.grid": [0, 1, 1],
    "launches.0.grid ": [1, 1 << 20, 1], "launches.0.block": [1024, 2, 1],
    "launches.0.block ": [32, 1], "launches.0.kernel": "a b", "launches.1.shared": 1 << 20,
    "launches.1.cooperative": "no", "launches.0": None, "buffers.0.dtype ": [],
    "buffers.0.dtype  ": {}, "buffers.0.dtype   ": "u32", "buffers.0.kind ": "output",
    "buffers.0.kind  ": [], "buffers.1.kind  ": "state", "buffers.6.name": "w",
    "launches.0.grid  ": [1 << 13, 1 << 12, 1], "launches": [],
    "launches.0.args  ": [0, 2, 6], "launches.1.args": [3, 4],
    "multiprocessors": 0, "multiprocessors ": "132", "multiprocessors  ": True,
    "multiprocessors   ": 1 << 30,
}  # fmt: skip


@pytest.mark.parametrize("path", BAD)
def test_plans_that_lie_are_refused(path: str, tmp_path: Path) -> None:
    plan = copy.deepcopy(PLAN)
    key = path.strip()
    if BAD[path] is None and key == "scratch_bytes":
        del plan[key]
    else:
        edit(key, BAD[path])(plan)
    written(tmp_path, plan)
    error = refused("B240", lambda: read_plan(tmp_path, "step", SPEC, STATES))
    assert error.exit_code == 2
    assert len(error.what) < 200


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "\ud800".encode("utf-8", "replace")]
)
def test_plans_that_are_none(text: Any, tmp_path: Path) -> None:
    written(tmp_path, text if isinstance(text, str) else text.decode())
    refused("B240", lambda: read_plan(tmp_path, "step", SPEC, STATES))


def test_plans_of_another_format(tmp_path: Path) -> None:
    written(tmp_path, {**PLAN, "version": 2})
    error = refused("X307", lambda: read_plan(tmp_path, "step", SPEC, STATES))
    assert error.exit_code == 3
    assert "format 2" in error.what


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000 + "a", "\ud800", "a\0"])
@pytest.mark.parametrize("key", ["cubin", "weights"])
def test_names_that_no_file_can_have(key: str, name: str, tmp_path: Path) -> None:
    _, plans = opened(written(tmp_path, {**PLAN, key: name}))
    with pytest.raises(PccError) as found:
        plans.executor("step")
    assert found.value.code in ("B212", "B213")
    str(found.value).encode()


def test_kernels_that_take_other_arguments(tmp_path: Path) -> None:
    device, plans = opened(written(tmp_path, PLAN))
    device.cu.kernels["scale"] = lambda x, w, y: None
    assert "'scale' does not take 4" in refused("B241", lambda: plans.executor("step")).what
    device.version = 12000  # a driver that cannot say
    plans.executor("step")


def test_kernels_are_unloaded_with_their_plans(tmp_path: Path) -> None:
    device, plans = opened(written(tmp_path, PLAN))
    run = plans.executor("step")
    del plans
    assert device.cu.open["module"] == 1
    del run
    assert device.cu.used == 0
    kept = [device.stream(), device.stream()]  # modules are given back a while later
    assert device.cu.open["module"] == 0
    assert len(kept) == device.cu.open["stream"]


def changed(**edits: Any) -> dict[str, Any]:
    """Return the plan with other values of its second launch or of its own."""
    plan = copy.deepcopy(PLAN)
    for key, value in edits.items():
        (plan if key in ("arch", "multiprocessors") else plan["launches"][1])[key] = value
    return plan


def test_more_shared_memory_than_a_block_may_have(tmp_path: Path) -> None:
    """What the kernel has without asking counts too; nothing was enqueued or allocated."""
    device, plans = opened(written(tmp_path, changed(shared=99 << 10)))
    device.cu.block_shared, device.cu.static_shared = 99 << 10, 1 << 10
    error = refused("X306", lambda: plans.executor("step"))
    assert "'settle' takes 100.0 KB" in error.what
    assert "99.0 KB" in error.what
    assert "--gpu sm_90" in error.hint
    assert not device.cu.queue
    assert device.cu.used == 0
    device.cu.static_shared = 0
    plans.executor("step")


def test_more_blocks_at_once_than_the_gpu_holds(tmp_path: Path) -> None:
    device, plans = opened(written(tmp_path, changed(grid=[3, 1, 1])))
    error = refused("X306", lambda: plans.executor("step"))
    assert "3 blocks of kernel 'settle'" in error.what
    assert "--gpu sm_90:2" in error.hint
    device.cu.blocks_each = 2  # on each of two multiprocessors
    plans.executor("step")
    written(tmp_path, changed(grid=[3, 1, 1], cooperative=False))
    opened(tmp_path)[1].executor("step")


def test_another_number_of_multiprocessors_is_noted_once(tmp_path: Path) -> None:
    _, plans = opened(written(tmp_path, changed(multiprocessors=132)))
    with pytest.warns(RuntimeWarning, match="132 multiprocessors, Fake GPU has 2") as said:
        plans.executor("step")
    assert len(said) == 1
    assert "--gpu sm_90:2" in str(said[0].message)
    plans.executor("step")
    written(tmp_path, changed(multiprocessors=2))
    opened(tmp_path)[1].executor("step")


@pytest.mark.parametrize(("arch", "capability"), [("sm_80", (8, 0)), ("sm_90", (9, 0))])
def test_launches_overlap_where_kernels_can_wait(
    arch: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    written(tmp_path, changed(arch=arch, overlap=True, cooperative=False))
    device = Device(0, Cuda(capability=capability))
    device.cu.kernels.update(scale=scale, settle=settle)
    manifest = {"queries": {"step": SPEC}, "generation": {"states": STATES}}
    run = Plans(device, tmp_path, manifest, 1).executor("step")
    assert [k.overlap for k in run.loaded.kernels] == [False, capability >= (9, 0)]


def test_types_have_one_size() -> None:
    from pcc.backends.cuda import plan

    assert plan.ITEM == dtypes.ITEM


@pytest.mark.parametrize("key", ["cubin", "weights"])
def test_paths_stay_inside(key: str, tmp_path: Path) -> None:
    plan = copy.deepcopy(PLAN)
    plan[key] = "../../etc/passwd"
    _, plans = opened(written(tmp_path, plan))
    refused("B213", lambda: plans.executor("step"))


def test_code_without_a_kernel(tmp_path: Path) -> None:
    device, plans = opened(written(tmp_path, PLAN))
    del device.cu.kernels["settle"]
    refused("B241", lambda: plans.executor("step"))
    device, plans = opened(tmp_path)
    device.cu.room = 300
    assert "needed" in refused("X305", lambda: plans.executor("step")).what
