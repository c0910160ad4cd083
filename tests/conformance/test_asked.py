"""A run that checks nothing does not agree, and what cannot be checked is refused before it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pcc import knobs
from pcc.cli import app
from pcc.conformance import scenarios, suite
from pcc.conformance.asked import check_setting
from pcc.conformance.bundles import Setting
from pcc.conformance.circuits import place_of
from pcc.conformance.ops import check_ops, numbered
from pcc.conformance.prebuild import prebuild
from pcc.conformance.protocol import RUNS, Trace, judge, play
from pcc.conformance.report import Finding, as_json, compared
from pcc.conformance.scenarios import SCENARIOS, built, bundle_of, given
from pcc.conformance.texts import checked, read, write
from pcc.conformance.watched import NEAR
from pcc.errors import PccError
from pcc.tensor import ops as t

CPU = Setting()


def quiet(_line: str) -> None:
    pass


def called(*options: str) -> Any:
    return CliRunner().invoke(app, ["conformance", *options])


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--part", "protocol", "--precision", "fp16", "--batch", "2"), "C143"),
        (("--only", "zzz"), "C143"),
        (("--part", "queries", "--only", "wide-llama"), "C143"),
        (("--part", "ops", "--only", "llama"), "C143"),
        (("--part", "queries", "--half", "f16"), "C143"),
        (("--target", "cuda", "--provider", "simulator", "--precision", "bf16",
          "--part", "protocol", "--batch", "2"), "C143"),
        (("--target", "onnx", "--precision", "bf16"), "E141"),
        (("--target", "nothing"), "E141"),
        (("--precision", "fp8"), "E141"),
        (("--engine", "level=1"), "E141"),
        (("--save-expected", "e.json", "--precision", "fp16"), "C144"),
        (("--save-expected", "e.json", "--json", "r.json"), "C144"),
        (("--target", "onnx-cuda", "--part", "protocol", "--batch", "3"), "C143"),
        (("--target", "tensorrt", "--provider", "tensorrt", "--engine", "level"), "E430"),
        (("--target", "tensorrt", "--provider", "tensorrt", "--engine", "level=1", "--engine",
          "level=2"), "E430"),
        (("--provider", "nothing"), "C142"),
        (("--target", "cuda"), "C142"),
        (("--half", "foo"), "C146"),
        (("--part", "nothing"), "C140"),
        (("--head", "/nonexistent"), "C144"),
        (("--verifier", "/nonexistent"), "C144"),
        (("--json", "/nonexistent/r.json"), "C147"),
        (("--json", "/"), "C147"),
    ],
)  # fmt: skip
def test_what_would_check_nothing_is_bad_usage(
    options: tuple[str, ...], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit 2, before anything is compiled."""
    monkeypatch.setattr(suite, "prebuild", lambda *_: pytest.fail("it has begun"))
    done = called(*options)
    assert isinstance(done.exception, PccError), done.exception
    assert (done.exception.code, done.exception.exit_code) == (code, 2)


@pytest.mark.parametrize(
    ("target", "hint"),
    [("cuda", "one of cuda, simulator, build"), ("onnx-cuda", "one of cpu, cuda, build"),
     ("tensorrt", "one of tensorrt, build")],
)  # fmt: skip
def test_providers_that_a_target_has_are_named(target: str, hint: str) -> None:
    with pytest.raises(PccError) as caught:
        check_setting(Setting(target, "nothing"))
    assert (caught.value.code, caught.value.hint) == ("C142", hint)


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": {"greedy": {"rows": 3}}}', "nan"])
def test_expectations_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    done = called("--part", "protocol", "--expected", str(path))
    assert isinstance(done.exception, PccError)
    assert done.exception.code == "C141"


