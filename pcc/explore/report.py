"""The report: fronts, choices and the commands that make them, from result lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pcc import knobs
from pcc.explore import pareto
from pcc.explore.config import Config
from pcc.explore.measure import drift, middle
from pcc.explore.records import SCHEMA, Choice, Decoding, Front, Line, Report

PLAIN = "autoregressive"
MODES = ("greedy", "sampled")


def command(line: Line, source: str | None, head_n: int, config: Config, max_seq: int) -> str:
    """Return the shell command that compiles a point."""
    p = line["point"]
    words = ["pcc", "compile", *([source] if source else []), "--verifier", config.verifier,
             "--max-seq", str(max_seq), "-o", "best.pcc"]  # fmt: skip
    if p["n"] != head_n:
        words += ["--window", str(p["n"])]
    for key, plain in (
        ("proposal", knobs.PROPOSAL), ("draft_mode", knobs.DRAFT_MODE), ("precision", "fp32"),
        ("int8", "none"),
    ):  # fmt: skip
        if (value := str(p[key])) != plain:  # type: ignore[literal-required]
            words += [f"--{key.replace('_', '-')}", value]
    return shlex.join(words)


def report(
    config: Config,
    lines: Sequence[Line],
    context: Mapping[str, Any],
    commands: Mapping[str, str],
    missing: Sequence[str],
    *,
    complete: bool,
) -> Report:
    """Return the report of these lines. Points with another greedy text are on no front."""
    times = [x["figures"]["autoregressive_ms_per_byte"]["value"] for x in lines if x["figures"]]
    plain = _plain(middle(times)) if times else None
    modes = MODES if config.measure.sampled else MODES[:1]
    return {
        "schema": SCHEMA,
        "complete": complete,
        "verifier": config.verifier,
        "prompts": {**asdict(config.prompts), "sha256": context["prompts"]},
        "measure": asdict(config.measure),
        "target": asdict(config.target),
        "versions": dict(context["versions"]),
        "machine": dict(context["machine"]),
        "autoregressive": plain,
        "drift": drift(times),
        "modes": {m: _front(m, lines, plain, commands, config) for m in modes},
        "points": list(lines),
        "missing": list(missing),
        "commands": dict(commands),
    }


def decoding(line: Line, mode: str) -> Decoding | None:
    """Return the figures of a mode, if the point was measured and its greedy text is right."""
    figures = line["figures"]
    if figures is None or line["status"] != "ok":
        return None
    return figures["greedy"] if mode == "greedy" else figures["sampled"]


def _plain(ms: float) -> Choice:
    return {
        "name": PLAIN, "limit": None, "bytes_per_second": 1e3 / ms if ms > 0 else 0.0,
        "ms_per_round": ms, "bytes_per_round": 1.0, "command": None,
    }  # fmt: skip


def _front(
    mode: str, lines: Sequence[Line], plain: Choice | None, commands: Mapping[str, str],
    config: Config,
) -> Front:  # fmt: skip
    """Autoregressive decoding is a candidate too: one byte a round, in the least time."""
    found: list[Choice] = [plain] if plain else []
    for line in lines:
        if (d := decoding(line, mode)) is not None:
            name = line["point"]["name"]
            found.append(
                {
                    "name": name, "limit": None, "bytes_per_second": d["bytes_per_second"],
                    "ms_per_round": d["ms_per_round"]["value"],
                    "bytes_per_round": d["bytes_per_round"]["value"],
                    "command": commands.get(name),
                }
            )  # fmt: skip
    index = pareto.front([(c["ms_per_round"], c["bytes_per_round"]) for c in found])
    limit = config.target.max_ms_per_round

    def choose(most: float) -> Choice | None:
        got = pareto.best(found, lambda c: c["bytes_per_second"], lambda c: c["ms_per_round"], most)
        return None if got is None else {**got, "limit": most or None}

    return {
        "front": [found[i]["name"] for i in index],
        "best": choose(0.0),
        "within_limit": choose(limit) if limit else None,
    }
