"""How many drafts of a round are accepted: as it is stated, or as an exploration measured it.

Acceptance does not depend on the machine, so that heads may be explored on a CPU and compiled for a
GPU. A CPU has no bf16: where a report has not the precision that is asked for, its fp32 is taken,
and who asks is told.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pcc.errors import PccError
from pcc.explore.forms import Form
from pcc.explore.heads import OWN
from pcc.explore.records import Line, Report, conforms
from pcc.explore.report import decoding
from pcc.files import read_bounded
from pcc.knobs import MAX_RESULT_BYTES


def stated(given: Sequence[str]) -> dict[str, float]:
    """Read `FORM=NUMBER`, each form once. Errors: G111."""
    out: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals or not name or name in out:
            hint = "FORM=DRAFTS, each form once: full=5.1"
            raise PccError("G111", f"--accepted {text[:40]!r}", hint=hint)
        out[name] = value
    return out


def measured(
    path: Path, source: Path | None, n: int, forms: Sequence[Form], precision: str, *, greedy: bool
) -> tuple[dict[str, float], list[str]]:
    """Return the accepted drafts of those forms that a report has, by name. Errors: G113.

    With it, the forms of which fp32 was measured instead of the precision that is asked for. A
    round of a report emits what it accepts and one more. Points that are measured more than once
    count with their mean; points with another greedy text do not count.
    """
    lines = _of_head(_read(path), source, n, path)
    out: dict[str, float] = {}
    wide = []
    for form in forms:
        for wanted in dict.fromkeys((precision, "fp32")):
            own = [x for x in lines if _is(x["point"], form, wanted, greedy=greedy)]
            found = [decoding(x, "greedy" if greedy else "sampled") for x in own]
            if sizes := [d["bytes_per_round"]["value"] for d in found if d is not None]:
                out[form.name] = statistics.mean(sizes) - 1
                wide += [form.name] * (wanted != precision)
                break
    return out, wide


def _read(path: Path) -> Report:
    try:
        value = json.loads(read_bounded(path, MAX_RESULT_BYTES, "G113"))
    except OSError as e:
        raise PccError("G113", f"cannot read it: {e.strerror}", at=str(path)) from None
    except (ValueError, RecursionError):
        value = None
    if not conforms(value, Report):
        hint = "report.json in the folder that `pcc explore` of this version wrote"
        raise PccError("G113", "is no report of an exploration", at=str(path), hint=hint)
    return value


def _of_head(report: Report, source: Path | None, n: int, path: Path) -> list[Line]:
    """Return the points of a head at this n: an exploration names heads by their files."""
    names = {OWN}
    if source is not None:
        whole = source.resolve()
        own = whole.stem if whole.suffix == ".pcir" else whole.name
        names = {own, f"{whole.parent.name}/{own}"}
    found = [x for x in report["points"] if x["point"]["head"] in names and x["point"]["n"] == n]
    if not found:
        there = sorted({f"{x['point']['head']} n={x['point']['n']}" for x in report["points"]})
        what = f"has no point of {' or '.join(sorted(names))} with n={n}"
        raise PccError("G113", what[:200], at=str(path), hint=f"it has {', '.join(there)[:200]}")
    return found


def _is(point: Mapping[str, object], form: Form, precision: str, *, greedy: bool) -> bool:
    kind = "draft_mode" if greedy else "proposal"
    integers = "head" if form.int8 else "none"
    return (point[kind], point["int8"], point["precision"]) == (form.draft, integers, precision)
