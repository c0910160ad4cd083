"""What a run of the suite found: one line for each comparison, a verdict, JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pcc.conformance.edge import Values
from pcc.errors import PccError

VERDICTS = ("ok", "built", "tie", "differs", "refused", "skipped")
BAD = ("differs", "refused")
GOOD = ("ok", "built")
DEVICE_FAILED = "X304"  # the code of a failing call of the driver


@dataclass(frozen=True)
class Finding:
    """One comparison: `error` beside the `bound` that it may reach, and what follows.

    Verdicts: "ok"; "built": compiled, and not run, as was asked; "tie": two answers differ where
    rounding decides between them, and both are right; "differs"; "refused": the backend cannot run
    what it claims to; "skipped": not run, for the reason in `note`.
    """

    suite: str
    case: str
    what: str
    verdict: str
    error: float = 0.0
    bound: float = 0.0
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether this fails the suite."""
        return self.verdict in BAD


def refused(suite: str, case: str, e: PccError) -> Finding:
    """Return the finding that a backend cannot do this. Where the environment is at fault: raises.

    A failing call of the driver, and sources that nvcc refuses or takes too long for, are faults of
    what was made.
    """
    if e.code.startswith("X") and e.code not in (DEVICE_FAILED, "X402", "X403"):
        raise e
    return Finding(suite, case, "", "refused", note=f"[{e.code}] {e.what}")


def built_only(suite: str, case: str, graphs: Iterable[str]) -> Iterator[Finding]:
    """Yield a finding for each graph of a bundle that was compiled, and is not run."""
    yield from (Finding(suite, case, name, "built") for name in graphs)


def compared(
    suite: str, case: str, what: str, want: Values, got: Values, tolerance: float,
    floor: float = 1.0,
) -> Finding:  # fmt: skip
    """Judge an answer: equal integers, infinities in the same places, never NaN, else an error.

    The error is |got - want| / max(floor, |want|) at its largest: relative above the floor, which
    is tiny for what has no cancellation, so that small masses are judged too. Where no element has
    a batch axis in the definition, the answer may repeat it for each row.
    """
    try:
        want = np.broadcast_to(want, got.shape)
    except ValueError:
        note = f"shape {got.shape}, not {want.shape}"
        return Finding(suite, case, what, "differs", math.inf, tolerance, note)
    if want.dtype.kind in "ib":
        wrong = int((want != got).sum())
        verdict = "differs" if wrong or got.dtype.kind not in "ib" else "ok"
        return Finding(suite, case, what, verdict, float(wrong), 0.0)
    got = got.astype(np.float64)
    if np.isnan(got).any():
        return Finding(suite, case, what, "differs", math.inf, tolerance, "NaN")
    if not np.array_equal(np.isinf(want) * np.sign(want), np.isinf(got) * np.sign(got)):
        return Finding(suite, case, what, "differs", math.inf, tolerance, "infinities differ")
    with np.errstate(invalid="ignore"):
        gap = np.where(want == got, 0.0, np.abs(want - got) / np.maximum(floor, np.abs(want)))
    worst = float(gap.max(initial=0.0))
    verdict = "ok" if worst <= tolerance else "differs"
    return Finding(suite, case, what, verdict, worst, tolerance)


def summary(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return one entry a suite: how many of each verdict, and the error largest by its bound."""
    groups: dict[str, list[Finding]] = {}
    for f in findings:
        groups.setdefault(f.suite, []).append(f)
    out = []
    for suite, group in groups.items():
        near = max(group, key=lambda f: f.error / f.bound if f.bound else 0.0)
        counts = {v: sum(f.verdict == v for f in group) for v in VERDICTS}
        out.append({"suite": suite, **counts, "worst": near.error, "bound": near.bound,
                    "worst_case": f"{near.case} {near.what}".strip()})  # fmt: skip
    return out


def as_json(findings: Iterable[Finding], **about: Any) -> dict[str, Any]:
    """Return the report: about the run, a summary, and each finding that is not good.

    A run that is not complete, or has found nothing, is not "ok".
    """
    listed = list(findings)
    done = bool(listed) and about.get("complete", True)
    return {
        **about,
        "ok": done and not any(f.bad for f in listed),
        "suites": summary(listed),
        "findings": [asdict(f) for f in listed if f.verdict not in GOOD],
    }
