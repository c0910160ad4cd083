"""From a module to the launches of its engine."""

from __future__ import annotations

from collections.abc import Sequence

from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.backends.cuda.graph import Graph
from pcc.backends.cuda.rewrites import rewritten
from pcc.backends.cuda.schedule import Schedule
from pcc.backends.cuda.weights import WeightFile
from pcc.ir.module import Module
from pcc.tensor.ops import Input


def partition(
    module: Module,
    inputs: Sequence[Input],
    batch: int,
    weights: WeightFile | None = None,
    name: str = "",
    gpu: Gpu = TUNED,
) -> Builder:
    """Return the launches of a module for `batch` rows on `gpu`; weights go to `weights`.

    Values that hand-written kernels make (`pcc.backends.cuda.patterns`) are one launch or a few
    each; what is between them is generated, in as few kernels as the order allows. `name`: of the
    graph in errors and plans.
    """
    graph = Graph(rewritten(module), batch, inputs, gpu)
    graph.name = name or module.name
    builder = Builder(Schedule(graph), weights or WeightFile(), "pcc_")
    builder.run()
    return builder
