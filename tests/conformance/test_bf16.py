"""Texts in bf16: judged by the float64 evaluator, to their end, also where rounding parts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcc import check_generation
from pcc.conformance import scenarios, verifiers
from pcc.conformance.bundles import HOSTED, Setting, open_bundle
from pcc.conformance.circuits import check_queries
from pcc.conformance.hosted import evaluated, simulated
from pcc.conformance.protocol import MOST_TIES, RUNS, Trace, judge, parts_of, play
from pcc.conformance.report import Finding
from pcc.conformance.scenarios import SCENARIOS, Host, Scenario, built, check_protocol
from pcc.conformance.texts import read
from pcc.conformance.watched import Event
from pcc.errors import PccError
from pcc.ir.array import rounded
from pcc.ir.core import tensor
from pcc.knobs import LOGIT_TIES
from pcc.stored import Stages
from pcc.tensor.eva import EvaAttention
from pcc.tensor.nn import CachedAttention
from pcc.tensor.reductions import Contract

STORED = Path(__file__).resolve().parents[2] / "benchmarks/results/conformance_expected.json.gz"
SIMULATED = Setting("cuda", "simulator", "bf16")
(GREEDY,) = (r for r in RUNS if r.greedy)
BOUND = LOGIT_TIES["bf16"]


def quiet(_line: str) -> None:
    pass


def named(name: str) -> Scenario:
    return next(s for s in SCENARIOS if s.name == name)


# ---------------------------------------------------------------- two ways to run a module


@pytest.mark.parametrize("batch", [1, 3])
def test_the_evaluator_plays_the_texts_of_a_cpu(batch: int, tmp_path: Path) -> None:
    """In fp32, where ONNX Runtime judges: sessions over modules are sessions."""
    s = named("llama-hmm-n4")
    cpu = Setting(batch=batch)
    want = open_bundle(cpu, built(s, cpu, tmp_path))
    got = evaluated(built(s, Setting(HOSTED, batch=batch), tmp_path))
    for run in RUNS:
        a, b = (play(e, run, batch) for e in (want, got))
        assert [[e.ids for e in row] for row in a.rows] == [[e.ids for e in row] for row in b.rows]
        assert a.accepted == b.accepted


def test_a_bundle_in_bf16_is_verified_on_the_simulator(tmp_path: Path) -> None:
    """Its states are bf16: what `pcc verify` does on a device, with plans in its place."""
    engine = simulated(built(named("llama-hmm-n4"), SIMULATED, tmp_path))
    module = Stages(engine.path, engine.manifest["files"]).module("tensor-step")
    rng = np.random.default_rng(2)
    prompt = check_generation._prompt(engine, rng)
    found = check_generation._graph(engine, "step", module, prompt, rng)
    assert {"emitted", "next_draft_q", "present.key.0"} <= {what for _, what, _, _ in found}
    assert all(error <= bound for _, _, error, bound in found), found


def test_the_stored_texts_are_what_the_evaluator_makes(tmp_path: Path) -> None:
    stored = read(STORED)
    s = named("byte-llama-btree-n8")
    made = scenarios.expected(s, 1, "bf16", tmp_path)
    assert json.loads(json.dumps(made)) == stored[scenarios.key_of(s, 1, "bf16")]


@pytest.mark.parametrize(
    ("precision", "batch"),
    [
        pytest.param("fp32", 3, marks=pytest.mark.slow),
        pytest.param("bf16", 1, marks=pytest.mark.slow),
    ],
)
def test_texts_of_the_cuda_engines_plans(precision: str, batch: int, tmp_path: Path) -> None:
    """Sessions on the simulator: fp32 beside ONNX Runtime, bf16 beside the evaluator."""
    s = named("llama-hmm-n4")
    setting = replace(SIMULATED, precision=precision, batch=batch)
    found = list(check_protocol(setting, tmp_path, quiet, None, (s,)))
    assert {f.verdict for f in found} == {"ok"}
    assert len(found) == len(RUNS) * (batch + 1)


@pytest.mark.slow
def test_queries_of_the_cuda_engines_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 too, which the target of a CPU has not."""
    from pcc.conformance import circuits

    one = {"cp-contextual": circuits.circuits()["cp-contextual"]}
    monkeypatch.setattr(circuits, "circuits", lambda: one)
    found = list(check_queries(SIMULATED, tmp_path, quiet))
    assert found
    assert {f.verdict for f in found} == {"ok"}


def test_plans_take_the_rows_that_they_were_made_for(tmp_path: Path) -> None:
    path = built(named("llama-hmm-n4"), replace(SIMULATED, batch=3), tmp_path)
    with pytest.raises(PccError, match="R104"):
        simulated(path).session().generate_ids([1, 2, 3], 4)
    assert len(evaluated(path).session(greedy=True).generate_ids([1, 2, 3], 4)) == 4
    with pytest.raises(PccError, match="R115"):
        evaluated(path).executor("step")


