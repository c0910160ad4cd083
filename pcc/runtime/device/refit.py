"""Weights for the engine of a plan that was built without them, or with others.

Where TensorRT has a parser that refits from an ONNX graph, that does it: it knows what it made of
each constant. Else constants are given by their names, which the older parser keeps: those that
differ from the plan's (`refit.json`), and what the engine then misses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.bundle import REFIT, WEIGHTS, inside
from pcc.errors import PccError
from pcc.runtime.dtypes import ITEM, NUMPY
from pcc.variants import read_weights

if TYPE_CHECKING:
    from pcc.runtime.device.tensorrt import Opener

Values = np.ndarray[Any, Any]


def fill(opener: Opener, engine: Any, plan: Path) -> None:
    """Give an engine the weights of the bundle's graph of the plan's name. Errors: X335, X305."""
    name, module = plan.stem, opener.module
    graph = inside(opener.folder, f"graphs/{name}.onnx")
    refitter = module.Refitter(engine, opener.logger)
    if hasattr(module, "OnnxParserRefitter"):
        parser = module.OnnxParserRefitter(refitter, opener.logger)
        good = parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()
    else:
        good = _by_name(refitter, Named(opener.folder, plan), name)
    if not good:
        weights = inside(opener.folder, WEIGHTS)
        size = weights.stat().st_size if weights.is_file() else 0
        raise opener.failed("X335", f"the engine '{name}' cannot be refitted", graph, size)


def _by_name(refitter: Any, named: Named, name: str) -> bool:
    """Give the constants that differ, then those that the engine asks for beside them."""
    known = set(refitter.get_all_weights())
    if lost := sorted(set(named.changed()) - known):
        what = f"the engine '{name}' has no exchangeable weight {lost[0][:60]!r}"
        raise PccError("X335", what, hint="compile again: its builder took that number for fixed")
    kept = list(_given(refitter, named, named.changed()))  # alive until the engine has them
    kept += list(_given(refitter, named, refitter.get_missing_weights()))
    return not kept or bool(refitter.refit_cuda_engine())


def _given(refitter: Any, named: Named, names: Iterable[str]) -> Iterable[Values]:
    for name in names:
        value = named.value(name)
        if not refitter.set_named_weights(name, value):
            raise PccError("X335", f"TensorRT refuses new numbers for {name[:60]!r}")
        yield value


class Named:
    """The float constants of a graph by name, where `refit.json` says that they lie."""

    def __init__(self, folder: Path, plan: Path) -> None:
        self.folder = folder
        self.listed = read_weights(plan.parent / REFIT, plan.stem)

    def changed(self) -> list[str]:
        """Return the names of what the plan has otherwise."""
        return [name for name, entry in self.listed.items() if entry["changed"]]

    def value(self, name: str) -> Values:
        """Return a constant, read where it lies. Errors: X335, B216."""
        if name not in self.listed:
            raise PccError("X335", f"the engine misses {name[:60]!r}, which is no weight of it")
        entry = self.listed[name]
        if entry["dtype"] not in NUMPY:
            raise PccError("X335", f"{entry['dtype']} weights are not exchanged by name")
        path = inside(self.folder, entry["file"])
        size = math.prod(entry["shape"]) * ITEM[entry["dtype"]]
        if not path.is_file() or entry["offset"] + size > path.stat().st_size:
            what = f"weight {name[:60]!r} lies beyond the end of {entry['file'][:60]}"
            raise PccError("B216", what, at=str(self.folder), hint="compile the bundle again")
        kind, count = NUMPY[entry["dtype"]], math.prod(entry["shape"])
        return np.fromfile(path, kind, count, offset=entry["offset"]).reshape(entry["shape"])
