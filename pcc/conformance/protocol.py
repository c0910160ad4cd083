"""The exact protocol on tiny verifiers: the text of every backend is that of the CPU bundle.

Greedy ids must be equal; sampled ones too, given the uniforms. Where rounding decides, both answers
are right: a greedy token whose logit leads the other's by less than a bound, a draw that another
one would have replaced had one uniform been a bound away. The latter is shown, not presumed: the
CPU bundle itself goes the other way under such a shift. After a tie a row's texts part, and are
compared no further; but where the reference is at hand, a greedy text is then judged to its end,
token by token, by the logits that the reference gives after the text as it is.
In half precision laws differ by more than uniforms tell (an entry may fall out of a nucleus): there
greedy texts decide, few shifts are tried, and sampled texts that part are listed as skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import eq
from typing import Any

import numpy as np

from pcc.conformance.edge import Values
from pcc.conformance.report import Finding
from pcc.conformance.watched import Event, Watched
from pcc.knobs import CHANCE_TIES, LOGIT_TIES
from pcc.runtime.engine import Engine
from pcc.targets import HALF_OF
from pcc.ties import Shift, explained, shifts

SUITE = "protocol"
Structure = tuple[int, int, tuple[int, ...]]  # of a call: part, length, ids
# Of a row, after its prompt: how far the logit of each id lies behind the largest, given those
# before it.
Behind = Callable[[int, list[int]], Values]
# How far a greedy choice may lead: `LOGIT_TIES`. Halves are rounded equally everywhere, but what is
# rounded has its own float32 error, which may cross into the next half: 2^-11 (f16) of a number of
# a few units, some hundred times in a sum.
# bf16 is judged by the float64 evaluator, which rounds where the IR does; no shift is tried. What
# moved the gap of two of the best logits: sums in float32 by up to 0.05, attention's weights, that
# are rounded for tensor cores, by 0.08; results of products that are halves, where a target is not
# `wide`, by 0.27 (docs/gpu.md).
WIDE_TIES = {"bf16": 0.15}
MOST_TIES = 0.05  # of a text's ids: rounding decides now and then, a fault everywhere
# How many shifts are tried on a text: each plays it again on a CPU, and in half precision, where
# laws differ, most texts part: there a search decides between "tie" and "skipped" only.
TRIES = 16  # in half precision; else all
# Of greedy halves: drafts may be chosen otherwise, in the same text.
SAME_ACCEPTANCE = {"fp16": 0.15, "bf16": 0.3}


@dataclass(frozen=True)
class Run:
    """Options of a session, and what it is asked."""

    name: str
    options: dict[str, Any]

    @property
    def greedy(self) -> bool:
        """Whether the text is the verifier's argmax."""
        return bool(self.options.get("greedy"))


RUNS = (
    Run("greedy", {"greedy": True}),
    Run("sampled", {"seed": 3}),
    Run("cut", {"seed": 4, "temperature": 0.8, "top_k": 40, "top_p": 0.9}),
)


@dataclass
class Trace:
    """What a run decided: the events of each row, and the acceptance of its drafts."""

    rows: list[list[Event]]
    accepted: list[int]  # rounds by the number of drafts accepted

    def plain(self) -> dict[str, Any]:
        """Return it as JSON; leads to 1e-6, as rivals are."""
        events = [
            [
                [e.part, e.length, e.at, list(e.ids), [round(x, 6) for x in e.leads],
                 [list(x) for x in e.rivals]]
                for e in r
            ]
            for r in self.rows
        ]  # fmt: skip
        return {"rows": events, "accepted": self.accepted}

    @staticmethod
    def read(value: Any) -> Trace:
        """Return what `plain` wrote."""
        rows = [
            [Event(i, e[0], e[1], e[2], tuple(e[3]), tuple(e[4]), _pairs(e[5])) for e in r]
            for i, r in enumerate(value["rows"])
        ]
        return Trace(rows, list(value["accepted"]))


