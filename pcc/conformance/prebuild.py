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
from pcc.conformance.scenarios import SCENARIOS, built, wanted
from pcc.driver import compile
from pcc.errors import PccError

Say = Callable[[str], None]


def prebuild(
    settings: list[Setting], parts: tuple[str, ...], folder: Path, jobs: int, say: Say
) -> None:
    """Compile what these settings need of queries and protocol, `jobs` bundles at a time."""
    tasks: list[tuple[str, str, Setting]] = []
    for s in settings:
        if s.provider == SIMULATOR:
            continue
        if "queries" in parts:
            tasks += [("circuit", name, s) for name in circuits() if s.takes(name)]
        if "protocol" in parts:
            tasks += [("scenario", x.name, s) for x in SCENARIOS if wanted(x, s)]
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


def _one(kind: str, name: str, setting: Setting, folder: Path) -> str:
    try:
        if kind == "circuit":
            out = place_of(folder, name, setting)
            compile(circuits()[name], out=out, validate=False, **setting.options())
        else:
            built(next(s for s in SCENARIOS if s.name == name), setting, folder)
    except PccError as e:
        return f"not compiled: {name}: {e.what}"
    return f"compiled: {name}"
