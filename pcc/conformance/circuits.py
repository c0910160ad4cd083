"""Every query on small circuits of each kind, trained and contextual, by masked evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pcc.bundle import read_manifest
from pcc.check import against
from pcc.circuit.circuit import Circuit
from pcc.conformance.bundles import (
    BUILD,
    Answers,
    InOrder,
    Order,
    Setting,
    answers_to,
    compiled_to,
    module_of,
)
from pcc.conformance.edge import Values
from pcc.conformance.report import Finding, built_only, compared, refused
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.frontends.regions import RegionGraph
from pcc.interp.run import run
from pcc.ir.semiring import Real
from pcc.samples import sample_inputs
from pcc.targets import target_of

SUITE = "queries"
WIDTH = 6  # of the contexts
SEEDS = 3
# Of a stored half: the same roundings on both sides, float32 sums on one of them.
HALF_TOLERANCE = 5e-5
# And where results of products are halves as well: a few roundings, to 11 and to 8 bits. On a CPU
# 9e-4 was seen (f16).
HALF_RESULTS = {"fp16": 4e-3, "bf16": 3.2e-2}
MOST_DRAWS = 0.25  # of a query's integers may then be others: uniforms between two roundings


def circuits() -> dict[str, Circuit]:
    """Return the circuits by name: sizes differ, and depths are not powers of two everywhere."""
    # {0,1,2} has two partitions, {0,1} is shared: neither a tree nor deterministic.
    scopes = (0b1, 0b10, 0b100, 0b11, 0b110, 0b111)
    ways = ((), (), (), ((0, 1),), ((1, 2),), ((3, 2), (0, 4)))
    graph = RegionGraph(scopes, ways)
    out: dict[str, Circuit] = {}
    for name, context in (("trained", 0), ("contextual", WIDTH)):
        out |= {
            f"ff-{name}": templates.ff(3, 5, context=context, seed=1),
            f"cp-{name}": templates.cp(4, 3, 7, context=context, seed=2),
            f"hmm-{name}": templates.hmm(5, 3, 4, context=context, seed=3),
            f"btree-{name}": templates.btree(6, 2, 5, context=context, seed=4),
            f"region-graph-{name}": templates.region_graph(graph, 2, 3, context=context, seed=5),
        }
    out["btree-forest"] = templates.btree(4, 2, 3, repetitions=2, shuffle=1, seed=6)
    return out


def check_queries(
    setting: Setting, folder: Path, say: Callable[[str], None], order: Order | None = None
) -> Iterator[Finding]:
    """Yield findings for each circuit and query, on one batch size."""
    taken = {name: c for name, c in circuits().items() if setting.takes(name)}
    for name in (order or InOrder()).of(taken, lambda name: place_of(folder, name, setting)):
        say(f"queries of {name}")
        circuit, out = taken[name], place_of(folder, name, setting)
        try:
            if setting.provider == BUILD:
                compiled_to(setting, circuit, out)
                yield from built_only(SUITE, name, read_manifest(out)["queries"])
                continue
            engine = answers_to(setting, circuit, out)
        except PccError as e:
            yield refused(SUITE, name, e)
            continue
        for query in engine.queries:
            yield from _query(setting, engine, circuit, name, query)


def place_of(folder: Path, name: str, setting: Setting) -> Path:
    """Return where a circuit's bundle is put."""
    return folder / f"{name}-{setting.target}-{setting.precision}-{setting.batch}.pcc"


def _query(
    setting: Setting, engine: Answers, circuit: Circuit, name: str, query: str
) -> Iterator[Finding]:
    spec, case = engine.queries[query], f"{name} {query}"
    for seed in range(SEEDS):
        inputs = edges(sample_inputs(circuit, spec, seed, setting.batch), seed)
        try:
            got = engine.run(query, **inputs)
        except PccError as e:
            yield Finding(SUITE, case, f"seed {seed}", "differs", note=f"[{e.code}] {e.what}")
            return
        if setting.precision == "fp32":
            yield from _by_definition(circuit, case, query, inputs, got)
        else:
            yield from _by_module(setting, engine, case, query, inputs, got)


def edges(inputs: dict[str, Values], seed: int) -> dict[str, Values]:
    """Put uniforms at the ends of their range, and observe all or nothing in some rows."""
    if "u" in inputs:
        ends = np.array([0.0, 2.0**-24, 1 - 2.0**-24], np.float32)
        inputs["u"].ravel()[seed::4] = ends[seed % 3]
    if "observed" in inputs and seed:
        inputs["observed"][0] = seed == 1
    return inputs


def _by_definition(
    circuit: Circuit, case: str, query: str, inputs: dict[str, Values], got: dict[str, Values]
) -> Iterator[Finding]:
    for what, (error, bound) in against(circuit, query, inputs, got).items():
        verdict = "ok" if error <= bound else "differs"
        yield Finding(SUITE, case, what, verdict, error, bound)


def _by_module(
    setting: Setting, engine: Answers, case: str, query: str, inputs: dict[str, Values],
    got: dict[str, Values],
) -> Iterator[Finding]:  # fmt: skip
    """Judge by the float64 meaning of the module that was lowered, with its rounded weights."""
    module = module_of(engine, query)
    values = run(module.roots, dict(inputs), Real())
    wanted = {name: np.asarray(v) for (name, _), v in zip(module.outputs, values, strict=True)}
    wide = target_of(setting.target).wide
    tolerance = HALF_TOLERANCE if wide else HALF_RESULTS[setting.precision]
    others = [_apart(want, got[k]) for k, want in wanted.items() if want.dtype.kind in "ib"]
    if not wide and 0 < max(others, default=0.0) <= MOST_DRAWS:
        note = f"{max(others):.0%} of the integers are others: rounding decides in half precision"
        yield Finding(SUITE, case, "", "skipped", note=note)
        return
    for name, want in wanted.items():
        yield compared(SUITE, case, name, want, got[name], tolerance)


def _apart(want: Values, got: Values) -> float:
    """Return the share of numbers that differ."""
    return float((np.broadcast_to(want, got.shape) != got).mean()) if got.size else 0.0
