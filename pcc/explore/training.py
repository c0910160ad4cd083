"""Heads that the grid names and no checkpoint covers: the one place that calls `pcc.train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pcc.errors import PccError
from pcc.explore.config import Config
from pcc.explore.points import Missing
from pcc.files import read_bounded
from pcc.frontends.state import find_model, step_of
from pcc.knobs import MAX_CONFIG_BYTES
from pcc.train import config as training


def configuration(config: Config, cell: Missing) -> training.Config:
    """Return the training run of a cell, with the sizes that the grid gives.

    `regions`, `repetitions` and `shuffle` go to the kinds that have them.
    """
    t, kind = config.train, cell.architecture
    sizes = replace(t.head, kind=kind, n=cell.n, r=cell.r)
    if kind not in training.REGIONAL:
        sizes = replace(sizes, regions="")
    if kind != "btree":
        sizes = replace(sizes, repetitions=1, shuffle=False)
    return training.Config(
        kind="head",
        out=str(Path(t.folder) / cell.name),
        name=cell.name,
        seed=t.seed,
        backbone=config.verifier,
        data=t.data,
        head=sizes,
        lora=replace(t.lora, layers=cell.lora_layers),
        loss=t.loss,
        optim=t.optim,
        run=t.run,
    )


def train(config: Config, cell: Missing, *, progress: bool) -> Path:
    """Return the folder of a trained head; one that is whole is taken as it is, without torch.

    An interrupted run goes on from its newest state. Errors: X121 (no torch), N1xx.
    """
    c = configuration(config, cell)
    folder = Path(c.out)
    if not _whole(folder, c):
        from pcc.train.cli import run

        run(c, progress=progress)
    return folder


def _whole(folder: Path, c: training.Config) -> bool:
    """Return whether the last step of this very run has been written."""
    record = folder / "train.json"
    try:
        data = read_bounded(record, MAX_CONFIG_BYTES, "G105")
        same = json.loads(data.decode("utf-8"))["config"] == training.plain(c)
        return same and step_of(find_model(folder)) == c.optim.steps
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PccError):
        return False  # `run` says what is wrong
