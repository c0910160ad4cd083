"""Engines built side by side, each by a process of its own.

Builders of one process share their logger, so that what is said of one engine could not be told
from what is said of another; and one that crashes would take the compiler with it. A worker reads a
task, a JSON file, and writes the plan, and beside it `NAME.plan.json`, what was made or the error.
It finds modules where the compiler does (`sys.path`), and nowhere else: not in the folder that the
user happens to be in. It ends when the compiler does, however that ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from pcc.backends.tensorrt.build import Builder, Built
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.errors import PccError

# What a worker runs: its arguments are the places of modules and a task.
START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pcc.backends.tensorrt.worker import main
main(sys.argv[2])"""
SHOWN = 300  # characters of what a lost process said
FEWER = "too little memory ends processes: fewer jobs take less"


@dataclass(frozen=True)
class Task:
    """A graph at `model` to build for a runtime into `plan`; `cache`: a timing cache, or ''."""

    runtime: str
    options: Mapping[str, Any]
    model: str
    plan: str
    profiles: Sequence[Mapping[str, Sequence[int]]] = ()
    cache: str = ""

    @property
    def name(self) -> str:
        """The graph's name."""
        return Path(self.model).stem

    @property
    def order(self) -> Path:
        """Where the worker reads what to do."""
        return Path(f"{self.plan}.task")

    @property
    def report(self) -> Path:
        """Where the worker says what it made."""
        return Path(f"{self.plan}.json")

    @property
    def timings(self) -> Path:
        """Where the worker leaves its timing cache."""
        return Path(f"{self.plan}.timings")


def run(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Built, bytes]]:
    """Build engines, `jobs` at a time; yield each as it is ready, with its timing cache.

    Errors: the first worker's that fails, E435 where its process does not start, or ends without a
    plan. The others are then stopped.
    """
    start = _Starter()
    with ThreadPoolExecutor(jobs) as pool:
        try:  # from here on: leaving the pool waits for what runs
            for done in as_completed(_submitted(pool, tasks, start)):
                yield done.result()
        finally:
            start.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _submitted(
    pool: ThreadPoolExecutor, tasks: Sequence[Task], start: _Starter
) -> list[Future[tuple[Task, Built, bytes]]]:
    try:
        return [pool.submit(_built, task, start) for task in tasks]
    except RuntimeError as e:  # the system has no thread
        raise PccError("E435", f"engines are not built side by side: {e}", hint=FEWER) from None


class _Starter:
    """Starts workers, and stops those that run."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []
        self.stopped, self.lock = False, Lock()

    def __call__(self, task: Task) -> subprocess.Popen[str]:
        """Start a worker. Errors: E435 after `stop`, and where the system has no process."""
        call = [sys.executable, "-P", "-c", START, json.dumps(sys.path), str(task.order)]
        with self.lock:
            if self.stopped:
                raise PccError("E435", "another engine was not built")
            try:
                worker = subprocess.Popen(
                    call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    text=True, errors="replace",
                )  # fmt: skip
            except OSError as e:
                what = f"no process starts to build it: {e.strerror}"
                raise PccError("E435", what, at=task.name, hint=FEWER) from None
            self.running.append(worker)
        return worker

    def stop(self) -> None:
        """End every worker."""
        with self.lock:
            self.stopped = True
            for worker in self.running:
                worker.kill()


def _built(task: Task, start: Callable[[Task], subprocess.Popen[str]]) -> tuple[Task, Built, bytes]:
    task.order.write_text(json.dumps(asdict(task)), encoding="utf-8")
    with start(task) as worker:
        assert worker.stdout is not None
        said = worker.stdout.read()  # `communicate` would close its input, which ends it
        code = worker.wait()
    task.order.unlink()
    made = _reported(task)
    if error := made.get("error"):
        raise PccError(error["code"], error["what"], at=error["at"], hint=error["hint"])
    if code or not made or not Path(task.plan).is_file():
        last = " ".join(said.split())[-SHOWN:]
        what = f"the process that built it ended with code {code}: {last}"
        raise PccError("E435", what, at=task.name, hint=FEWER)
    cache = task.timings.read_bytes() if task.timings.exists() else b""
    task.timings.unlink(missing_ok=True)
    return task, Built(None, **made), cache


def _reported(task: Task) -> dict[str, Any]:
    """Return what a worker has reported, nothing if it has not, and remove the report."""
    try:
        made: dict[str, Any] = json.loads(task.report.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    task.report.unlink()
    return made


def work(task: Task) -> dict[str, Any]:
    """Build one engine into its file; return what the report holds."""
    import onnx_ir as ir

    r = RUNTIMES[task.runtime]
    path = Path(task.model)
    cache = Path(task.cache).read_bytes() if task.cache else b""
    try:
        builder = Builder(r, BuildOptions.of(task.options), cache)
        made = builder.build(ir.load(path), path, task.profiles)
    except PccError as e:
        return {"error": {"code": e.code, "what": e.what, "at": e.at, "hint": e.hint}}
    with Path(task.plan).open("wb") as f:
        f.write(made.plan)
    if builder.cache:
        task.timings.write_bytes(builder.cache)
    return {"layers": made.layers, "seconds": made.seconds, "said": made.said,
            "pinned": made.pinned}  # fmt: skip


def main(order: str) -> None:
    """Do the task in the file that is named."""
    Thread(target=_end_with_the_compiler, daemon=True).start()
    task = Task(**json.loads(Path(order).read_text(encoding="utf-8")))
    report = json.dumps(work(task))
    part = task.report.with_suffix(".part")
    part.write_text(report, encoding="utf-8")
    part.rename(task.report)


def _end_with_the_compiler() -> None:
    """Wait for the end of the input, which the compiler holds open and writes nothing to."""
    sys.stdin.read()
    os._exit(1)