def test_a_model_that_the_evaluator_does_not_take_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcc.knobs.CHECK_PARAMETERS", 1000)
    found = list(check_protocol(SIMULATED, tmp_path, quiet, None, (named("llama-hmm-n4"),)))
    assert [f.verdict for f in found] == ["skipped"]
    assert "V110" in found[0].note


# ---------------------------------------------------------------- engines that round, or are wrong

Change = Callable[..., Any]


def results_as_halves(old: Change, *args: Any) -> Any:
    """As engines do whose products of halves have half results."""
    return rounded(old(*args).astype(np.float32), "bf16").astype(float)


def scaled_scores(old: Change, q: Any, *args: Any) -> Any:
    return old(q * 1.25, *args)


def one_row_less(old: Change, *args: Any) -> Any:
    return old(*args[:-1], np.maximum(args[-1] - 1, 0))


def changed(n: Any, old: Change, change: Change, s: Any, *args: Any) -> Any:
    meaning = partial(old, n, s)
    halves = any(tensor(x).dtype == "bf16" for x in n.args)
    return change(meaning, *args) if halves else meaning(*args)


def found_in(
    s: Scenario, change: Change, folder: Path, monkeypatch: Any, *ops: Any, wide: bool = True
) -> list[Finding]:
    """Judge the greedy text of an engine of which an op with halves is changed."""
    setting = Setting(HOSTED, precision="bf16")
    host = Host(s, setting, folder)
    want = play(host.engine, GREEDY, 1)
    with monkeypatch.context() as m:
        for op in (CachedAttention, EvaAttention, *ops):
            m.setattr(op, "eval", partialmethod(changed, op.eval, change))
        got = play(evaluated(built(s, setting, folder)), GREEDY, 1)
    return list(judge("case", GREEDY, want, got, "bf16", None, 9, host.behind, wide=wide))


@pytest.fixture(scope="module")
def crossing() -> Scenario:
    """A verifier of two logits that lie close at the text's begin: rounding parts it there."""
    return Scenario("evabyte", verifiers.evabyte, precisions=("bf16",))


def test_a_text_that_rounding_parts_is_judged_to_its_end(
    crossing: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (f,) = found_in(crossing, results_as_halves, tmp_path, monkeypatch, Contract, wide=False)
    assert f.verdict == "tie", f
    assert 0 < f.error < BOUND / 2
    assert "ids are not the first choice" in f.note


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-hmm-n4", scaled_scores), ("evabyte", one_row_less),
        *(pytest.param(*x, marks=pytest.mark.slow)
          for x in (("llama-hmm-n4", one_row_less), ("evabyte", scaled_scores))),
    ],
)  # fmt: skip
def test_wrong_attention_is_found(
    name: str, change: Change, crossing: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = crossing if name == crossing.name else named(name)
    (f,) = found_in(s, change, tmp_path, monkeypatch)
    assert f.verdict == "differs", f


# ---------------------------------------------------------------- the rule by itself


def event(at: int, *ids: int, part: int = 0) -> Event:
    return Event(0, part, at - 1, at, ids)


def test_parts_of_a_text_that_was_rewound() -> None:
    """Kept ids are part of what comes after, and are judged once."""
    events = [event(5, 1), event(6, 2, 3), event(8, 4), event(7, 9, part=1), event(8, 8, part=1)]
    assert list(parts_of(events)) == [([1, 2, 3, 4], 0), ([1, 2, 9, 8], 2)]


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [
        ({3: 0.1}, "tie"), ({3: 0.1, 19: 0.01}, "tie"), ({3: 0.1, 19: 0.01, 30: 0.1}, "differs"),
        ({3: 0.2}, "wide differs"), ({3: BOUND * 1.01}, "differs"), ({3: 0.1, 19: 5.0}, "differs"),
    ],
)  # fmt: skip
def test_ties_are_small_and_few(behind: dict[int, float], verdict: str) -> None:
    """One text of 50 ids, of which one parts from the reference's."""
    ids = list(range(100, 150))
    want, got = (Trace([[event(7, *x)]], [1]) for x in (ids, [*ids[:3], 7, *ids[4:]]))
    assert len(ids) * MOST_TIES < 3

    def gaps(row: int, given: list[int]) -> Any:
        assert (row, given) == (0, [*ids[:3], 7, *ids[4:]])
        return np.array([behind.get(k, 0.0) for k in range(len(given))])

    for wide in (False, True):
        (f,) = judge("c", GREEDY, want, got, "bf16", None, 9, gaps, wide=wide)
        asked, _, known = verdict.rpartition(" ")
        assert f.verdict == (known if wide or not asked else "tie")
        assert f.error == max(behind.values())