def _pairs(rivals: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(tuple((int(i), float(gap)) for i, gap in r) for r in rivals)


def prompts_of(engine: Engine, batch: int) -> list[list[int]]:
    """Return prompts of unequal length, of bytes; one crosses the windows of the tiny EvaByte."""
    offset = engine.manifest["vocabulary"]["byte_offset"] or 0
    known = min(256, engine.generation()["vocab"] - offset)  # of a small model the first bytes
    rng = np.random.default_rng(17)
    sizes = [90, 7, 33, 18, 70][:batch]
    return [(rng.integers(0, 256, s) % known + offset).tolist() for s in sizes]


def play(engine: Engine, run: Run, batch: int, shift: Shift | None = None) -> Trace:
    """Generate: alone with rewinding and going on, or several rows at once."""
    session = Watched(engine, shift, **run.options)
    prompts = prompts_of(engine, batch)
    if batch > 1:
        session.generate_ids(prompts, 40)
    else:
        session.generate_ids(prompts[0], 48)
        session.rewind_to(len(prompts[0]) + 17)
        bytewise = session.vocabulary.byte_offset is not None
        go_on = session.generate if bytewise else session.generate_ids
        go_on(None, 24)
        go_on(None, 9)
    rows: list[list[Event]] = [[] for _ in prompts]
    for e in session.events:
        rows[e.row].append(e)
    return Trace(rows, list(session.stats["acceptance_length_histogram"]))


def judge(
    case: str,
    run: Run,
    want: Trace,
    got: Trace,
    precision: str,
    again: Callable[[Shift], Trace] | None,
    slots: int,
    behind: Behind | None = None,
    *,
    wide: bool = False,
) -> Iterator[Finding]:
    """Compare two traces row by row.

    `again` plays the run on the CPU with a shifted uniform; `behind` judges ids of a given text.
    `wide`: of the target (`pcc.targets`).
    """
    ties, tie = 0, LOGIT_TIES[HALF_OF[precision]]
    if wide:
        tie = WIDE_TIES.get(precision, tie)
    for i, (a, b) in enumerate(zip(want.rows, got.rows, strict=True)):
        what = f"{run.name} row {i}"
        if run.greedy:
            given = None if behind is None else partial(behind, i)
            found = _greedy(case, what, a, b, tie, given)
        else:
            most = None if precision == "fp32" else TRIES
            bound = CHANCE_TIES[HALF_OF[precision]]
            found = _sampled(case, what, a, b, bound, slots, most, again)
            if found.verdict == "differs" and precision != "fp32":
                note = f"parted, which decides nothing in {precision}: {found.note}"
                found = replace(found, verdict="skipped", note=note)
        ties += found.verdict != "ok"
        yield found
    if ties:
        return
    what = f"{run.name} acceptance {_mean(want.accepted):.3f}"
    gap = abs(_mean(want.accepted) - _mean(got.accepted))
    loose = precision != "fp32" and run.greedy
    bound = SAME_ACCEPTANCE[precision] if loose else 0.0
    same = gap <= bound if loose else want.accepted == got.accepted
    yield Finding(SUITE, case, what, "ok" if same else "differs", gap, bound)


def _mean(histogram: Sequence[int]) -> float:
    return sum(k * v for k, v in enumerate(histogram)) / max(1, sum(histogram))


def _greedy(
    case: str, what: str, a: list[Event], b: list[Event], bound: float,
    behind: Callable[[list[int]], Values] | None = None,
) -> Finding:  # fmt: skip
    """Compare ids by position: rounds of another size may end a text elsewhere."""
    left, right = _by_position(a), _by_position(b)
    both = [k for k in left if k in right]
    at = next((k for k in both if left[k][0] != right[k][0]), None)
    if at is None:
        enough = len(both) >= 0.8 * len(left)
        verdict = "ok" if enough else "differs"
        return Finding(SUITE, case, f"{what}: {len(both)} of {len(left)} ids", verdict)
    (x, lead, rivals), y = left[at], right[at][0]
    note = f"position {at[1]}: {x} and {y}, lead {lead:.1e}"
    if behind is not None:
        return _given(case, what, b, bound, behind, note)
    # The lead is over the best of the others: the one that was chosen must come as near.
    gap = max(lead, rivals.get(y, np.inf))
    if lead <= bound < gap:
        note += f", but {y} is no rival: they are {sorted(rivals)}"
    return Finding(SUITE, case, what, "tie" if gap <= bound else "differs", gap, bound, note)


def _given(
    case: str, what: str, events: list[Event], bound: float,
    behind: Callable[[list[int]], Values], note: str,
) -> Finding:  # fmt: skip
    """Judge every id of a text by the logits after the ids before it, whatever those are."""
    gaps = np.concatenate([behind(ids)[new:] for ids, new in parts_of(events)])
    worst, others = float(gaps.max()), int((gaps > 0).sum())
    few = others <= max(2, MOST_TIES * len(gaps))
    note += f"; {others} of {len(gaps)} ids are not the first choice after those before them"
    verdict = "tie" if worst <= bound and few else "differs"
    return Finding(SUITE, case, what, verdict, worst, bound, note)


def parts_of(events: list[Event]) -> Iterator[tuple[list[int], int]]:
    """Yield what followed the prompt in each part, and how many of these ids an earlier one has."""
    first, ids, new, part = events[0].at, list[int](), 0, events[0].part
    for e in events:
        if e.part != part:
            yield ids, new
            part, new, ids = e.part, e.at - first, ids[: e.at - first]
        ids = [*ids, *e.ids]
    yield ids, new


def _by_position(
    events: list[Event],
) -> dict[tuple[int, int], tuple[int, float, dict[int, float]]]:
    """Return id, lead and rivals by (part, position); a prompt's pass has no known lead."""
    out = {}
    for e in events:
        for k, token in enumerate(e.ids):
            lead = abs(e.leads[k]) if e.leads else np.inf
            rivals = dict(e.rivals[k]) if e.rivals else {}
            out[e.part, e.at + k] = (token, float(lead), rivals)
    return out


def _sampled(
    case: str, what: str, a: list[Event], b: list[Event], bound: float, slots: int,
    most: int | None, again: Callable[[Shift], Trace] | None,
) -> Finding:  # fmt: skip
    """Compare what each round emitted: another round structure reads other uniforms."""
    left, right = (_structure(x) for x in (a, b))
    at = next((k for k, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), None)
    if at is None and len(left) == len(right):
        return Finding(SUITE, case, f"{what}: {sum(len(i) for *_, i in left)} ids", "ok")
    at = min(len(left), len(right)) if at is None else at
    if at >= min(len(left), len(right)):
        return Finding(SUITE, case, what, "differs", note=f"{len(left)} and {len(right)} rounds")
    note = f"round {at} at length {a[at].length}: {left[at][2]} and {right[at][2]}"
    if again is None:
        return Finding(SUITE, case, what, "differs", note=note)
    row, lengths = a[at].row, sorted({a[k].length for k in (at, max(0, at - 1))}, reverse=True)

    def begin(trace: Trace) -> list[Structure]:
        return _structure(trace.rows[row])[: at + 1]

    search = explained(
        shifts(row, lengths, range(slots), bound), left[: at + 1], lambda s: begin(again(s)),
        partial(eq, right[: at + 1]), eq, most=most,
    )  # fmt: skip
    if (shift := search.shift) is not None:
        note += f"; so does the CPU, with uniform {shift.slot} moved by {shift.by:.0e}"
        return Finding(SUITE, case, what, "tie", abs(shift.by), bound, note)
    if not search.whole:
        note += f"; {search.tried} shifted uniforms were tried, and no more are"
    return Finding(SUITE, case, what, "differs", note=note)


def _structure(events: list[Event]) -> list[Structure]:
    return [(e.part, e.length, e.ids) for e in events]
