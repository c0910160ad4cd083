"""The whole suite for one target and provider, part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcc.conformance.asked import (
    PARTS,
    check_folder,
    check_parts,
    check_setting,
    unchecked,
)
from pcc.conformance.bundles import Order, Setting
from pcc.conformance.circuits import check_queries
from pcc.conformance.ops import check_ops
from pcc.conformance.prebuild import prebuild
from pcc.conformance.report import DEVICE_FAILED, Finding
from pcc.conformance.scenarios import (
    SCENARIOS,
    Scenario,
    check_protocol,
    expected,
    key_of,
)

Say = Callable[[str], None]


def check(
    setting: Setting,
    say: Say,
    *,
    parts: tuple[str, ...] | None = None,
    batches: tuple[int, ...] = (1, 3),
    stored: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    jobs: int = 1,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
) -> Iterator[Finding]:
    """Yield what was found, part by part; bundles are built below `folder` (default: temporary).

    Without `parts`, all are run. `jobs` bundles are compiled at a time.

    A part that the environment cannot run at all raises; what one case meets is a finding. A part
    in which nothing was found equal is a finding too. Errors: E141, C140 to C146 for what cannot be
    asked (`pcc.conformance.asked`).
    """
    settings = [replace(setting, batch=batch) for batch in batches]
    check_setting(setting)
    parts = PARTS if parts is None else parts
    check_parts(settings, parts, scenarios)
    if folder is not None:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    kept: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="pcc-conformance-") as own:
        place = folder or Path(own)
        if setting.provider in ("cuda", "tensorrt"):
            from pcc.runtime.device.driver import device

            device()  # what is missing is said before minutes are spent on compiling
        with prebuild(settings, parts, place, jobs, say, scenarios) as order:
            for s in settings:
                for found in _parts(s, parts, place, say, stored, scenarios, order):
                    kept.append(found)
                    yield found
                    if found.note.startswith(f"[{DEVICE_FAILED}]"):
                        # A kernel that fails takes the device's context with it.
                        note = "the device has failed: what comes after is not run"
                        yield Finding(found.suite, "everything else", "", "refused", note=note)
                        return
    yield from unchecked(parts, kept)


def _parts(
    s: Setting, parts: tuple[str, ...], place: Path, say: Say, stored: Mapping[str, Any] | None,
    scenarios: tuple[Scenario, ...], order: Order,
) -> Iterator[Finding]:  # fmt: skip
    if "ops" in parts:
        yield from check_ops(s, place, say, None, order)
    if "queries" in parts:
        yield from check_queries(s, place, say, order)
    if "protocol" in parts:
        yield from check_protocol(s, place, say, stored, scenarios, order)


def expectations(
    say: Say, batches: tuple[int, ...] = (1, 3), scenarios: tuple[Scenario, ...] = SCENARIOS
) -> dict[str, Any]:
    """Return the texts of all scenarios as a CPU makes them, for where no CPU runtime is."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pcc-conformance-") as own:
        for s in scenarios:
            for precision in s.precisions:
                for batch in (b for b in batches if b in s.batches):
                    key = key_of(s, batch, precision)
                    say(f"expected: {key}")
                    out[key] = expected(s, batch, precision, Path(own))
    return out
