"""Shapes of what is written: result lines and reports, and a check that data have such a shape."""

from __future__ import annotations

import typing
from typing import Any, TypedDict, TypeGuard, TypeVar

from pcc.errors import PccError

SCHEMA = 2
STATUSES = ("ok", "different", "failed")


class Failure(TypedDict):
    """Why a point has no figures; `code` as in every error, `hint` the remedy or empty."""

    code: str
    what: str
    at: str
    hint: str


class Interval(TypedDict):
    """A figure over prompts with its 95 % interval; null ends: too few prompts for one."""

    value: float
    low: float | None
    high: float | None


class Decoding(TypedDict):
    """Drafting, greedy or sampled. Speed-ups are over greedy autoregressive decoding."""

    bytes_per_round: Interval
    ms_per_round: Interval
    bytes_per_second: float
    ms_per_byte: float
    speedup: Interval
    rounds: int
    emitted: int
    accepted_drafts: list[int]  # rounds by accepted drafts, 0 .. n-1


class Sameness(TypedDict):
    """Greedy text against autoregressive text: prompts that are identical, near-ties, others."""

    identical: int
    near_ties: int
    different: int


class Figures(TypedDict):
    """What was measured of one point."""

    prompts: int
    tokens: int
    compile_seconds: float
    autoregressive_ms_per_byte: Interval
    greedy: Decoding
    sampled: Decoding | None
    sameness: Sameness
    graph_ms: dict[str, float]  # median of each graph alone


class Where(TypedDict):
    """A point, as `points.Point` has it, and its name; n and r are 0 where no head was read."""

    name: str
    head: str
    architecture: str
    n: int
    r: int
    lora_layers: int
    proposal: str
    draft_mode: str
    precision: str
    int8: str


class Line(TypedDict):
    """One line of results.jsonl. `status`: ok, different (another greedy text) or failed."""

    schema: int
    key: str
    time: str
    status: str
    point: Where
    figures: Figures | None
    error: Failure | None


class Choice(TypedDict):
    """The best point of a mode, or autoregressive decoding; `limit` in ms per round, null: none."""

    name: str
    limit: float | None
    bytes_per_second: float
    ms_per_round: float
    bytes_per_round: float
    command: str | None


class Front(TypedDict):
    """The names on the Pareto front by increasing time per round, and the choices."""

    front: list[str]
    best: Choice | None
    within_limit: Choice | None


class Report(TypedDict):
    """report.json. `drift`: how much autoregressive times of points differ, max/min - 1."""

    schema: int
    complete: bool
    verifier: str
    prompts: dict[str, Any]
    measure: dict[str, Any]
    target: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    autoregressive: Choice | None
    drift: float
    modes: dict[str, Front]
    points: list[Line]
    missing: list[str]
    commands: dict[str, str]


T = TypeVar("T")


def conforms(value: object, kind: type[T]) -> TypeGuard[T]:
    """Return whether plain data have the shape of a class of this file."""
    return _fits(value, kind)


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        return (
            isinstance(value, dict)
            and set(value) == set(hints)
            and all(_fits(value[k], h) for k, h in hints.items())
        )
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            type(k) is str and _fits(v, args[1]) for k, v in value.items()
        )
    if args:  # X | None
        return any(_fits(value, h) for h in args)
    if hint is float:
        return type(value) in (int, float) and abs(typing.cast(float, value)) < float("inf")
    return type(value) is hint


def failure_of(e: BaseException) -> Failure:
    """Return an exception as data; what is no `PccError` is named by its type."""
    if isinstance(e, PccError):
        return {"code": e.code, "what": e.what, "at": e.at, "hint": e.hint}
    code = "C121" if isinstance(e, MemoryError) else "C120" if isinstance(e, OSError) else "G190"
    return {"code": code, "what": f"{type(e).__name__}: {e}"[:400], "at": "", "hint": ""}
