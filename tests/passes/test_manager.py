"""The pass manager: what it checks, reports, dumps, and leaves behind when a pass is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from laws import const, leaf, module

from pcc.circuit import ops as c
from pcc.circuit import text
from pcc.driver import query_module
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.passes import registry
from pcc.passes.canonicalize import Canonicalize
from pcc.passes.expand_query import ExpandQuery
from pcc.passes.manager import Exact, Manager, Notes, Pass, Record
from pcc.passes.pipelines import ORDER, check, circuit_pipeline
from pcc.passes.registry import describe, make, parse_pipeline
from pcc.passes.to_tensor import ToTensor
from pcc.passes.validate import Mismatch, compare
from pcc.tensor import ops as t


@dataclass(frozen=True)
class Turned(Pass):
    """Transposes square weights: wrong."""

    name: ClassVar[str] = "turned"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        def rule(n: Op, _: Uses) -> Op | None:
            if isinstance(n, c.Sum) and tensor(n.w).shape[1] == tensor(n.w).shape[2]:
                return c.Sum(n.x, t.Transpose(n.w, (0, 2, 1)))
            return None

        return module.rewrite(rule)


@dataclass(frozen=True)
class Warm(Pass):
    """Adds 1e-6 to logarithms: wrong, and close."""

    name: ClassVar[str] = "warm"
    exact: ClassVar[Exact] = Exact.ROUNDING

    def run(self, module: Module, notes: Notes) -> Module:
        small = t.Const(np.full((), 1e-6, np.float32))  # type: ignore[arg-type]
        return module.rewrite(lambda n, _: t.Add(n, small) if isinstance(n, t.Log) else None)


@dataclass(frozen=True)
class Wider(Pass):
    """Returns another type."""

    name: ClassVar[str] = "wider"
    exact: ClassVar[Exact] = Exact.POLYNOMIAL

    def run(self, module: Module, notes: Notes) -> Module:
        (x,) = module.roots
        return module.with_roots((c.Concat((x, x)),))


@pytest.fixture(autouse=True)
def wrong_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the wrong passes, so that a reproducer's pipeline can name them."""
    for p in (Turned, Warm):
        monkeypatch.setitem(registry.PASSES, p.name, f"{p.name}:{p.__name__}")
    real = registry.importlib.import_module
    here = {f"pcc.passes.{p.name}": p for p in (Turned, Warm)}

    def found(name: str) -> object:
        return SimpleNamespace(**{here[name].__name__: here[name]}) if name in here else real(name)

    monkeypatch.setattr(registry.importlib, "import_module", found)


def square() -> Module:
    return module(c.Sum(c.Hadamard((leaf(0), leaf(1))), const(1, 2, 2)), 3, 3)


@pytest.mark.parametrize(("bad", "polynomial"), [(Turned(), True), (Warm(), False)])
def test_a_wrong_pass_leaves_a_reproducer(bad: Pass, polynomial: bool, tmp_path: Path) -> None:
    circuit = templates.cp(3, 2, 3, context=2)
    queried = query_module(circuit, circuit.root, "loglik")[0]
    m = square() if polynomial else ExpandQuery().run(queried, Notes())
    with pytest.raises(PccError, match="E303") as e:
        Manager(reproducers=tmp_path).run(m, [bad, Canonicalize()])
    folder = tmp_path / f"repro-{bad.name}"
    assert str(folder) in e.value.hint
    pipeline = parse_pipeline((folder / "pipeline.txt").read_text())
    assert [p.name for p in pipeline] == [bad.name, "canonicalize"]
    loaded = text.load(folder / "repro.pcir")
    assert loaded.roots == m.roots
    with np.load(folder / "inputs.npz") as data:
        inputs = dict(data)
    first = pipeline[0]
    with pytest.raises(Mismatch) as again:
        compare(loaded, first.run(loaded, Notes()), first.exact, first.tolerance, inputs)
    assert f"changed the function it compiles: {again.value}" in str(e.value)


def test_without_a_folder_the_reproducer_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PccError, match="E303"):
        Manager().run(square(), [Turned()])
    assert [p.name for p in tmp_path.rglob("repro.pcir")] == ["repro.pcir"]


def test_validation_can_be_turned_off_and_is_on_by_default() -> None:
    after = Manager(validate=False).run(square(), [Turned()])
    assert after.roots != square().roots
    assert Manager().validate


def test_signature_and_postcondition() -> None:
    with pytest.raises(PccError, match="E302"):
        Manager().run(square(), [Wider()])

    @dataclass(frozen=True)
    class Lazy(ToTensor):
        def run(self, module: Module, notes: Notes) -> Module:
            return Canonicalize().run(module, notes)

    nested = c.Hadamard((c.Hadamard((leaf(0), leaf(1))), leaf(2)))
    with pytest.raises(PccError, match="E301"):
        Manager().run(module(nested, 3, 3, 3), [Lazy()])


def test_records_notes_dumps_and_stop_after(tmp_path: Path) -> None:
    seen: list[Record] = []
    circuit = templates.btree(4, 2, 3)
    manager = Manager(dump=tmp_path, stop_after="fuse-cpt", on_pass=seen.append)
    out = manager.run(circuit.module(), circuit_pipeline())
    assert [r.name for r in manager.records] == [r.name for r in seen]
    assert seen[-1].name == "fuse-cpt"
    changed = [r.name for r in seen if r.changed]
    files = sorted(p.name for p in tmp_path.glob("*.pcir"))
    assert files == [f"{i:02d}-{name}.pcir" for i, name in enumerate(changed, 1)]
    assert text.load(tmp_path / files[-1]).roots == out.roots
    last = seen[-1]
    assert last.before > last.after
    assert last.ms > 0
    assert last.check_ms > 0
    assert any(line.startswith("did") for line in last.notes)


def test_pipelines_read_back() -> None:
    pipeline = parse_pipeline("canonicalize, fold-leaf-sums{grow=2},numerics{linear=false},dce")
    assert parse_pipeline(",".join(map(describe, pipeline))) == pipeline
    for bad in ("canonicalise", "dce{x=1}", "numerics{linear=2}", "dce;dce"):
        with pytest.raises(PccError, match="E32"):
            parse_pipeline(bad)
    assert make("numerics", low=1e-20).exact is Exact.ROUNDING


@pytest.mark.parametrize(("first", "then", "reason"), ORDER)
def test_every_constraint_has_a_reason_and_is_enforced(first: str, then: str, reason: str) -> None:
    check((first, then))
    with pytest.raises(PccError, match=f"E322.*{re.escape(reason)}"):
        check((then, first))
    assert len(reason) > 20
    assert {first, then} <= set(registry.PASSES)


def test_max_product_keeps_only_passes_that_keep_it() -> None:
    left = {p.name for p in circuit_pipeline()} - {p.name for p in circuit_pipeline(maximise=True)}
    assert left == {"sum-collapse", "fold-leaf-sums"}
