"""Which form of a head to compile for a GPU: rounds by the model of the engine, rates, the pick.

With a drafts of a round accepted and a round of t milliseconds, B rows make 1000 B (a + 1) / t
tokens per second. A form breaks even with another rate R at a = R t / (1000 B) - 1. Autoregressive
decoding is a candidate as well: one token a round, of a pass over one. No GPU takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.cost import Prediction, predict, works
from pcc.backends.cuda.fitted import DRAFT_ERROR, ROUND_ERROR
from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.errors import PccError
from pcc.explore.forms import Form, Plans
from pcc.explore.report import PLAIN
from pcc.runtime.parts import keys

MOST_ROWS = 128  # of a pass that the constants are fitted to


class Priced(TypedDict):
    """A form of the head, or autoregressive decoding: what a round costs, and what it is worth.

    `parts` in ms, `bytes_moved` as in a row of `pcc bench --gpu`. `accepted` drafts of a round and
    `tokens_per_second` are null where nothing was stated. At `break_even` accepted drafts the form
    is as fast as `against`: the pick, of the pick the best of the others; autoregressive decoding
    where nothing was stated; null for autoregressive decoding itself.
    """

    form: str
    ms: float
    parts: dict[str, float]
    bytes_moved: dict[str, int]
    bound_ms: float
    ratio_to_bound: float
    accepted: float | None
    tokens_per_second: float | None
    break_even: float | None
    against: str | None


class Ranking(TypedDict):
    """All forms, the fastest first where rates are known.

    `pick`: null without rates. `lead`: its rate over the next one's, less 1; `margin`: a lead that
    the model's error may account for. `remarks`: what to mind.
    """

    gpu: dict[str, str | int | float]
    context: int
    batch: int
    n: int
    forms: list[Priced]
    pick: str | None
    lead: float | None
    margin: float | None
    remarks: list[str]


@dataclass(frozen=True)
class Asked:
    """What is priced. `copy_rate` in TB/s, and where that number is from.

    `accepted`: drafts accepted of a round, by the form's name; empty: rounds without rates.
    """

    forms: tuple[Form, ...]
    accepted: Mapping[str, float]
    context: int
    greedy: bool
    copy_rate: float
    copy_from: str


def ranking(plans: Plans, a: Asked) -> Ranking:
    """Return the forms of a head with their predicted rounds. Errors: G111, G112, E141."""
    _check(plans, a)
    gpu, batch = plans.engine.gpu, plans.engine.batch
    there = replace(gpu, copy_rate=a.copy_rate)

    def priced(builder: Builder) -> Prediction:
        return predict(works(builder, partial(keys, context=a.context)), there)

    found = [
        _priced(f.name, priced(plans.round(f, greedy=a.greedy)), batch, a.accepted.get(f.name))
        for f in a.forms
    ]
    known = 0.0 if a.accepted else None
    found.append(_priced(PLAIN, priced(plans.tokens(1)), batch, known))
    lead = _compared(found, batch)
    margin = None if lead is None else _margin(*found[:2])
    return {
        "gpu": {"arch": gpu.arch, "multiprocessors": gpu.processors, "product": gpu.product,
                "copy_tb_s": a.copy_rate, "copy_from": a.copy_from},
        "context": a.context, "batch": batch, "n": plans.circuit.n, "forms": found,
        "pick": None if lead is None else found[0]["form"], "lead": lead, "margin": margin,
        "remarks": _remarks(plans, gpu, lead, margin),
    }  # fmt: skip


def _check(plans: Plans, a: Asked) -> None:
    """Refuse acceptances that no round has, or that only some forms have."""
    drafts = plans.circuit.n - 1
    if not 1 <= a.context <= plans.engine.max_seq:
        what = f"a context of {a.context} tokens is not within 1 .. {plans.engine.max_seq}"
        raise PccError("G111", what, hint="a larger --max-seq")
    names = [f.name for f in a.forms]
    for name, value in a.accepted.items():
        if name not in names:
            hint = f"asked for are {', '.join(names)}"
            raise PccError("G110", f"'{name[:40]}' is no form that is compared", hint=hint)
        if not 0 <= value <= drafts:
            what = f"{value:g} accepted drafts of '{name}': a round has {drafts}"
            raise PccError("G111", what, hint=f"from 0 to {drafts}")
    lacking = [n for n in names if n not in a.accepted] if a.accepted else []
    if lacking:
        what = f"nobody says how many drafts of {', '.join(lacking)} are accepted"
        hint = f"--accepted {lacking[0]}=A, or --form for those that count (docs/explore.md)"
        raise PccError("G112", what, hint=hint)


def _priced(name: str, p: Prediction, batch: int, accepted: float | None) -> Priced:
    rate = None if accepted is None else 1e3 * batch * (accepted + 1) / p.ms
    return {
        "form": name, "ms": p.ms, "parts": dict(p.parts), "bytes_moved": dict(p.moved),
        "bound_ms": p.bound_ms, "ratio_to_bound": p.ratio, "accepted": accepted,
        "tokens_per_second": rate, "break_even": None, "against": None,
    }  # fmt: skip


def _rate(p: Priced) -> float:
    return p["tokens_per_second"] or 0.0


def _compared(found: list[Priced], batch: int) -> float | None:
    """Sort the forms by their rates and say what would change the pick; return its lead."""
    plain = found[-1]
    if plain["tokens_per_second"] is None:
        for f in found[:-1]:
            f["break_even"], f["against"] = f["ms"] / plain["ms"] - 1, PLAIN
        return None
    found.sort(key=_rate, reverse=True)
    best, second = found[:2]
    for f in found:
        if f is not plain:
            other = second if f is best else best
            f["break_even"] = _rate(other) * f["ms"] / (1e3 * batch) - 1
            f["against"] = other["form"]
    return _rate(best) / _rate(second) - 1


def _margin(a: Priced, b: Priced) -> float:
    """Return by how much the model may be wrong about two rates beside each other.

    Forms share their layers, so that an error there is the same for both; drafts are their own.
    """
    if PLAIN in (a["form"], b["form"]):
        return ROUND_ERROR
    own = sum(x["parts"]["head"] + x["parts"]["generated"] for x in (a, b))
    return float(DRAFT_ERROR * own / min(a["ms"], b["ms"]))


def _remarks(plans: Plans, gpu: Gpu, lead: float | None, margin: float | None) -> list[str]:
    out = []
    if gpu.number != TUNED.number:
        out.append(f"nothing has been timed on {gpu.arch}: all that the model knows of it is its "
                   "multiprocessors and the rate of a copy; the rest is an H100's")  # fmt: skip
    rows = plans.engine.batch * plans.circuit.n
    if rows > MOST_ROWS:
        out.append(f"a pass has {rows} rows; the model was fitted to {MOST_ROWS} at most")
    if lead is not None and margin is not None and lead < margin:
        out.append(f"a lead of {100 * lead:.1f} % is within the model's error "
                   f"({100 * margin:.1f} %): time both with pcc bench --gpu")  # fmt: skip
    return out
