"""The suite passes on a CPU, covers every op and query, and finds faults that are put in."""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import pcc.tensor
from pcc import knobs
from pcc.backends.onnx.lower import RULES
from pcc.circuit.queries import QUERIES
from pcc.cli import app
from pcc.conformance import circuits, scenarios, verifiers
from pcc.conformance.bundles import Setting, open_bundle
from pcc.conformance.circuits import check_queries
from pcc.conformance.ops import check_ops, numbered
from pcc.conformance.protocol import RUNS, Trace, judge, play
from pcc.conformance.report import Finding, as_json, compared
from pcc.conformance.scenarios import SCENARIOS, check_protocol, expected, key_of
from pcc.conformance.texts import read
from pcc.ir.core import OPS
from pcc.ir.module import Module
from pcc.runtime.engine import Engine
from pcc.tensor import ops as t
from pcc.ties import Shift

CPU = Setting()
ON_CPU = ("onnx", "onnx-cuda")  # targets whose graphs ONNX Runtime runs without a GPU


def quiet(_line: str) -> None:
    pass


def bad(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.bad]


def test_every_tensor_op_has_a_case() -> None:
    for found in pkgutil.iter_modules(pcc.tensor.__path__):
        importlib.import_module(f"pcc.tensor.{found.name}")
    ops = {op for name, op in OPS.items() if name.startswith("t.")} - {t.Input, t.Const}
    missing = ops - {c.case.op for c in numbered(())}
    assert not missing, f"no case: {sorted(op.name for op in missing)}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("target", ON_CPU)
def test_every_op_on_a_cpu(target: str, batch: int, tmp_path: Path) -> None:
    """In f32 and with stored f16: ONNX Runtime's CPU has no products of bf16."""
    setting = Setting(target, batch=batch, halves=("f16",))
    found = list(check_ops(setting, tmp_path, quiet))
    assert not bad(found)
    assert {f.case.split()[0] for f in found} == {c.prefix[:-1] for c in numbered(("f16",), target)}


@pytest.mark.parametrize("target", ON_CPU)
def test_every_query_on_a_cpu(target: str, tmp_path: Path) -> None:
    found = list(check_queries(Setting(target, batch=2), tmp_path, quiet))
    assert not bad(found)
    assert {f.case.split()[1] for f in found} == set(QUERIES)


def test_queries_in_half_precision_on_a_cpu(tmp_path: Path) -> None:
    setting = Setting("onnx-cuda", precision="fp16", only=("cp-contextual", "forest"))
    found = list(check_queries(setting, tmp_path, quiet))
    assert {f.verdict for f in found} == {"ok"}
    assert max(f.error for f in found) > 5e-5  # results of products are halves there