def test_a_part_in_which_all_is_skipped_fails(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text("{}")
    report = tmp_path / "r.json"
    done = called("--part", "protocol", "--only", "llama-ff-n2", "--batch", "1",
                  "--expected", str(tmp_path / "e.json"), "--json", str(report))  # fmt: skip
    assert done.exit_code == 1
    made = json.loads(report.read_text())
    assert not made["ok"]
    assert "nothing was found equal" in made["findings"][-1]["note"]
    assert (made["parts"], made["only"], made["batches"]) == (["protocol"], ["llama-ff-n2"], [1])


def test_a_report_of_nothing_or_of_a_part_is_not_ok() -> None:
    fine = Finding("ops", "a", "", "ok")
    assert as_json([fine])["ok"]
    assert not as_json([])["ok"]
    assert not as_json([fine], complete=False)["ok"]


def test_a_run_writes_what_it_has_found_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "r.json", list[Any]()

    def check(*_: object, **__: object) -> Iterator[Finding]:
        for name in ("a", "b"):
            yield Finding("ops", name, "", "ok")
            seen.append(json.loads(file.read_text()))

    monkeypatch.setattr("pcc.cli.conformance.EVERY", -1.0)
    monkeypatch.setattr(suite, "check", check)
    assert called("--part", "ops", "--json", str(file)).exit_code == 0
    reports = [*seen, json.loads(file.read_text())]
    assert [(r["complete"], r["ok"]) for r in reports] == [(False, False)] * 2 + [(True, True)]
    assert [r["suites"][0]["ok"] for r in reports] == [1, 2, 2]


def test_every_setting_runs_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, which the float64 evaluator judges, and the simulator have texts too."""
    run: list[tuple[str, ...]] = []

    def some(_: Setting, parts: tuple[str, ...], *__: object) -> list[Finding]:
        run.append(parts)
        return [Finding(p, "a", "", "ok") for p in parts]

    monkeypatch.setattr(suite, "_parts", some)
    for setting in (Setting("cuda", "simulator", "bf16"), Setting("cuda", "simulator"), CPU):
        assert not [f for f in suite.check(setting, quiet, batches=(1,)) if f.bad]
    assert run == [("ops", "queries", "protocol")] * 3


# ---------------------------------------------------------------- bundles


def test_bundles_of_another_run_are_not_judged(tmp_path: Path) -> None:
    (tmp_path / "llama-ff-n2-onnx-fp32-1").mkdir()
    with pytest.raises(PccError, match="C145"):
        list(suite.check(CPU, quiet, parts=("ops",), batches=(1,), folder=tmp_path))


def test_bundles_of_two_batches_lie_beside_each_other(tmp_path: Path) -> None:
    """The second batch found the first one's file, and was taken apart for it."""
    cases = [c for c in numbered(()) if c.case.op is t.Mul]
    said: list[str] = []
    for batch in (1, 3):
        found = list(check_ops(Setting("onnx-cuda", batch=batch), tmp_path, said.append, cases))
        assert found
        assert all(f.verdict == "ok" for f in found)
    assert len(said) == 2  # nothing was halved


def test_what_is_asked_for_is_compiled_ahead(tmp_path: Path) -> None:
    """A model of one's own, and not those of the suite; it travels to other processes."""
    (source,) = (s for s in SCENARIOS if s.name == "lora-cp-n4")
    pytest.importorskip("yaml")
    made = source.make(tmp_path)
    own = given(Path(made[0]), made[1])
    said: list[str] = []
    work = tmp_path / "work"
    with prebuild([CPU], ("protocol",), work, 2, said.append, (own,)) as order:
        assert list(order.of([own], lambda s: bundle_of(s, CPU, work))) == [own]
    assert said[1:] == ["compiled: given"], said
    place = built(own, CPU, tmp_path / "work")
    assert place.is_dir()
    assert not place_of(tmp_path, "given", CPU).exists()


# ---------------------------------------------------------------- what is judged


def test_small_masses_are_judged_by_their_own_size() -> None:
    want, got = np.array([1.0, 1e-9]), np.array([1.0, 2e-9], np.float32)
    assert compared("s", "c", "w", want, got, 2e-6).verdict == "ok"
    assert compared("s", "c", "w", want, got, 2e-6, 1e-30).verdict == "differs"


@pytest.mark.parametrize("op", [t.Div, t.InverseCdf, t.Exp, t.ReduceProd])
def test_a_backend_that_flushes_small_numbers_is_found(
    op: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of kernels that take numbers below 1e-30 for zero."""
    from pcc.conformance import ops
    from pcc.interp.run import run

    class Flushing:
        def __init__(self, modules: Any) -> None:
            self.modules = modules
            self.queries = {
                q: {"inputs": [{"name": n.key} for n in m.nodes() if isinstance(n, t.Input)]}
                for q, m in modules.items()
            }

        def run(self, query: str, /, **inputs: Any) -> dict[str, Any]:
            from pcc.ir.semiring import Real

            small = {k: _flushed(v) for k, v in inputs.items()}
            values = run(self.modules[query].roots, small, Real())
            pairs = zip(self.modules[query].outputs, values, strict=True)
            return {o: _flushed(np.asarray(v)) for (o, _), v in pairs}

    monkeypatch.setattr(ops, "answers_of", lambda _, modules, __: Flushing(modules))
    cases = [c for c in numbered(()) if c.case.op is op]
    found = list(check_ops(Setting(batch=3), tmp_path, quiet, cases))
    assert any(f.bad for f in found) is (op in (t.Div, t.InverseCdf, t.Exp))


def _flushed(v: Any) -> Any:
    return np.where(np.abs(v) < 1e-30, 0, v).astype(v.dtype) if v.dtype.kind == "f" else v


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    (s,) = (s for s in SCENARIOS if s.name == "llama-hmm-n4")
    engine = scenarios.open_bundle(CPU, built(s, CPU, tmp_path_factory.mktemp("host")))
    return play(engine, RUNS[0], 1)


def test_rivals_are_what_the_leads_are_over(greedy: Trace) -> None:
    """One-token passes find the same lead; they are noted where it is small, and only there."""
    near = 0
    for e in greedy.rows[0]:
        for lead, rivals in zip(e.leads, e.rivals, strict=True):
            assert bool(rivals) is (abs(lead) <= NEAR)
            if rivals:
                near += 1
                assert rivals[0][1] == pytest.approx(abs(lead), abs=1e-4)
    assert near


@pytest.mark.parametrize(("chosen", "verdict"), [("rival", "tie"), ("other", "differs")])
def test_a_tie_is_with_the_runner_up_alone(
    greedy: Trace, chosen: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = greedy.rows[0]
    at = next(k for k, e in enumerate(events) if any(e.rivals))
    event = events[at]
    slot = next(k for k, r in enumerate(event.rivals) if r)
    rivals = [i for i, _ in event.rivals[slot]]
    other = next(i for i in range(250) if i not in (event.ids[slot], *rivals))
    ids = list(event.ids)
    ids[slot] = rivals[0] if chosen == "rival" else other
    got = Trace([[*events[:at], replace(event, ids=tuple(ids)), *events[at + 1 :]]], [1])
    monkeypatch.setitem(knobs.LOGIT_TIES, "f32", NEAR)
    found = list(judge("c", RUNS[0], greedy, got, "fp32", None, 9))
    assert found[0].verdict == verdict


def test_texts_go_through_json_with_their_rivals(greedy: Trace) -> None:
    again = Trace.read(json.loads(json.dumps(greedy.plain())))
    assert again.plain() == greedy.plain()
    for a, b in zip(again.rows[0], greedy.rows[0], strict=True):
        assert replace(a, leads=b.leads) == b
        assert a.leads == pytest.approx(b.leads, abs=1e-6)
    texts = {run.name: greedy.plain() for run in RUNS}
    assert checked({"a": texts}) == {"a": texts}


@pytest.mark.parametrize("name", ["e.json", "e.json.gz"])
def test_files_of_texts(greedy: Trace, tmp_path: Path, name: str) -> None:
    texts = {"a": {run.name: greedy.plain() for run in RUNS}}
    write(tmp_path / name, texts)
    first = (tmp_path / name).read_bytes()
    assert read(tmp_path / name) == json.loads(json.dumps(texts))
    write(tmp_path / name, texts)
    assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{}", "no gzip"), (b"", "cut off"), (gzip.compress(b"{}" * 99)[:-9], "cut off"),
        (gzip.compress(b"{}") + b"{}", "more than"), (gzip.compress(b" " * 5000), "more than"),
        (gzip.compress(b"[1]"), "object"), (gzip.compress(b"{"), "no JSON"),
    ],
)  # fmt: skip
def test_damaged_packed_texts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    """What unpacks to more than may be read is not unpacked."""
    monkeypatch.setattr("pcc.conformance.texts.MAX_RESULT_BYTES", 1000)
    (tmp_path / "e.gz").write_bytes(data)
    with pytest.raises(PccError, match=said) as found:
        read(tmp_path / "e.gz")
    assert found.value.code == "C141"
