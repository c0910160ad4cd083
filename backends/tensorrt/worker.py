"""Engines built side by side, each by a process of its own.

Builders of one process share their logger, so that what is said of one engine could not be told
from what is said of another; and one that crashes would take the compiler with it. A worker is
`python -m pcc.backends.tensorrt.worker TASK`: it reads a task, a JSON file, and writes the plan,
and beside it `NAME.plan.json`, what was made or the error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from pcc.backends.tensorrt.build import Builder, Built
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.errors import PccError

MODULE = "pcc.backends.tensorrt.worker"
SHOWN = 300  # characters of what a lost process said


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

    Errors: the first worker's that fails, E435 where its process ends without a word. The others
    are then stopped.
    """
    with _processes() as start, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_built, task, start) for task in tasks]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            start.stop()
            raise


class _Starter:
    """Starts workers, and stops those that run."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []
        self.stopped, self.lock = False, Lock()

    def __call__(self, task: Task) -> subprocess.Popen[str]:
        """Start a worker. Errors: E435 after `stop`."""
        call = [sys.executable, "-m", MODULE, str(task.order)]
        with self.lock:
            if self.stopped:
                raise PccError("E435", "another engine was not built")
            worker = subprocess.Popen(
                call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace",
            )  # fmt: skip
            self.running.append(worker)
        return worker

    def stop(self) -> None:
        """End every worker."""
        with self.lock:
            self.stopped = True
            for worker in self.running:
                worker.kill()


@contextmanager
def _processes() -> Iterator[_Starter]:
    start = _Starter()
    try:
        yield start
    finally:
        start.stop()


def _built(task: Task, start: Callable[[Task], subprocess.Popen[str]]) -> tuple[Task, Built, bytes]:
    task.order.write_text(json.dumps(asdict(task)), encoding="utf-8")
    worker = start(task)
    said, _ = worker.communicate()
    task.order.unlink()
    try:
        made = json.loads(task.report.read_text(encoding="utf-8"))
    except OSError:
        last = " ".join(said.split())[-SHOWN:]
        what = f"the process that built it ended with code {worker.returncode}: {last}"
        hint = "too little memory ends processes: fewer jobs take less"
        raise PccError("E435", what, at=task.name, hint=hint) from None
    task.report.unlink()
    if error := made.get("error"):
        raise PccError(error["code"], error["what"], at=error["at"], hint=error["hint"])
    cache = task.timings.read_bytes() if task.timings.exists() else b""
    task.timings.unlink(missing_ok=True)
    return task, Built(None, **made), cache


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


def main() -> None:
    """Do the task in the file that is named."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    report = json.dumps(work(task))
    part = task.report.with_suffix(".part")
    part.write_text(report, encoding="utf-8")
    part.rename(task.report)


if __name__ == "__main__":
    main()
