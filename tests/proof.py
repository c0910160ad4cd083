"""`make proof`: every proof at full size; writes `proof.json` with the date and the machine.

Runs all tests, the slow ones too, and keeps what they measured (`record_property`). A proof that
could not run for want of the shared data is not a proof: it counts as a failure. Other arguments
go to pytest: `python tests/proof.py --out part.json tests/oracle -k sampling`. The file is written
as tests end, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "sympy", "networkx", "safetensors", "torch",
            "hypothesis", "pytest", "libcirkit")  # fmt: skip
MISSING = "shared folder missing"
EVERY = 20.0  # seconds between reports of a run that is not complete


class Proofs:
    """A pytest plugin: what ran, how it ended, what it measured."""

    def __init__(self, out: Path) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.out, self.written = out, time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Join the phases of a test; a failure or skip in any of them is its outcome."""
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] += report.duration
        if report.outcome != "passed":
            entry["outcome"] = report.outcome
            entry["reason"] = self._reason(report)
        if "slow" in report.keywords:
            entry["slow"] = True
        if report.when == "call" and report.user_properties:
            entry["measured"] = {k: _plain(v) for k, v in report.user_properties}
        if time.monotonic() > self.written + EVERY:
            made_of = report_of(self)
            save(self.out, {**made_of, "complete": False, "proven": False})
            self.written = time.monotonic()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read is a failed proof; one that is skipped whole says why."""
        if report.skipped:
            self.tests[report.nodeid] = {
                "outcome": "skipped", "seconds": 0.0, "reason": self._reason(report),
            }  # fmt: skip
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self.tests[report.nodeid] = {
                "outcome": "failed", "seconds": 0.0, "reason": text[-1][:300] if text else "",
            }  # fmt: skip

    @staticmethod
    def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
        if isinstance(report.longrepr, tuple):
            return str(report.longrepr[2])
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(getattr(crash, "message", report.longrepr)).splitlines()[0][:300]

    def failures(self) -> list[str]:
        """Tests that failed, or that skipped because the shared data are absent."""
        return [k for k, e in self.tests.items()
                if e["outcome"] == "failed" or MISSING in e.get("reason", "")]  # fmt: skip


def _plain(value: object) -> object:
    if isinstance(value, bool | int | str):
        return value
    try:
        return float(f"{float(value):.6g}")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)


def machine() -> dict[str, Any]:
    """Return what the proofs ran on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(terse=True),
            "versions": versions}  # fmt: skip


def commit() -> str:
    """Return the commit that was proven; a changed checkout says so."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = [s for s in git("status", "--porcelain").splitlines() if "proof.json" not in s]
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def summary(tests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return counts and seconds by file."""
    files: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(tests.items()):
        row = files.setdefault(name.split("::")[0], {"outcomes": Counter(), "seconds": 0.0})
        row["outcomes"][entry["outcome"]] += 1
        row["seconds"] += entry["seconds"]
    return {k: {**r["outcomes"], "seconds": round(r["seconds"], 1)} for k, r in files.items()}


def report_of(proofs: Proofs) -> dict[str, Any]:
    """Return the content of `proof.json`: files, and every test that is slow or measured.

    `not_run`: files of which no test ran, and why: of them nothing is proven.
    """
    notable = {
        name: {**entry, "seconds": round(entry["seconds"], 2)}
        for name, entry in sorted(proofs.tests.items())
        if "measured" in entry or "slow" in entry or entry["outcome"] != "passed"
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "complete": True,
        "proven": not proofs.failures(),
        "not_run": {
            k: e["reason"]
            for k, e in notable.items()
            if e["outcome"] == "skipped" and "::" not in k
        },
        "files": summary(proofs.tests),
        "proofs": notable,
    }


def say(result: dict[str, Any], failures: list[str]) -> None:
    """Print the result for people."""
    for name, row in result["files"].items():
        counts = ", ".join(f"{v} {k}" for k, v in row.items() if k != "seconds")
        print(f"{name:48} {counts:32} {row['seconds']:8.1f} s")
    for name, entry in result["proofs"].items():
        if "measured" in entry and entry.get("slow"):
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in entry["measured"].items()))
    for name, reason in result["not_run"].items():
        print(f"not run {name}: {reason}")
    for name in failures:
        print(f"NOT PROVEN {name}: {result['proofs'][name].get('reason', '')}")
    print(f"{'proven' if result['proven'] else 'NOT PROVEN'}: {len(failures)} failures")


def lines(result: dict[str, Any]) -> str:
    """Return a result as JSON, with a line for each file of tests, and for each test."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if key in ("files", "proofs", "not_run"):
            listed = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = "{\n" + ",\n".join(listed) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(lines(result))
    part.replace(path)


def main(args: list[str] | None = None) -> int:
    """Run the proofs; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=ROOT / "proof.json")
    options, rest = parser.parse_known_args(args)
    options.out = options.out.resolve()
    proofs = Proofs(options.out)
    os.chdir(ROOT)
    code = pytest.main(["-q", "-m", "slow or not slow", *(rest or ["tests"])], plugins=[proofs])
    result = report_of(proofs)
    failures = proofs.failures()
    bad = code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not proofs.tests
    result["proven"] = result["proven"] and not bad
    save(options.out, result)
    say(result, failures)
    return 1 if failures or bad else 0


if __name__ == "__main__":
    sys.exit(main())
