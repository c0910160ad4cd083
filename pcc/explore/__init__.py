"""Which circuit to draft with: a grid of heads measured on this machine (docs/explore.md).

>>> from pcc.explore import explore, read
>>> report = explore(read("explore.yaml"))
>>> report["modes"]["greedy"]["best"]["name"]
"""

from __future__ import annotations

from pcc.explore.config import Config, build, read
from pcc.explore.pareto import best, front
from pcc.explore.run import explore

__all__ = ["Config", "best", "build", "explore", "front", "read"]
