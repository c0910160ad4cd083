"""Compiles bundles of the suite side by side, while those that are ready are judged.

Compilers of machine code take most of a run. What fails is left out: it fails again, and is
reported, where the bundle is needed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pcc.conformance.bundles import SIMULATOR, Setting, compiled_to
from pcc.conformance.circuits import circuits, place_of
from pcc.conformance.ops import build_ops, ops_of, portions
from pcc.conformance.scenarios import SCENARIOS, Scenario, built, bundle_of, wanted
from pcc.errors import PccError

Say = Callable[[str], None]
Task = str | Scenario | int  # a circuit by name, a verifier, a portion of the ops by its place
T = TypeVar("T")
LOST = "a compilation has ended its process; what is missing is compiled when it is needed"


class Ahead:
    """Things are judged as their bundles are finished; those that nobody compiles come last."""

    def __init__(self, making: dict[Path, Future[str]], say: Say) -> None:
        self.making, self.say = making, say

    def of(self, items: Iterable[T], place: Callable[[T], Path]) -> Iterator[T]:
        """Yield each item once its bundle is there, or could not be made."""
        listed = [(item, self.making.get(place(item))) for item in items]
        waiting = {future: item for item, future in listed if future is not None}
        for done in as_completed(waiting):
            lost = isinstance(done.exception(), BrokenProcessPool)
            self.say(LOST if lost else done.result())
            yield waiting[done]
        yield from (item for item, future in listed if future is None)


@contextmanager
def prebuild(
    settings: list[Setting], parts: tuple[str, ...], folder: Path, jobs: int, say: Say,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
) -> Iterator[Ahead]:  # fmt: skip
    """Compile what these settings need, `jobs` bundles at a time, until the end of the block."""
    tasks = {
        place: (what, s)
        for s in settings
        if s.provider != SIMULATOR
        for place, what in _tasks(s, parts, folder, scenarios)
    }
    if jobs < 2 or not tasks:
        yield Ahead({}, say)
        return
    say(f"compiling {len(tasks)} bundles, {jobs} at a time")
    context = multiprocessing.get_context("spawn")  # nothing of a device may be inherited
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    try:
        yield Ahead({k: pool.submit(_one, *task, folder) for k, task in tasks.items()}, say)
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(
    s: Setting, parts: tuple[str, ...], folder: Path, scenarios: tuple[Scenario, ...]
) -> Iterator[tuple[Path, Task]]:
    """Yield what a setting needs, and where it is put."""
    if "ops" in parts and len(listed := portions(s)) > 1:  # one bundle is not worth a process
        yield from ((ops_of(s, folder, cases), i) for i, cases in enumerate(listed))
    if "queries" in parts:
        yield from ((place_of(folder, n, s), n) for n in circuits() if s.takes(n))
    if "protocol" in parts:
        yield from ((bundle_of(x, s, folder), x) for x in scenarios if wanted(x, s))


def _one(what: Task, setting: Setting, folder: Path) -> str:
    """Compile what a task names."""
    name = what.name if isinstance(what, Scenario) else str(what)
    try:
        if isinstance(what, str):
            out = place_of(folder, what, setting)
            compiled_to(setting, circuits()[what], out)
        elif isinstance(what, int):
            name = f"part {what + 1} of the ops"
            build_ops(setting, folder, portions(setting)[what])
        else:
            built(what, setting, folder)
    except PccError as e:
        return f"not compiled: {name}: {e.what}"
    return f"compiled: {name}"
