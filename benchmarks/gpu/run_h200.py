"""Run stages on a GPU machine and collect what they write: one file, whatever fails.

    python3 benchmarks/gpu/run_h200.py --out OUT [--budget 560] [--commit ID] STAGE...
    python3 benchmarks/gpu/run_h200.py --list

OUT/parts.json gets an entry for each command: stage, name, exit status, seconds, and the rows or
the report that it wrote; OUT/log.txt the ends of their outputs. Entries are written as they come,
so that a run that is cut off loses nothing but the command that was running. A command that an
earlier file (`--done`) holds with status 0 is not repeated. Runs may go on side by side, each with
a folder OUT of its own (`--only trt-ops`). With `--only compile` bundles are made
beside other work, and timed later (`--only bench`), when nothing else runs. `merge.py` puts the
parts together.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu.stages import STAGES, Command, Stage  # noqa: E402

EXPECTED = "benchmarks/results/conformance_expected.json.gz"
LENT = ("yaml",)  # which reads the configurations of checkpoints
LOG = 12_000  # characters kept of the end of a command's output


def interpreter(command: Command, kits: Path) -> list[str]:
    """Return how to start a command: TensorRT's kit brings a shell function of its own."""
    args = list(command.args)
    if command.python == "trt":
        script = f'source "{kits}/trt/env.sh"; trtpy "$@"'
        return ["bash", "-c", script, "trtpy", *args]
    return [sys.executable, *args]


def environment(command: Command, kits: Path, work: Path) -> dict[str, str]:
    """Return the environment: the checkout, and what a kit has or lacks, on the path of modules."""
    paths = [str(ROOT)] + ([str(kits / "ort")] if command.python == "ort" else [])
    if command.python == "trt":
        paths.append(str(lent(work / "lent")))
    extra = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if command.python == "ort":
        extra["LD_LIBRARY_PATH"] = os.pathsep.join(
            [*cuda_libraries(), *_present("LD_LIBRARY_PATH")]
        )
    return {**os.environ, **extra}


def lent(folder: Path) -> Path:
    """Return a folder with links to the system's packages that TensorRT's Python may lack.

    They work without the parts that are compiled for one version. What the kit has comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in LENT:
        found = importlib.util.find_spec(name)
        places = found.submodule_search_locations if found is not None else None
        link = folder / name
        if places and not link.is_symlink():
            with contextlib.suppress(FileExistsError):  # runs side by side
                link.symlink_to(next(iter(places)))
    return folder


def cuda_libraries() -> list[str]:
    """Return the folders of the CUDA libraries that came with the system's Python."""
    found = []
    for place in map(Path, sys.path):
        found += [str(p) for p in place.glob("nvidia/*/lib") if p.is_dir()]
    return found


def _present(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []


def run(command: Command, a: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run one command within a limit; return its entry. Whatever it started ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        places = {"json": str(path), "work": str(a.work), "root": str(ROOT), "expected": EXPECTED,
                  "checkpoints": str(a.checkpoints)}  # fmt: skip
        args = [_filled(x, places) for x in interpreter(command, a.kits)]
        began, text, status = time.monotonic(), "", 0
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(
                args, cwd=ROOT, env=environment(command, a.kits, a.work), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                status = 124
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            log.seek(0)
            text = log.read()[-LOG:]
        entry: dict[str, Any] = {
            "name": command.name, "status": status, "writes": command.writes,
            "seconds": round(time.monotonic() - began, 1), "log": text,
        }  # fmt: skip
        if command.writes and path.is_file():
            try:
                entry["data"] = json.loads(path.read_text())
            except ValueError:
                entry["status"] = status or 1
        return entry


def _filled(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def chosen(patterns: list[str]) -> list[Stage]:
    """Return the stages whose names match, in the order of the patterns."""
    out: list[Stage] = []
    for p in patterns:
        found = [s for s in STAGES if fnmatch.fnmatch(s.name, p)]
        if not found:
            raise SystemExit(f"no stage {p!r}: --list shows them")
        out += [s for s in found if s not in out]
    return out


def arguments() -> argparse.Namespace:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stages", nargs="*", help="names or patterns")
    p.add_argument("--list", action="store_true")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pcc-bench")
    p.add_argument("--kits", type=Path, default=Path.home() / "kits", help="holds ort/ and trt/")
    p.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    p.add_argument("--commit", default="unknown")
    p.add_argument("--checkpoints", type=Path, help="what checkpoints.py wrote")
    p.add_argument("--only", action="append", help="of each stage the commands of these names")
    p.add_argument("--done", type=Path, help="parts of an earlier run")
    return p.parse_args()


def main() -> int:
    """Run the stages that are named, while the budget lasts."""
    a = arguments()
    if a.list:
        for s in STAGES:
            print(
                s.name, *(f"{c.name} ({c.seconds} s, {c.python})" for c in s.commands), sep="\n  "
            )
        return 0
    a.out.mkdir(parents=True, exist_ok=True)
    a.work.mkdir(parents=True, exist_ok=True)
    end, parts = time.monotonic() + a.budget, []
    done = set()
    if a.done is not None:
        done = {(e["stage"], e["name"]) for e in json.loads(a.done.read_text()) if not e["status"]}
    for stage in chosen(a.stages):
        for command in stage.commands:
            if a.only and command.name not in a.only:
                continue
            left = end - time.monotonic()
            if (stage.name, command.name) in done and command.writes:
                continue
            if a.checkpoints is None and any("{checkpoints}" in x for x in command.args):
                print(f"no --checkpoints: {stage.name} {command.name} is left out", flush=True)
                continue
            if left < 5:
                print(f"no time left for {stage.name} {command.name}", flush=True)
                continue
            entry = run(command, a, min(left, command.seconds))
            date = datetime.now(UTC).isoformat(timespec="seconds")
            parts.append({"stage": stage.name, "commit": a.commit, "date": date, **entry})
            print(f"{stage.name} {command.name}: status {entry['status']}, {entry['seconds']} s")
            print("\n".join(entry["log"].splitlines()[-12:]), flush=True)
            (a.out / "parts.json").write_text(json.dumps(parts, indent=1))
            if entry["status"] and command.name == "compile":
                break  # there is nothing to time
    return int(any(e["status"] for e in parts))


if __name__ == "__main__":
    sys.exit(main())
