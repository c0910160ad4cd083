"""Every op lowered alone: many cases share a graph, so that a backend builds few of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcc.conformance.bundles import (
    BUILD,
    Answers,
    InOrder,
    Order,
    Setting,
    answers_of,
    modules_to,
)
from pcc.conformance.cases import Case, Made, feeds, operand
from pcc.conformance.core_ops import CASES
from pcc.conformance.edge import Values
from pcc.conformance.report import Finding, compared, refused
from pcc.conformance.sequence_ops import cases as sequence_cases
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.targets import target_of
from pcc.tensor.ops import ScaledContract

SUITE = "ops"
GROUP = 24  # cases of one graph: some hundred outputs
Say = Callable[[str], None]


@dataclass(frozen=True)
class Numbered:
    """A case, and the prefix of its names."""

    case: Case
    prefix: str

    @property
    def title(self) -> str:
        """How a report names the case."""
        return f"{self.prefix[:-1]} {self.case.name}"

    def module(self) -> tuple[Module, Made]:
        """Return the case's module: half operands are stored, the others come in every form."""
        forms = self.case.forms or ("kcb" if len(self.case.operands) < 3 else "cb")
        made: Made = {}
        outs = []
        for combo in itertools.product(
            *("k" if "@" in kind else forms for kind, _ in self.case.operands)
        ):
            if set(combo) == {"k"}:
                continue  # no input reaches it: it is folded before there is a graph
            pairs = enumerate(zip(self.case.operands, combo, strict=True))
            xs = [operand(i, *o, b, made, self.prefix) for i, (o, b) in pairs]
            outs.append((f"{self.prefix}y_" + "".join(combo), self.case.make(*xs)))
        return Module("case", (), tuple(outs)), made


def numbered(halves: Sequence[str], target: str = "onnx") -> list[Numbered]:
    """Return all cases that a target with these half precisions must pass."""
    found = [*CASES, *sequence_cases(tuple(halves))]
    if not target_of(target).int8:  # refused when it is compiled for
        found = [c for c in found if c.op is not ScaledContract]
    return [Numbered(c, f"o{i:03d}_") for i, c in enumerate(found)]


def portions(setting: Setting, cases: Sequence[Numbered] | None = None) -> list[list[Numbered]]:
    """Return the cases of each bundle: all, but of one graph where a graph is built for long."""
    listed = numbered(setting.halves, setting.target) if cases is None else list(cases)
    slow = target_of(setting.target).format == "tensorrt"
    size = GROUP if slow else max(len(listed), 1)
    return [listed[i : i + size] for i in range(0, len(listed), size)]


def ops_of(setting: Setting, folder: Path, cases: Sequence[Numbered]) -> Path:
    """Return where the bundle of some cases is put."""
    made_for = f"{setting.target}-{setting.precision}-{setting.batch}"
    return folder / f"ops-{made_for}-{cases[0].prefix}{len(cases)}.pcc"


def build_ops(setting: Setting, folder: Path, cases: Sequence[Numbered]) -> None:
    """Compile some cases."""
    modules_to(setting, _modules(cases), ops_of(setting, folder, cases))


def check_ops(
    setting: Setting, folder: Path, say: Say, cases: Sequence[Numbered] | None = None,
    order: Order | None = None,
) -> Iterator[Finding]:  # fmt: skip
    """Yield a finding for each output of each case, on one batch size."""
    listed = portions(setting, cases)
    say(f"{sum(map(len, listed))} cases in {len(listed)} bundles, {setting.batch} rows")
    places = (order or InOrder()).of(listed, lambda part: ops_of(setting, folder, part))
    for part in places:
        yield from _part(setting, folder, part, say)


def _part(setting: Setting, folder: Path, cases: list[Numbered], say: Say) -> Iterator[Finding]:
    """Build and judge some cases; where they cannot be built, halve them to find which."""
    modules, out = _modules(cases), ops_of(setting, folder, cases)
    try:
        if setting.provider == BUILD:
            modules_to(setting, modules, out)
            yield from (Finding(SUITE, c.title, "", "built") for c in cases)
            return
        engine = answers_of(setting, modules, out)
    except PccError as e:
        found = refused(SUITE, cases[0].title, e)
        if len(cases) == 1:
            yield found
            return
        middle = len(cases) // 2
        for half in (cases[:middle], cases[middle:]):
            yield from _part(setting, folder, half, say)
        return
    for name, group in zip(modules, _groups(cases), strict=True):
        yield from _judged(setting, engine, name, group)


def _groups(cases: Sequence[Numbered]) -> list[Sequence[Numbered]]:
    return [cases[i : i + GROUP] for i in range(0, len(cases), GROUP)]


def _modules(cases: Sequence[Numbered]) -> dict[str, Module]:
    """Return a graph for each group of cases by name."""
    return {f"{g[0].prefix}{g[-1].prefix[:-1]}": joined(g) for g in _groups(cases)}


def joined(group: Sequence[Numbered]) -> Module:
    """Return one module with the outputs of several cases."""
    parts = [c.module()[0] for c in group]
    return Module("ops", (), tuple(o for m in parts for o in m.outputs))


def _judged(
    setting: Setting, engine: Answers, name: str, group: Sequence[Numbered]
) -> Iterator[Finding]:
    for contexts in sorted({1, setting.batch}):
        feed: dict[str, Values] = {}
        wanted: dict[str, tuple[Numbered, Values]] = {}
        for c in group:
            module, made = c.module()
            own = feeds(c.case, made, setting.batch, contexts, c.prefix)
            with np.errstate(invalid="raise"):
                values = run(module.roots, dict(own), Real())
            pairs = zip(module.outputs, values, strict=True)
            wanted |= {o: (c, np.asarray(v)) for (o, _), v in pairs}
            feed |= own
        read = {i["name"] for i in engine.queries[name]["inputs"]}
        try:
            got = engine.run(name, **{k: v for k, v in feed.items() if k in read})
        except PccError as e:
            what = f"{len(group)} cases"
            yield Finding(SUITE, group[0].title, what, "differs", note=f"[{e.code}] {e.what}")
            return
        for o, (c, want) in wanted.items():
            what = f"{o.removeprefix(c.prefix)} {setting.batch}x{contexts}"
            yield compared(SUITE, c.title, what, want, got[o], c.case.tolerance, c.case.floor)
