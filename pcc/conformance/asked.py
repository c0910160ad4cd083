"""What a run of the suite is asked for: all of it must be there to be checked.

A run that checks nothing would agree with anything. So names that match nothing, a part that has no
case at this precision or number of rows, and options that nothing reads are refused before anything
is compiled; and a part in which no comparison was "ok" fails at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pcc.conformance.bundles import BUILD, SIMULATOR, Setting
from pcc.conformance.circuits import circuits
from pcc.conformance.report import GOOD, Finding
from pcc.conformance.scenarios import Scenario, wanted
from pcc.errors import PccError
from pcc.ir.types import HALVES
from pcc.runtime.runner import RUN_BY
from pcc.targets import target_of

PARTS = ("ops", "queries", "protocol")
SIMULATED = "cuda"  # the target whose plans the simulator runs


def check_setting(setting: Setting) -> None:
    """Refuse what no run can have.

    Errors: E141 target, precision, engine options; C142 provider; C146 halves.
    """
    target = target_of(setting.target, setting.precision)
    if setting.provider == SIMULATOR:
        if setting.target != SIMULATED:
            what = f"target {setting.target!r} has no simulator"
            raise PccError("C142", what, hint=f"--target {SIMULATED}")
    elif setting.provider not in (BUILD, *RUN_BY[target.format]):
        what = f"provider {setting.provider[:40]!r} does not run target {setting.target!r}"
        own = (SIMULATOR,) if setting.target == SIMULATED else ()
        known = ", ".join((*RUN_BY[target.format], *own, BUILD))
        raise PccError("C142", what, hint=f"one of {known}")
    if setting.engine and target.format != "tensorrt":
        raise PccError("E141", f"target {setting.target!r} has no engine options")
    for half in setting.halves:
        if half not in HALVES:
            raise PccError("C146", f"no half {half[:40]!r}", hint=f"one of {', '.join(HALVES)}")


def check_parts(
    settings: Sequence[Setting], parts: Sequence[str], scenarios: Sequence[Scenario]
) -> None:
    """Refuse parts in which there is nothing to check. Errors: C140, C143."""
    if bad := set(parts) - set(PARTS):
        hint = f"one of {', '.join(PARTS)}"
        raise PccError("C140", f"no part {sorted(bad)[0][:40]!r}", hint=hint)
    if not parts or not settings:
        raise PccError("C143", "nothing is asked for", hint="name a part and a number of rows")
    s = settings[0]
    if s.halves and "ops" not in parts:
        raise PccError("C143", "--half is read by part ops alone", hint="--part ops")
    _check_names(s, parts, scenarios)
    if "protocol" in parts and not any(wanted(x, s) for x in scenarios for s in settings):
        rows = " or ".join(str(s.batch) for s in settings)
        what = f"no verifier that is asked for has {s.precision} with {rows} rows"
        raise PccError("C143", what, hint=_offered(s, scenarios))


def _check_names(s: Setting, parts: Sequence[str], scenarios: Sequence[Scenario]) -> None:
    """Refuse parts of names that are in no name, and names that leave a part empty."""
    names = {
        "queries": list(circuits()) if "queries" in parts else [],
        "protocol": [x.name for x in scenarios] if "protocol" in parts else [],
    }
    for only in s.only:
        if not any(only in name for listed in names.values() for name in listed):
            what = f"nothing in {', '.join(parts)} is named like {only[:40]!r}"
            known = [name for listed in names.values() for name in listed]
            raise PccError("C143", what, hint=", ".join(known) or "ops have no names")
    for part in ("queries", "protocol"):
        if part in parts and not any(s.takes(name) for name in names[part]):
            what = f"--only leaves nothing of part {part}"
            raise PccError("C143", what, hint="name the parts that you want: --part")


def _offered(s: Setting, scenarios: Sequence[Scenario]) -> str:
    rows = {b for x in scenarios if s.precision in x.precisions for b in x.batches}
    return f"{s.precision} has --batch {', '.join(map(str, sorted(rows)))}" if rows else ""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something: bundles of another run are not judged. Errors: C145."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "it is not empty: what another run compiled would be judged again"
        raise PccError("C145", what, at=str(folder), hint="name a new folder")


def unchecked(parts: Iterable[str], found: Sequence[Finding]) -> list[Finding]:
    """Return a fault for each part in which nothing was good and nothing bad."""
    out = []
    for part in parts:
        own = [f for f in found if f.suite == part]
        if not any(f.verdict in GOOD or f.bad for f in own):
            skipped = next((f.note for f in own if f.verdict == "skipped"), "no case was run")
            note = f"nothing was found equal: {skipped}"
            out.append(Finding(part, "the whole part", "", "differs", note=note))
    return out
