"""Interleaved timing: each candidate is called once a round, so that drift hits all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over `repeats` rounds."""

    median: float
    p10: float
    p90: float
    repeats: int

    def json(self, prefix: str) -> dict[str, float]:
        """Return the three quantiles under names that start with `prefix`."""
        return {
            f"{prefix}_us": round(self.median, 2),
            f"{prefix}_p10_us": round(self.p10, 2),
            f"{prefix}_p90_us": round(self.p90, 2),
        }


def interleaved(
    calls: Mapping[str, Call], seconds: float, *, warm: int = 5, least: int = 15
) -> dict[str, Timing]:
    """Time all calls round by round for about `seconds` in total, at least `least` rounds.

    The order changes from round to round: each call follows each other one, with what that left in
    the caches.
    """
    for call in calls.values():
        for _ in range(warm):
            call()
    taken: dict[str, list[int]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds, rng, order = 0, np.random.default_rng(0), list(calls)
    while rounds < least or time.perf_counter() < end:
        for name in rng.permutation(order):
            call = calls[name]
            start = time.perf_counter_ns()
            call()
            taken[name].append(time.perf_counter_ns() - start)
        rounds += 1
    out = {}
    for name, ns in taken.items():
        p10, median, p90 = np.percentile(np.array(ns) / 1e3, [10, 50, 90])
        out[name] = Timing(float(median), float(p10), float(p90), rounds)
    return out


def environment(threads: int) -> dict[str, Any]:
    """Return date, processor, versions and the thread count of a run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("numpy", "torch", "onnx", "onnxruntime", "onnxscript", "libcirkit", "pcc"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "threads": threads,
    }
