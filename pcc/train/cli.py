"""`pcc train CONFIG`: one run, from its newest state on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcc.errors import PccError
from pcc.train import config as cfg


def run(
    config: Path | cfg.Config,
    overrides: Sequence[str] = (),
    *,
    progress: bool = True,
    until: int | None = None,
) -> dict[str, float]:
    """Run a configuration to its end (or to step `until`); return its last evaluation.

    Interrupted runs go on from their newest state. Errors: X121 (no torch), N1xx, F102.
    """
    try:
        import torch
    except ImportError:
        hint = "install pcc's torch extra: pip install 'pcc[torch]'"
        raise PccError("X121", "training needs torch", hint=hint) from None
    from pcc.train.greedy import make
    from pcc.train.loop import Loop
    from pcc.train.tasks import BackboneTask, HeadTask

    c = config if isinstance(config, cfg.Config) else cfg.read(config, overrides)
    torch.set_float32_matmul_precision("highest")
    if c.kind == "greedy":
        return make(c, progress=progress)
    task: Any = BackboneTask(c) if c.kind == "backbone" else HeadTask(c)
    return Loop(c, task, progress=progress).run(until)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m pcc.train`."""
    parser = argparse.ArgumentParser(prog="pcc train", description=__doc__)
    parser.add_argument("config", type=Path, nargs="+", help="YAML; several run one after another")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    try:
        for path in args.config:
            began = time.perf_counter()
            found = run(path, args.set, progress=not args.quiet)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in found.items())
            print(f"{path}: {time.perf_counter() - began:.0f} s  {shown}", file=sys.stderr)
    except PccError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0
