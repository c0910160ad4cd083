"""What is explored: heads, grid, prompts, how each point is measured, and the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pcc import knobs
from pcc.errors import PccError
from pcc.frontends.state import read_config
from pcc.train import config as training

Architecture = Literal["ff", "cp", "hmm", "btree", "region-graph", "custom"]
Mode = Literal["greedy", "sampled"]
Integers = Literal["none", "head"]  # the verifier's would be another model


@dataclass(frozen=True)
class Grid:
    """Values on each axis. An empty axis of heads takes them as they are; others have a default."""

    architecture: tuple[Architecture, ...] = ()
    n: tuple[int, ...] = ()  # windows: of heads that draft at least n
    r: tuple[int, ...] = ()  # ff has one component whatever is asked
    lora_layers: tuple[int, ...] = ()  # adapted last layers; 0: all layers are shared
    proposal: tuple[str, ...] = (knobs.PROPOSAL,)  # as `pcc compile --proposal`
    draft_mode: tuple[str, ...] = (knobs.DRAFT_MODE,)  # as `pcc compile --draft-mode`
    precision: tuple[str, ...] = ("fp32",)
    int8: tuple[Integers, ...] = ("none",)  # "head": its matrices are 8-bit integers


@dataclass(frozen=True)
class Prompts:
    """A file (one prompt a line) or a folder (one a file); `limit` of them, evenly spread."""

    path: str
    limit: int = 20
    bytes: int = 256  # of each prompt, from its beginning


@dataclass(frozen=True)
class Measure:
    """How a point is measured. Changing any of these measures anew."""

    tokens: int = 128  # greedy and sampled tokens for each prompt
    repeats: int = 50  # runs of each graph alone
    sampled: bool = True
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0
    seed: int = 0
    threads: int = 1
    provider: Literal["cpu", "cuda"] = "cpu"
    max_seq: int = 0  # 0: what prompts and tokens need
    validate: bool = True  # check every pass while compiling


@dataclass(frozen=True)
class Target:
    """The best point has the most bytes per second of those with at most this time per round."""

    mode: Mode = "greedy"
    max_ms_per_round: float = 0.0  # 0: no limit


@dataclass(frozen=True)
class Train:
    """How heads that the grid names and no checkpoint covers are trained (docs/training.md).

    Heads go to FOLDER/NAME; without a folder nothing is trained. The grid sets `head.kind`,
    `head.n`, `head.r` and `lora.layers`; `head.regions`, `repetitions` and `shuffle` go to the
    kinds that have them.
    """

    folder: str = ""
    each_n: bool = False  # else one head, of the largest n, serves the others as a window
    seed: int = 0
    data: training.Data = field(default_factory=training.Data)
    head: training.Head = field(default_factory=training.Head)
    lora: training.Lora = field(default_factory=training.Lora)
    loss: training.Loss = field(default_factory=training.Loss)
    optim: training.Optim = field(default_factory=training.Optim)
    run: training.Run = field(default_factory=training.Run)


@dataclass(frozen=True)
class Config:
    """One exploration. Relative paths start at the working folder, as those of `pcc train`."""

    verifier: str
    prompts: Prompts
    out: str = "explore"
    heads: tuple[str, ...] = ()  # checkpoint folders or .pcir files; `*` and `**` as in a shell
    own_heads: bool = False  # the verifier's own prediction heads too
    keep_bundles: bool = False  # in OUT/bundles
    grid: Grid = field(default_factory=Grid)
    measure: Measure = field(default_factory=Measure)
    target: Target = field(default_factory=Target)
    train: Train = field(default_factory=Train)


def read(path: Path | str) -> Config:
    """Read a YAML configuration. Errors: F102 (file), N101 (keys, types), G101 (values)."""
    return build(read_config(Path(path)), str(path))


def build(raw: Mapping[str, Any], at: str = "config") -> Config:
    """Return the configuration of a plain mapping. Errors: N101 (keys, types), G101 (values)."""
    from pcc.models.proposal import GREEDY_KINDS, KINDS

    c = training.build_as(Config, raw, at)
    g, m, p = c.grid, c.measure, c.prompts
    for name, values, least in (
        ("grid.n", g.n, 2), ("grid.r", g.r, 1), ("grid.lora_layers", g.lora_layers, 0),
        ("measure.tokens", (m.tokens,), 2), ("measure.repeats", (m.repeats,), 5),
        ("measure.threads", (m.threads,), 1), ("measure.seed", (m.seed,), 0),
        ("measure.max_seq", (m.max_seq,), 0), ("prompts.limit", (p.limit,), 1),
        ("prompts.bytes", (p.bytes,), 1),
        ("target.max_ms_per_round", (c.target.max_ms_per_round,), 0),
    ):  # fmt: skip
        if bad := [v for v in values if not v >= least]:
            raise PccError("G101", f"{bad[0]} is below {least}", at=f"{at}:{name}")
    for f in dataclasses.fields(g):
        axis: Sequence[Any] = getattr(g, f.name)
        if len(set(axis)) < len(axis):
            raise PccError("G101", "a value is listed twice", at=f"{at}:grid.{f.name}")
        if f.name in ("proposal", "draft_mode", "precision", "int8") and not axis:
            raise PccError("G101", "the axis has no value", at=f"{at}:grid.{f.name}")
    for name, chosen, known in (
        ("proposal", g.proposal, KINDS), ("draft_mode", g.draft_mode, GREEDY_KINDS),
    ):  # fmt: skip
        if wrong := [v for v in chosen if v not in known]:
            where, hint = f"{at}:grid.{name}", f"one of {', '.join(known)}"
            raise PccError("G101", f"{wrong[0]!r} is unknown", at=where, hint=hint)
    if c.train.folder and not (g.architecture and g.n and (g.r or g.architecture == ("ff",))):
        what = "training needs the axes architecture, n and r of the grid"
        raise PccError("G101", what, at=f"{at}:train", hint="or leave out train.folder")
    if c.target.mode == "sampled" and not m.sampled:
        raise PccError("G101", "the target is sampled, which is not measured", at=f"{at}:target")
    if not (c.heads or c.own_heads or c.train.folder):
        hint = "give heads, own_heads: true, or train.folder"
        raise PccError("G102", "there is no head to explore", at=at, hint=hint)
    return c
