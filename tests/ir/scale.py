"""Build, print, parse and verify one large circuit; prints CPU seconds and peak memory as JSON.

    python tests/ir/scale.py {chain,states,tree} NODES

chain: sums over one variable, as deep as there are nodes. states: a hidden Markov model of scalar
layers, as deep as there are variables. tree: a balanced tree of layers with weights of their own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from pcc.circuit import ops as c
from pcc.circuit.text import parse, resources, show
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.verify import verify
from pcc.tensor import ops as t


def const(value: object) -> Op:
    return t.Const(Array.of(np.asarray(value, np.float32)))


def chain(nodes: int) -> Module:
    x: Op = c.Categorical((0,), const([[[0.5, 0.5]]]))
    w = const([[[1.0]]])
    for _ in range(nodes):
        x = c.Sum(x, w)
    return Module("chain", (2,), (("p", x),))


def states(nodes: int) -> Module:
    n = nodes // 3
    table, w = const(np.full((1, 2, 2), 0.5)), const(np.full((1, 2, 2), 0.5))
    x: Op = c.Categorical((n - 1,), table)
    for v in reversed(range(n - 1)):
        x = c.Sum(c.Hadamard((c.Categorical((v,), table), x)), w)
    return Module("states", (2,) * n, (("p", x),))


def tree(nodes: int) -> Module:
    n, rng = nodes // 5, np.random.default_rng(0)
    row: list[Op] = [c.Categorical((v,), const(rng.uniform(size=(1, 2, 2)))) for v in range(n)]
    while len(row) > 1:
        pairs = zip(row[::2], row[1::2], strict=False)
        above: list[Op] = [c.Sum(c.Hadamard(p), const(rng.uniform(size=(1, 2, 2)))) for p in pairs]
        row = above + row[2 * len(above) :]
    return Module("tree", (2,) * n, (("p", row[0]),))


def depth(m: Module) -> int:
    level: dict[Op, int] = {}
    for n in m.nodes():
        level[n] = 1 + max((level[a] for a in n.args), default=0)
    return max(level.values())


def measure(kind: str, nodes: int) -> dict[str, float]:
    out: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        out[name] = round(time.process_time() - start, 3)

    start = time.process_time()
    m = {"chain": chain, "states": states, "tree": tree}[kind](nodes)
    timed("build_s", start)
    start = time.process_time()
    text = show(m)
    timed("print_s", start)
    arrays = resources(m)
    start = time.process_time()
    again = parse(text, resources=arrays)
    timed("parse_s", start)
    assert again == m
    start = time.process_time()
    verify(m)
    timed("verify_s", start)
    out["nodes"], out["depth"] = sum(1 for _ in m.nodes()), depth(m)
    del again, m
    assert show(parse(text, resources=arrays)) == text  # from text alone, and freed once more
    out["peak_mb"] = peak_kb() // 1024
    return out


def peak_kb() -> int:
    """Peak memory of this program; `ru_maxrss` would count the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
