"""What this machine has: packages, versions, providers."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

PARTS = (
    ("numpy", True, "pip install pcc"),
    ("onnx", True, "pip install pcc"),
    ("onnx-ir", True, "pip install pcc"),
    ("safetensors", True, "pip install pcc"),
    ("onnxruntime", True, "pip install 'pcc[cpu]' (or 'pcc[gpu]', never both)"),
    ("torch", False, "pip install 'pcc[torch]': only to read .pt checkpoints"),
    ("tensorrt", False, "not used yet"),
)


@dataclass(frozen=True)
class Finding:
    """One part of the environment."""

    name: str
    version: str
    required: bool
    state: str
    remedy: str


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def examine() -> list[Finding]:
    """Return what is there and what is missing."""
    out = [Finding("python", platform.python_version(), True, "ok", "")]
    for name, required, remedy in PARTS:
        version = _version(name)
        if name == "onnxruntime":
            gpu = _version("onnxruntime-gpu")
            if version and gpu:
                out.append(
                    Finding(
                        name,
                        version,
                        required,
                        "both onnxruntime and onnxruntime-gpu",
                        "uninstall both, then install one: they share a folder",
                    )
                )
                continue
            version = version or gpu
        state = "ok" if version else ("missing" if required else "not installed")
        out.append(Finding(name, version, required, state, "" if version else remedy))
    if any(f.name == "onnxruntime" and f.version for f in out):
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
        out.append(Finding("providers", providers, False, "ok", ""))
    return out
