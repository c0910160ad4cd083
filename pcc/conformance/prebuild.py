"""Compiles bundles of the suite side by side, before they are needed one after the other.

Compilers of machine code take most of a run; they wait for nothing here. What fails is left out: it
fails again, and is reported, where the bundle is needed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pcc.conformance.bundles import SIMULATOR, Setting
from pcc.conformance.circuits import circuits, place_of
from pcc.conformance.scenarios import SCENARIOS, Scenario, built, wanted
from pcc.driver import compile
from pcc.errors import PccError

Say = Callable[[str], None]


def prebuild(
    settings: list[Setting], parts: tuple[str, ...], folder: Path, jobs: int, say: Say,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
) -> None:  # fmt: skip
    """Compile what these settings need of queries and protocol, `jobs` bundles at a time."""
    tasks: list[tuple[str | Scenario, Setting]] = []
    for s in settings:
        if s.provider == SIMULATOR:
            continue
        if "queries" in parts:
            tasks += [(name, s) for name in circuits() if s.takes(name)]
        if "protocol" in parts:
            tasks += [(x, s) for x in scenarios if wanted(x, s)]
    if jobs < 2 or not tasks:
        return
    say(f"compiling {len(tasks)} bundles, {jobs} at a time")
    context = multiprocessing.get_context("spawn")  # nothing of a device may be inherited
    try:
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            for done in as_completed([pool.submit(_one, *t, folder) for t in tasks]):
                say(done.result())
    except BrokenProcessPool:
        say("a compilation has ended its process; what is missing is compiled when it is needed")


def _one(what: str | Scenario, setting: Setting, folder: Path) -> str:
    """Compile a circuit by name, or a scenario."""
    name = what if isinstance(what, str) else what.name
    try:
        if isinstance(what, str):
            out = place_of(folder, what, setting)
            compile(circuits()[what], out=out, validate=False, **setting.options())
        else:
            built(what, setting, folder)
    except PccError as e:
        return f"not compiled: {name}: {e.what}"
    return f"compiled: {name}"
