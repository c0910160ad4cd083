"""What this machine has: packages, versions, providers."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

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
    return [*out, *_runtime()]


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