@pytest.mark.parametrize(
    ("target", "others", "verdicts"),
    [
        ("onnx-cuda", 0, {"ok"}), ("onnx-cuda", 2, {"skipped"}),
        ("onnx-cuda", 5, {"ok", "differs"}), ("cuda", 2, {"ok", "differs"}),
    ],
)  # fmt: skip
def test_few_draws_may_be_others_where_products_are_halves(
    target: str, others: int, verdicts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = t.Input("x", "i64", "b", (8,))
    module = Module("m", (), (("x", x), ("p", t.Cast(x, "f32"))))
    monkeypatch.setattr(circuits, "module_of", lambda *_: module)
    given = np.arange(8)[None]
    got = {"x": given.copy(), "p": given.astype(np.float32)}
    got["x"][0, :others] += 1
    setting, engine = Setting(target, precision="fp16"), SimpleNamespace()
    found = circuits._by_module(setting, engine, "c", "sample", {"x": given}, got)  # type: ignore[arg-type]
    assert {f.verdict for f in found} == verdicts


@pytest.mark.parametrize("name", ["llama-hmm-n4", "evabyte-own-heads-n4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_protocol_on_a_cpu_as_from_a_file(name: str, batch: int, tmp_path: Path) -> None:
    """The expectations go through JSON, as where there is no CPU runtime."""
    (s,) = (s for s in SCENARIOS if s.name == name)
    case = key_of(s, batch, "fp32")
    stored = json.loads(json.dumps({case: expected(s, batch, "fp32", tmp_path)}))
    setting = replace(CPU, batch=batch)
    found = list(check_protocol(setting, tmp_path, quiet, stored, (s,)))
    assert not bad(found)
    assert len(found) == len(RUNS) * (batch + 1)
    assert all(f.verdict == "ok" for f in found)


def test_drafts_of_every_scenario_end_everywhere() -> None:
    """Windows from 2 to 16, both batch sizes, and every kind of verifier are there."""
    assert {"llama", "byte-llama", "evabyte", "gpt", "lora"} <= {
        k for k in verifiers.KINDS if any(s.name.startswith(k) for s in SCENARIOS)
    }
    assert {int(p[1:]) for s in SCENARIOS for p in s.name.split("-") if p[1:].isdigit()} >= {
        2, 3, 4, 8, 16,
    }  # fmt: skip
    assert {b for s in SCENARIOS for b in s.batches} == {1, 3}


# ---------------------------------------------------------------- it can fail


def test_a_wrong_op_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(g, n):  # type: ignore[no-untyped-def]
        return g("Add", *(g.values[a] for a in n.args))

    monkeypatch.setitem(RULES, t.Mul, wrong)
    cases = [c for c in numbered(()) if c.case.op in (t.Mul, t.Exp)]
    found = list(check_ops(CPU, tmp_path, quiet, cases))
    assert {f.case for f in bad(found)} == {c.title for c in cases if c.case.op is t.Mul}


def test_rounds_that_are_not_recorded_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their text is right, and they are slower than a backend promises."""

    def slow(engine: Engine, run: Any, batch: int, shift: Shift | None = None) -> Trace:
        if run.name == "greedy" and engine.path.parent.name.startswith("llama-ff-n2-onnx-cuda"):
            warnings.warn(
                "rounds run without a CUDA graph, and slower", RuntimeWarning, stacklevel=1
            )
        return play(engine, run, batch, shift)

    monkeypatch.setattr(scenarios, "play", slow)
    chosen = tuple(s for s in SCENARIOS if s.name == "llama-ff-n2")
    found = list(check_protocol(Setting("onnx-cuda"), tmp_path, quiet, scenarios=chosen))
    (slower,) = bad(found)
    assert (slower.what, slower.verdict) == ("greedy", "refused")
    assert "without a CUDA graph" in slower.note


def test_an_op_that_a_backend_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcc.errors import PccError

    def lacking(g, n):  # type: ignore[no-untyped-def]
        raise PccError("E999", "there is no such kernel")

    monkeypatch.setitem(RULES, t.CumProd, lacking)
    cases = [c for c in numbered(()) if c.case.op in (t.CumProd, t.Exp, t.Log)]
    found = list(check_ops(CPU, tmp_path, quiet, cases))
    assert {f.case for f in found if f.verdict == "refused"} == {
        c.title for c in cases if c.case.op is t.CumProd
    }
    assert any(f.verdict == "ok" for f in found)


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        ([0.0, 1.0 + 1e-7], "ok"), ([0.0, 1.001], "differs"), ([np.nan, 1.0], "differs"),
        ([-np.inf, 1.0], "differs"), ([0.0], "differs"),
    ],
)  # fmt: skip
def test_answers_are_judged(got: list[float], verdict: str) -> None:
    want = np.array([[0.0, 1.0]])
    found = compared("s", "c", "w", want, np.array([got], np.float32), 2e-6)
    assert found.verdict == verdict
    report = as_json([found], target="x")
    assert report["ok"] is (verdict == "ok")
    assert len(report["findings"]) == (verdict != "ok")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    (s,) = (s for s in SCENARIOS if s.name == "llama-hmm-n4")
    return open_bundle(CPU, scenarios.built(s, CPU, tmp_path_factory.mktemp("host")))


def shifted(host: Engine, by: float) -> tuple[Trace, Trace]:
    """Return a sampled trace and another one that a shift of one uniform has changed."""
    (run,) = (r for r in RUNS if r.name == "sampled")
    want = play(host, run, 1)
    for e in want.rows[0][1:]:
        for slot in range(6):
            got = play(host, run, 1, Shift(0, e.length, slot, by))
            if got.rows != want.rows:
                return want, got
    raise AssertionError("no shift changes anything")


@pytest.mark.parametrize(("bound", "verdict"), [(0.3, "tie"), (1e-5, "differs")])
def test_a_draw_that_a_small_shift_explains_is_a_tie(
    host: Engine, bound: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = (r for r in RUNS if r.name == "sampled")
    monkeypatch.setitem(knobs.CHANCE_TIES, "f32", bound)
    want, got = shifted(host, 0.3)
    found = list(judge("c", run, want, got, "fp32", lambda s: play(host, run, 1, s), 9))
    assert next(f.verdict for f in found) == verdict
    assert len(found) == 1  # the acceptance of parted texts says nothing


@pytest.mark.parametrize(("bound", "verdict"), [(1e9, "tie"), (1e-9, "differs")])
def test_another_greedy_token_is_a_tie_only_where_its_lead_is_small(
    host: Engine, bound: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = (r for r in RUNS if r.name == "greedy")
    want = play(host, run, 1)
    at = next(k for k, e in enumerate(want.rows[0]) if e.rivals and e.rivals[0])
    event = want.rows[0][at]
    other = replace(event, ids=(event.rivals[0][0][0], *event.ids[1:]))
    got = Trace([[*want.rows[0][:at], other, *want.rows[0][at + 1 :]]], want.accepted)
    monkeypatch.setitem(knobs.LOGIT_TIES, "f32", bound)
    found = list(judge("c", run, want, got, "fp32", None, 9))
    assert found[0].verdict == verdict


def test_in_half_precision_few_shifts_are_tried(host: Engine) -> None:
    """A text that parts where no tie is near: each shift plays it again, which takes long."""
    (run,) = (r for r in RUNS if r.name == "sampled")
    want, _ = shifted(host, 0.3)
    event = want.rows[0][3]
    other = replace(event, ids=(event.ids[0] + 1, *event.ids[1:]))
    got = Trace([[*want.rows[0][:3], other, *want.rows[0][4:]]], want.accepted)
    tried: dict[str, list[Shift]] = {"fp16": [], "fp32": []}

    def again(shift: Shift) -> Trace:
        tried[precision].append(shift)
        return want

    for precision, verdict in (("fp16", "skipped"), ("fp32", "differs")):
        (found,) = judge("c", run, want, got, precision, again, 40)
        assert found.verdict == verdict
        assert ("16 shifted uniforms were tried" in found.note) == (precision == "fp16")
    assert len(tried["fp16"]) == len(set(tried["fp16"])) == 16
    assert len(tried["fp32"]) == len(set(tried["fp32"])) == 2 * 40 * 2


def test_another_acceptance_is_found(host: Engine) -> None:
    (run,) = (r for r in RUNS if r.name == "sampled")
    want = play(host, run, 1)
    got = replace(want, accepted=[want.accepted[0] + 1, *want.accepted[1:]])
    assert [f.verdict for f in judge("c", run, want, got, "fp32", None, 9)] == ["ok", "differs"]


# ---------------------------------------------------------------- command line


def test_the_command_writes_a_report(tmp_path: Path) -> None:
    args = ["conformance", "--part", "ops", "--batch", "1", "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"]
    assert report["suites"][0]["suite"] == "ops"
    assert report["suites"][0]["ok"] > 1000
    assert "onnx on cpu, fp32: agrees" in done.output


def test_the_command_fails_where_something_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(g, n):  # type: ignore[no-untyped-def]
        return g("Sqrt", g.values[n.x])

    monkeypatch.setitem(RULES, t.Exp, wrong)
    args = ["conformance", "--part", "ops", "--batch", "1", "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 1
    assert not json.loads((tmp_path / "r.json").read_text())["ok"]
    assert "DIFFERS" in done.output


def test_the_stored_texts_are_what_a_cpu_makes(tmp_path: Path) -> None:
    """`pcc conformance --save-expected`, whose file GPU machines compare with, is up to date."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/conformance_expected.json.gz"
    stored = read(path)
    keys = {key_of(s, b, p) for s in SCENARIOS for p in s.precisions for b in s.batches}
    assert set(stored) == keys
    (s,) = (s for s in SCENARIOS if s.name == "llama-ff-n2")
    found = list(check_protocol(CPU, tmp_path, quiet, stored, (s,)))
    assert not bad(found)


def test_bundles_are_compiled_side_by_side(tmp_path: Path) -> None:
    """What is compiled ahead is what is needed; a name that fails hinders no other."""
    from pcc.conformance.circuits import circuits, place_of
    from pcc.conformance.prebuild import prebuild

    said: list[str] = []
    lacking = Setting(target="onnx", precision="bf16")  # a precision that the target has not
    with prebuild([CPU, lacking], ("queries",), tmp_path, 2, said.append) as order:
        for s in (CPU, lacking):
            found = list(order.of(circuits(), lambda name, s=s: place_of(tmp_path, name, s)))
            assert sorted(found) == sorted(circuits())  # as they are ready, each once
    assert all(place_of(tmp_path, name, CPU).is_dir() for name in circuits())
    assert sum(s.startswith("compiled") for s in said) == len(circuits())
    assert sum(s.startswith("not compiled") for s in said) == len(circuits())


def test_ops_are_compiled_side_by_side_where_a_graph_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph is a bundle of its own, and they are judged in the order in which they come."""
    from pcc.conformance import ops
    from pcc.conformance.prebuild import _tasks

    old = Setting("tensorrt", "tensorrt", engine=(("level", 0),))
    listed = ops.portions(old)
    titles = [c.title for part in listed for c in part]
    assert titles == [c.title for c in numbered((), "tensorrt")]
    assert max(map(len, listed)) == ops.GROUP
    tasks = dict(_tasks(old, ("ops",), tmp_path, ()))
    assert list(tasks) == [ops.ops_of(old, tmp_path, part) for part in listed]
    assert [len(part) for part in ops.portions(CPU)] == [len(numbered(()))]

    class Last:
        def of(self, items, place):  # type: ignore[no-untyped-def]
            listed = list(items)
            for part in listed:
                ops.build_ops(CPU, tmp_path, part)
                assert place(part).is_dir()
            yield from reversed(listed)

    few = numbered(())[:4]
    monkeypatch.setattr(ops, "portions", lambda *_: [few[:2], few[2:]])
    found = list(check_ops(CPU, tmp_path, quiet, few, Last()))
    assert not bad(found)
    assert list(dict.fromkeys(f.case for f in found)) == [c.title for c in (*few[2:], *few[:2])]


def test_nothing_is_run_on_a_device_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcc.conformance import suite

    def failing(*_: object) -> list[Finding]:
        return [Finding("ops", "a", "", "differs", note="[X304] the driver's cuLaunch failed")]

    monkeypatch.setattr(suite, "check_ops", failing)
    found = list(suite.check(CPU, quiet, folder=tmp_path))
    assert [f.verdict for f in found] == ["differs", "refused"]
    assert "not run" in found[1].note


@pytest.mark.parametrize(("code", "whose"), [("X301", "environment"), ("X403", "ours"),
                                             ("E141", "ours"), ("X304", "ours")])  # fmt: skip
def test_what_the_environment_lacks_is_no_finding(code: str, whose: str) -> None:
    from pcc.conformance.report import refused
    from pcc.errors import PccError

    error = PccError(code, "why")
    if whose == "ours":
        assert refused("s", "c", error).verdict == "refused"
        return
    with pytest.raises(PccError, match="X301"):
        refused("s", "c", error)


def test_plans_of_the_cuda_engine_on_the_host(tmp_path: Path) -> None:
    """A few cases: `pcc conformance --target cuda --provider simulator` has all."""
    setting = Setting("cuda", "simulator", batch=3, halves=("bf16",))
    names = ("t.inverse_cdf", "t.truncate", "t.contract", "t.eva_attention", "t.cache_write")
    by_op = {c.case.op.name: c for c in numbered(("bf16",))}  # the last of each: in bf16, if it can
    found = list(check_ops(setting, tmp_path, quiet, [by_op[n] for n in names]))
    assert not bad(found)
    assert len({f.case for f in found}) == len(names)
