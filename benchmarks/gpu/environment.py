"""Write what a GPU machine has, as JSON: `python benchmarks/gpu/environment.py OUT`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = ("numpy", "torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tensorrt",
            "cuda-bindings", "triton", "pcc")  # fmt: skip
QUERY = (
    "name,driver_version,compute_cap,memory.total,clocks.max.memory,clocks.max.sm,ecc.mode.current"
)


def output(*command: str) -> str:
    """Return the last line that a program prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "no answer"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {}
    for p in PACKAGES:
        try:
            found[p] = metadata.version(p)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Write the file that is named."""
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version"),
        "python": platform.python_version(), "cpus": os.cpu_count(), "versions": versions(),
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(about, indent=1))
    print(json.dumps(about))


if __name__ == "__main__":
    main()
