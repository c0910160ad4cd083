"""What this machine has: packages, versions, providers."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from pcc.errors import PccError

CORE = "reinstall pcc: pip install --force-reinstall pcc"
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
PARTS = (
    ("numpy", True, CORE),
    ("onnx", True, CORE),
    ("onnx-ir", True, CORE),
    ("safetensors", True, CORE),
    ("networkx", True, CORE),
    ("sympy", True, CORE),
    ("pyyaml", True, CORE),
    ("torch", False, "pip install 'pcc[torch]': only to read .pt checkpoints"),
    ("cuda-bindings", False, "pip install 'pcc[gpu]': only for provider='cuda' and 'tensorrt'"),
    ("tensorrt", False, "pip install 'pcc[tensorrt]': only for provider='tensorrt'"),
)


@dataclass(frozen=True)
class Finding:
    """One part of the environment; `state` is ok, missing, not installed or a conflict."""

    name: str
    version: str
    required: bool
    state: str
    remedy: str


def installed(name: str) -> str:
    """Return the version of an installed distribution, or nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def examine() -> list[Finding]:
    """Return what is there and what is missing."""
    out = [Finding("python", platform.python_version(), True, "ok", "")]
    for name, required, remedy in PARTS:
        version = installed(name)
        state = "ok" if version else "missing" if required else "not installed"
        out.append(Finding(name, version, required, state, "" if version else remedy))
    return [*out, *_runtime(), *_gpu()]


def _runtime() -> list[Finding]:
    cpu, gpu = map(installed, RUNTIMES)
    if cpu and gpu:
        remedy = "uninstall both, then install one, never both: they share a folder"
        return [Finding("onnxruntime", cpu, True, "two of them", remedy)]
    if not cpu and not gpu:
        remedy = "pip install 'pcc[cpu]', or 'pcc[gpu]' for NVIDIA, never both"
        return [Finding("onnxruntime", "", True, "missing", remedy)]
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    return [
        Finding("onnxruntime", cpu or gpu, True, "ok", ""),
        Finding("providers", providers, False, "ok", ""),
    ]


def _gpu() -> list[Finding]:
    """Return the driver and every GPU with its architecture and memory, or why there is none."""
    from pcc.runtime.device.driver import Device, shown

    if not installed("cuda-bindings"):
        return []
    try:
        first = Device()
        count = int(first("cuDeviceGetCount"))
        gpus = [first, *(Device(i) for i in range(1, count))]
    except PccError as e:
        return [Finding("NVIDIA driver", "", False, e.what, e.hint)]
    version = f"CUDA {first.version // 1000}.{first.version % 1000 // 10}"
    out = [Finding("NVIDIA driver", version, False, "ok", "")]
    for g in gpus:
        g.enter()
        free, total = g.memory()
        what = f"{g.name}, {g.arch}, {shown(free)} of {shown(total)} free"
        out.append(Finding(f"GPU {g.ordinal}", what, False, "ok", ""))
    return out
