"""`pcc choose`: forms of a head by predicted rounds, what would change the pick, and refusals."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shipped import Command

import pcc
from pcc.backends.cuda.gpu import TUNED
from pcc.cli import choose as cli
from pcc.errors import PccError
from pcc.explore import Config
from pcc.explore.forms import Engine, Form, Plans, form_of, forms_of
from pcc.explore.points import Point
from pcc.explore.predicted import Asked, Ranking, ranking
from pcc.explore.records import SCHEMA
from pcc.explore.report import report
from pcc.explore.stated import measured, stated
from pcc.shapes import Synthetic

MODELS = Path(__file__).resolve().parents[2] / "examples/models"
SHAPE = ("--shape", "evabyte-tiny", "--head", "btree,n=4,r=4", "--max-seq", "128")
AT = ("--context", "32", "--gpu", "sm_90", "--copy-rate", "4.25")
ALL = ("--accepted", "full=2.5", "--accepted", "full+int8=2.4", "--accepted", "latent-first=1.5")


@pytest.fixture(scope="module")
def plans() -> Plans:
    s = Synthetic("evabyte-tiny")
    return Plans(s.head("btree,n=4,r=4"), Engine(s, TUNED, max_seq=128))


def asked(plans: Plans, **accepted: float) -> Asked:
    named = {k.replace("_", "-").replace("-int8", "+int8"): v for k, v in accepted.items()}
    return Asked(forms_of(plans.circuit, greedy=False), named, 32, False, 4.25, "stated")


def by_form(r: Ranking) -> dict[str, Any]:
    return {f["form"]: f for f in r["forms"]}


# ------------------------------------------------------------ the decision


def test_rates_are_tokens_of_a_round_over_its_time(plans: Plans) -> None:
    r = ranking(plans, asked(plans, full=2.5, full_int8=2.5, latent_first=1.5))
    for name, a in {"full": 2.5, "full+int8": 2.5, "latent-first": 1.5}.items():
        f = by_form(r)[name]
        assert f["tokens_per_second"] == pytest.approx((a + 1) / (f["ms"] / 1e3))
        assert f["ms"] == pytest.approx(sum(f["parts"].values()))
    plain = by_form(r)["autoregressive"]
    assert plain["tokens_per_second"] == pytest.approx(1e3 / plain["ms"])
    rates = [f["tokens_per_second"] for f in r["forms"]]
    assert rates == sorted(rates, reverse=True)
    assert r["pick"] == r["forms"][0]["form"]
    assert r["lead"] == pytest.approx(rates[0] / rates[1] - 1)


@pytest.mark.parametrize("name", ["full", "full_int8", "latent_first"])
def test_at_its_break_even_a_form_is_as_fast_as_what_it_is_compared_with(
    plans: Plans, name: str
) -> None:
    """Asked again with that acceptance, the two rates are one."""
    given = {"full": 2.0, "full_int8": 1.9, "latent_first": 1.8}
    form = name.replace("_", "-").replace("-int8", "+int8")
    first = by_form(ranking(plans, asked(plans, **given)))[form]
    given[name] = first["break_even"]
    again = by_form(ranking(plans, asked(plans, **given)))
    other = again[first["against"]]
    assert again[form]["tokens_per_second"] == pytest.approx(other["tokens_per_second"])


def test_the_pick_changes_where_it_was_said_to(plans: Plans) -> None:
    given = {"full": 2.0, "full_int8": 0.1, "latent_first": 0.1}
    r = ranking(plans, asked(plans, **given))
    assert r["pick"] == "full"
    even = by_form(r)["latent-first"]["break_even"]
    for off, pick in ((-1e-6, "full"), (1e-6, "latent-first")):
        given["latent_first"] = even + off
        assert ranking(plans, asked(plans, **given))["pick"] == pick


def test_no_draft_is_a_candidate(plans: Plans) -> None:
    """A head of which nothing is accepted only costs time."""
    r = ranking(plans, asked(plans, full=0, full_int8=0, latent_first=0))
    assert r["pick"] == "autoregressive"
    assert {f["against"] for f in r["forms"]} == {"autoregressive", None}


def test_without_acceptances_there_is_no_pick(plans: Plans) -> None:
    """What is left: how many must be accepted to be faster than without drafts."""
    r = ranking(plans, asked(plans))
    assert (r["pick"], r["lead"], r["margin"]) == (None, None, None)
    found = by_form(r)
    for name in ("full", "full+int8", "latent-first"):
        even = found[name]["ms"] / found["autoregressive"]["ms"] - 1
        assert found[name]["break_even"] == pytest.approx(even)
    assert [f["form"] for f in r["forms"]][-1] == "autoregressive"


def test_a_batch_multiplies_rates(plans: Plans) -> None:
    s = Synthetic("evabyte-tiny")
    wide = Plans(plans.circuit, Engine(s, TUNED, batch=3, max_seq=128))
    f = by_form(ranking(wide, asked(wide, full=2, full_int8=2, latent_first=2)))["full"]
    assert f["tokens_per_second"] == pytest.approx(3 * 3 / (f["ms"] / 1e3))


def test_what_a_lead_is_worth_is_told(plans: Plans) -> None:
    close = ranking(plans, asked(plans, full=2, full_int8=2, latent_first=0))
    far = ranking(plans, asked(plans, full=3, full_int8=1, latent_first=0))
    assert close["margin"] is not None
    assert (close["lead"] or 0) < close["margin"]
    assert any("time both" in x for x in close["remarks"])
    assert not far["remarks"]


def test_other_gpus_and_wide_passes_are_remarked_on(plans: Plans) -> None:
    engine = replace(plans.engine, gpu=replace(TUNED, arch="sm_120"), batch=33)
    r = ranking(Plans(plans.circuit, engine), asked(plans))
    assert "nothing has been timed on sm_120" in r["remarks"][0]
    assert "132 rows" in r["remarks"][1]


# ------------------------------------------------------------ forms


def test_forms_of_a_head() -> None:
    s = Synthetic("evabyte-tiny")
    tree, plain = s.head("btree,n=4,r=4"), s.head("ff,n=4")
    sampled = [f.name for f in forms_of(tree, greedy=False)]
    assert sampled == ["full", "full+int8", "latent-first"]
    greedy = {f.name for f in forms_of(tree, greedy=True)}
    assert greedy == {
        "stepwise", "stepwise+int8", "max-product", "max-product+int8", "latent-first",
    }  # fmt: skip
    assert [f.name for f in forms_of(plain, greedy=False)] == ["full", "full+int8"]
    assert [f.name for f in forms_of(plain, greedy=True)] == ["stepwise", "stepwise+int8"]


def test_integers_of_the_verifier_are_of_no_form() -> None:
    """They are another model: only who asks for them gets them, in every form."""
    s = Synthetic("evabyte-tiny")
    head = s.head("btree,n=4,r=4")
    known = forms_of(head, greedy=False)
    half, integers = (Plans(head, Engine(s, TUNED, int8=i, max_seq=128)) for i in (False, True))
    a, b = (ranking(p, Asked(known, {}, 32, False, 4.0, "stated")) for p in (half, integers))
    assert [f["form"] for f in a["forms"]] == [f["form"] for f in b["forms"]]
    for x, y in zip(a["forms"], b["forms"], strict=True):
        assert y["bytes_moved"]["weights"] < 0.7 * x["bytes_moved"]["weights"]
        assert y["bytes_moved"]["head"] == x["bytes_moved"]["head"]


def test_greedy_rounds_have_launches_of_their_own(plans: Plans) -> None:
    known = forms_of(plans.circuit, greedy=True)
    names = [f.name for f in known]
    r = ranking(plans, Asked(known, dict.fromkeys(names, 1.0), 32, True, 4.25, "stated"))
    assert {f["form"] for f in r["forms"]} == {*names, "autoregressive"}
    step = by_form(r)["stepwise"]["ms"]
    full = by_form(ranking(plans, asked(plans)))["full"]["ms"]
    assert step != full


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("accepted", "code", "what"),
    [
        ({"full": 1.0}, "G112", "full\\+int8, latent-first"),
        ({"full": 3.5, "full_int8": 1, "latent_first": 1}, "G111", "a round has 3"),
        ({"full": -1.0, "full_int8": 1, "latent_first": 1}, "G111", "a round has 3"),
        ({"full": float("nan")}, "G111", "nan"),
        ({"max": 1.0}, "G110", "'max'"),
    ],
)
def test_acceptances_that_no_round_has(
    plans: Plans, accepted: dict[str, float], code: str, what: str
) -> None:
    with pytest.raises(PccError, match=what) as e:
        ranking(plans, asked(plans, **accepted))
    assert e.value.code == code


def test_contexts_are_of_the_engine(plans: Plans) -> None:
    for context in (0, 129):
        with pytest.raises(PccError, match="G111"):
            ranking(plans, replace(asked(plans), context=context))


@pytest.mark.parametrize("text", ["full", "full=", "=2", "full=x", "full=2e", ""])
def test_accepted_is_a_form_and_a_number(text: str) -> None:
    with pytest.raises(PccError, match="G111"):
        stated([text])


def test_a_form_is_stated_once() -> None:
    assert stated(["full=2", "full+int8=1.5"]) == {"full": 2.0, "full+int8": 1.5}
    with pytest.raises(PccError, match="G111"):
        stated(["full=2", "full=2"])


def test_unknown_forms_are_named() -> None:
    known = (Form("full"), Form("full", int8=True))
    assert form_of("full+int8", known) == known[1]
    with pytest.raises(PccError, match="one of full, full\\+int8") as e:
        form_of("latent-first+int8", known)
    assert e.value.code == "G110"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((*SHAPE, "--gpu", "sm_77"), "E180"), ((*SHAPE, "--gpu", "h200"), "E180"),
        ((*SHAPE, "--precision", "fp32"), "G111"), ((*SHAPE, "--precision", "fp8"), "E141"),
        ((*SHAPE, "--int8", "head"), "G111"), ((*SHAPE, "--int8", "all"), "G111"),
        ((*SHAPE, "--copy-rate", "0"), "G111"), ((*SHAPE, "--copy-rate", "nan"), "G111"),
        ((*SHAPE, "--copy-rate", "1e-300"), "G111"),
        ((*SHAPE, "--copy-rate", "101"), "G111"), ((*SHAPE, "--form", "fast"), "G110"),
        ((*SHAPE, "--context", "129"), "G111"), ((*SHAPE, "--step", "4"), "E145"),
        ((*SHAPE, "--batch", "5000"), "E141"), ((*SHAPE, "--plot", "p.gif"), "C133"),
        (("--shape", "evabyte-7b", "--head", "cp,n=4,r=4"), "M160"),
        (("--shape", "evabyte-tiny", "--head", "cp,n=1,r=4"), "M161"), ((), "G111"),
        (("--head", "cp,n=4,r=4"), "M162"), (("nowhere", "--verifier", "nowhere"), "E140"),
    ],
)  # fmt: skip
def test_refusals(args: tuple[str, ...], code: str, command: Command) -> None:
    done = command("choose", *args)
    assert (done.code, done.out) == (2, "")
    assert f"error[{code}]" in done.err
    assert done.err.count("\n") == 1


# ------------------------------------------------------------ the command


def test_a_table_a_pick_and_what_would_change_it(command: Command) -> None:
    done = command("choose", *SHAPE, *AT, *ALL)
    assert (done.code, done.err) == (0, "")
    first, columns, *lines = done.out.splitlines()
    assert first.startswith("evabyte-tiny, btree n=4 r=4, bf16, batch 1, context 32: predicted for")
    assert "sm_90 with 132 multiprocessors, copies at 4.25 TB/s (stated)" in first
    assert columns.split()[:7] == ["form", "ms", "layers", "head", "attention", "generated", "ends"]
    assert [x.split()[0] for x in lines[:4]] == [
        "full", "full+int8", "latent-first", "autoregressive",
    ]  # fmt: skip
    assert lines[4].startswith("pick: full, ")
    assert lines[5].startswith("  it stays so while more than ")
    assert any(x.startswith("  latent-first would be as fast at ") for x in lines)


def test_json_has_all_of_it(command: Command) -> None:
    got = command("choose", *SHAPE, *AT, *ALL, "--json").json
    assert got["gpu"] == {
        "arch": "sm_90", "multiprocessors": 132, "product": TUNED.product, "copy_tb_s": 4.25,
        "copy_from": "stated",
    }  # fmt: skip
    assert (got["pick"], got["context"], got["batch"], got["n"]) == ("full", 32, 1, 4)
    full = next(f for f in got["forms"] if f["form"] == "full")
    assert set(full["parts"]) == {"layers", "head", "attention", "generated", "ends"}
    assert set(full["bytes_moved"]) == {"weights", "head", "kv"}
    assert set(got["commands"]) == {"full", "full+int8", "latent-first"}


def test_only_the_forms_that_are_asked_for(command: Command) -> None:
    args = ("--form", "full", "--form", "latent-first", "--accepted", "full=2")
    assert "error[G112]" in command("choose", *SHAPE, *AT, *args).err
    got = command("choose", *SHAPE, *AT, *args, "--accepted", "latent-first=1", "--json").json
    assert {f["form"] for f in got["forms"]} == {"full", "latent-first", "autoregressive"}


def test_never_is_said_of_what_no_acceptance_reaches(command: Command) -> None:
    args = ("--accepted", "full=3", "--accepted", "full+int8=3", "--accepted", "latent-first=0")
    out = command("choose", *SHAPE, *AT, *args).out
    even = {x.split()[0]: x.split()[-1] for x in out.splitlines()[2:6]}
    slow = "full+int8" if "pick: full," in out else "full"
    assert even[slow] == "never"
    assert f"{slow} would not be faster if all 3 drafts were accepted" in out


def test_the_command_compiles_the_form(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words that are printed go through `pcc compile` itself."""
    given: dict[str, Any] = {}

    def compiled(source: object, **options: Any) -> Any:
        given.update(options, source=source)
        raise PccError("E999", "far enough")

    got = command("choose", *SHAPE, *AT, "--int8", "verifier", "--batch", "2", "--json").json
    monkeypatch.setattr(pcc, "compile", compiled)
    for form, integers, proposal in (
        ("full", "verifier", "full"), ("full+int8", "all", "full"),
        ("latent-first", "verifier", "latent-first"),
    ):  # fmt: skip
        words = shlex.split(got["commands"][form])
        assert "E999" in command(*words[1:]).err
        assert (given["int8"], given["proposal"]) == (integers, proposal)
        assert (given["shape"], given["head"], given["target"]) == (
            "evabyte-tiny", "btree,n=4,r=4", "cuda",
        )  # fmt: skip
        assert (given["batch"], given["max_seq"], given["gpu"]) == (2, 128, "sm_90")


