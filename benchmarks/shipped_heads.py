"""What benchmarks of the shipped heads share: their options, and one document of results."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decoding  # of examples, which both benchmarks put on the path

Measure = Callable[[Sequence[str], Path, Path, int, int], Any]


def options(doc: str | None, results: Path, prompts: int, argv: Sequence[str] | None) -> Any:
    """Return the parsed options: `json`, `prompts`, `bytes`, `models`, `heads`, `table`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=results, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--bytes", type=int, default=128)
    parser.add_argument("--models", type=Path, default=decoding.MODELS)
    parser.add_argument("--heads", nargs="*", help="all if left out")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def document(args: Any, measure: Measure) -> Any:
    """Return the results: read with `--table`, else measured in a folder of its own, and written.

    `measure` takes heads, the folder of models, a folder for bundles, prompts and new bytes.
    """
    if args.table:
        return json.loads(args.json.read_text("utf-8"))
    heads = args.heads or decoding.heads(args.models)
    with tempfile.TemporaryDirectory(prefix="pcc-heads-") as folder:
        made = measure(heads, args.models, Path(folder), args.prompts, args.bytes)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    return made