def test_trained_heads_and_plots(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = (str(MODELS / "hmm-n8"), "--verifier", str(MODELS / "backbone"), "--window", "4")
    plot = tmp_path / "p.svg"
    done = command("choose", *args, *AT, "--max-seq", "64", "--greedy", "--plot", str(plot))
    assert done.code == 0
    assert done.out.startswith("backbone, hmm n=4 r=8, bf16")
    assert "no pick: say how many drafts are accepted" in done.out
    text = plot.read_text("utf-8")
    assert text.lstrip().startswith("<?xml")


def test_the_rate_of_the_gpu_that_is_there_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcc.backends.cuda import gpu
    from pcc.runtime import measure_gpu
    from pcc.runtime.device import driver

    monkeypatch.setattr(gpu, "present", lambda: ("sm_90", 132))
    monkeypatch.setattr(driver, "device", lambda: "it")
    monkeypatch.setattr(measure_gpu, "copy_bandwidth", lambda d: 4.2 if d == "it" else 0.0)
    assert cli.copy_rate_of(None, None, TUNED) == (4.2, "measured")
    assert cli.copy_rate_of(1.5, None, TUNED) == (1.5, "stated")
    assert cli.copy_rate_of(None, "sm_90", TUNED) == (3.0, f"table, {TUNED.product}")
    monkeypatch.setattr(gpu, "present", lambda: None)
    assert cli.copy_rate_of(None, None, TUNED)[1].startswith("table")


# ------------------------------------------------------------ acceptances of an exploration


def figures(size: float) -> Any:
    def interval(v: float) -> Any:
        return {"value": v, "low": None, "high": None}

    def of(v: float) -> Any:
        return {
            "bytes_per_round": interval(v), "ms_per_round": interval(1.0), "bytes_per_second": 1.0,
            "ms_per_byte": 1.0, "speedup": interval(1.0), "rounds": 1, "emitted": 1,
            "accepted_drafts": [],
        }  # fmt: skip

    return {
        "prompts": 1, "tokens": 2, "compile_seconds": 0.1,
        "autoregressive_ms_per_byte": interval(1.0), "greedy": of(size), "sampled": of(size / 2),
        "sameness": {"identical": 1, "near_ties": 0, "different": 0}, "graph_ms": {},
    }  # fmt: skip


def point(head: str, size: float, status: str = "ok", **how: Any) -> Any:
    where = Point(head, "btree", how.pop("n", 4), 4, 0, **how).where()
    return {
        "schema": SCHEMA, "key": "k", "time": "now", "status": status, "point": where,
        "figures": figures(size), "error": None,
    }  # fmt: skip


@pytest.fixture
def written(tmp_path: Path, config: Callable[..., Config]) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        context = {"prompts": "p", "versions": {}, "machine": {}}
        made = report(config(tmp_path), lines, context, {}, [], complete=True)
        path = tmp_path / "report.json"
        path.write_text(json.dumps(made))
        return path

    return write


def test_a_report_says_what_its_forms_accept(written: Callable[..., Path]) -> None:
    """By form, of this head and n; in the precision that is asked for, else in fp32; means."""
    path = written(
        point("tree", 6.0), point("tree", 5.0, draft_mode="max-product"),
        point("tree", 5.6, int8="head"), point("tree", 9.9, n=2), point("other", 9.0),
        point("tree", 7.0, proposal="latent-first", precision="fp16"),
        point("tree", 4.0, proposal="latent-first"),
        point("tree", 8.8, "different", proposal="latent-first"),
    )  # fmt: skip
    forms = (Form("full"), Form("full", int8=True), Form("latent-first"))
    got, wide = measured(path, Path("heads/tree"), 4, forms, "fp16", greedy=False)
    want = {"full": (3.0 + 2.5) / 2 - 1, "full+int8": 1.8, "latent-first": 2.5}
    assert got == pytest.approx(want)
    assert wide == ["full", "full+int8"]
    in_bf16, wide = measured(path, Path("heads/tree"), 4, forms, "bf16", greedy=False)
    assert in_bf16["latent-first"] == pytest.approx(1.0)
    assert wide == [f.name for f in forms]
    greedy = (Form("stepwise"), Form("stepwise", int8=True), Form("max-product"))
    got, wide = measured(path, Path("tree.pcir"), 4, greedy, "fp32", greedy=True)
    assert not wide
    want = {"stepwise": (6.0 + 4.0) / 2 - 1, "stepwise+int8": 4.6, "max-product": 4.0}
    assert got == pytest.approx(want)


def test_what_is_stated_counts_before_a_report(
    command: Command, written: Callable[..., Path]
) -> None:
    """A form that neither has is named."""
    path = written(point("hmm-n8", 4.0), point("hmm-n8", 3.0, proposal="latent-first"))
    args = (MODELS / "hmm-n8", "--verifier", MODELS / "backbone", "--window", "4", *AT)
    lacking = command("choose", *args, "--report", path)
    assert lacking.code == 2
    assert "error[G112]: nobody says how many drafts of full+int8 are accepted" in lacking.err
    got = command(
        "choose", *args, "--report", path, "--accepted", "full+int8=0.9", "--accepted", "full=1.1",
        "--json",
    ).json  # fmt: skip
    assert got["remarks"][-1] == "the accepted drafts of latent-first were counted in fp32"
    accepted = {f["form"]: f["accepted"] for f in got["forms"]}
    assert accepted == {
        "full": 1.1, "full+int8": 0.9, "latent-first": 0.5, "autoregressive": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"points": 3}'])
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(PccError, match="no report") as e:
        measured(path, Path("tree"), 4, (), "bf16", greedy=False)
    assert e.value.code == "G113"


def test_a_report_without_the_head(written: Callable[..., Path], tmp_path: Path) -> None:
    path = written(point("tree", 6.0))
    for source, n in ((Path("tree"), 3), (Path("bush"), 4), (None, 4)):
        with pytest.raises(PccError, match="it has tree n=4") as e:
            measured(path, source, n, (), "bf16", greedy=False)
        assert e.value.code == "G113"
    with pytest.raises(PccError, match="G113"):
        measured(tmp_path / "nothing.json", Path("tree"), 4, (), "bf16", greedy=False)
