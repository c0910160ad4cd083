"""The model of a round's time: against measured rows, against arithmetic by hand, and the fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pcc.backends.cuda import cost
from pcc.backends.cuda.codegen.generate import Generated
from pcc.backends.cuda.cost import Constants, Prediction, Work, duration, predict, works
from pcc.backends.cuda.fitted import DRAFT_ERROR, ROUND_ERROR
from pcc.backends.cuda.gpu import GPUS, TUNED, gpu_of
from pcc.backends.cuda.library import linear
from pcc.explore.forms import Engine, Form, Plans
from pcc.runtime.parts import keys
from pcc.shapes import Synthetic

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import cost_fit  # noqa: E402

ROWS = cost_fit.rows_of()
MOST_ERROR = 0.15  # what docs/cuda.md promises of a round; its table has what was found
EARLIER_ERROR = 0.25  # of rows whose layers were launched in another way
ROUND = Constants(
    read=2.0, start=3.0, apart=4.0, sums=5.0, widened=10.0, block=2.0, scanned=8.0, summaries=7.0,
    phase=0.5, barrier=1.5, generated=6.0,
)  # fmt: skip
GPU = replace(TUNED, copy_rate=4.0, processors=100)  # 4 MB in a microsecond


def name(r: dict[str, Any]) -> str:
    return f"{r['gpu'].split()[1]}-{r['name'].removeprefix('pcc-cuda-')}"


# ------------------------------------------------------------ measured rows


def test_there_are_rows_of_both_gpus_in_halves_and_integers() -> None:
    assert {r["gpu"].split()[1] for r in ROWS} == {"H100", "H200"}
    assert {"bf16", "bf16+int8"} <= {r["precision"] for r in ROWS}


@pytest.mark.parametrize("r", ROWS, ids=name)
def test_rounds_and_passes_are_predicted(r: dict[str, Any]) -> None:
    most = MOST_ERROR if cost_fit.current(r) else EARLIER_ERROR
    for graph in ("step", "decode"):
        made = predict(cost_fit.works_of(r, graph), cost_fit.gpu_of_row(r))
        assert made.ms == pytest.approx(r["graphs"][graph]["p50"], rel=most), graph


@pytest.mark.parametrize("r", ROWS, ids=name)
def test_bytes_are_those_that_the_ir_counts(r: dict[str, Any]) -> None:
    """A row's bytes were counted from the text of the IR, by `pcc.runtime.traffic`."""
    made = predict(cost_fit.works_of(r, "step"), cost_fit.gpu_of_row(r))
    assert made.moved["kv"] == r["bytes_moved"]["kv"]
    for part in ("weights", "head"):
        assert made.moved[part] == pytest.approx(r["bytes_moved"][part], rel=0.01)
    assert made.bound_ms == pytest.approx(r["bound_ms"], rel=0.01)


def test_the_errors_that_are_told_are_those_of_the_table() -> None:
    text = (ROOT / "docs/cuda.md").read_text("utf-8")
    table = text.split("<!-- cost:")[1].split("<!-- end cost -->")[0].splitlines()[3:]
    errors = [
        float(line.split("|")[7].strip(" %")) for line in table if line and "earlier" not in line
    ]
    assert max(map(abs, errors)) == pytest.approx(100 * ROUND_ERROR, abs=0.06)
    assert 0 < DRAFT_ERROR < MOST_ERROR


# ------------------------------------------------------------ by hand


def test_a_stream_of_weights() -> None:
    """80 MB at 2 x 4 MB/us, 0.2 MB of sums at 5 us/MB, and two ends."""
    w = Work("layers", weights=80_000_000, partial=200_000, blocks=90)
    got = duration(w, GPU, ROUND)
    assert (got.body, got.ends) == (pytest.approx(10.0 + 1.0), 3.0)
    assert duration(replace(w, apart=True), GPU, ROUND).ends == 3.0 + 4.0
    assert duration(Work("layers", weights=1000, apart=True), GPU, ROUND).ends == 3.0


def test_integers_are_widened_by_the_blocks_that_are_there() -> None:
    """40 MB take 5 us to read; 80 blocks widen 0.8 MB in a microsecond, 200 as 100 would."""
    w = Work("head", weights=40_000_000, integers=40_000_000, blocks=80)
    assert duration(w, GPU, ROUND).body == pytest.approx(50.0)
    assert duration(replace(w, blocks=200), GPU, ROUND).body == pytest.approx(40.0)
    few = replace(w, integers=1_000_000, blocks=100)
    assert duration(few, GPU, ROUND).body == pytest.approx(5.0)


def test_an_attention_is_bound_by_its_blocks_or_by_all_keys() -> None:
    """150 blocks on 100 multiprocessors: 1.5 x 2 us, and 80 KB at 8 KB/us; or 240 MB at 8 MB/us."""
    w = Work("attention", keys=8_000_000, scanned=80_000, blocks=150)
    assert duration(w, GPU, ROUND).body == pytest.approx(3.0 + 10.0)
    assert duration(replace(w, summaries=True), GPU, ROUND).body == pytest.approx(20.0)
    assert duration(replace(w, keys=240_000_000), GPU, ROUND).body == pytest.approx(30.0)
    assert duration(replace(w, blocks=10), GPU, ROUND).body == pytest.approx(2.0 + 10.0)


def test_a_generated_kernel_and_a_round() -> None:
    """Four phases, two barriers, 8 MB of rows at the rate of a copy."""
    w = Work("generated", weights=8_000_000, phases=4, barriers=2, blocks=100)
    got = duration(w, GPU, ROUND)
    assert (got.body, got.ends) == (pytest.approx(2.0 + 3.0 + 2.0), 6.0)
    layer = Work("layers", weights=80_000_000)
    head = Work("head", weights=8_000_000)
    made = predict((layer, layer, head, w), GPU, ROUND)
    assert made.parts == pytest.approx(
        {"layers": 0.020, "head": 0.001, "attention": 0.0, "generated": 0.007, "ends": 0.015}
    )
    assert made.moved == {"weights": 160_000_000, "head": 16_000_000, "kv": 0}
    assert made.ms == pytest.approx(0.043)
    assert made.ratio == pytest.approx(0.043 / 0.044)


# ------------------------------------------------------------ launches


def test_a_product_with_integers_counts_no_scales() -> None:
    """Packed integers of K by N alone; sums of three rows where there is room for eight."""
    kernel = linear("p", rows=3, k=4096, n=4096, dtype="bf16", integers=True, slabs=4)
    w = cost.work(kernel, {"weights": 4096 * 4096 + 4 * 4096}, 0, "layers")
    assert w.integers == 4096 * 4096
    assert w.partial == 4 * 3 * 4096 * 4
    assert w.blocks == kernel.grid[0] * 4


def tiny(head: str, form: Form, shape: str = "byte-llama-tiny") -> tuple[Work, ...]:
    s = Synthetic(shape)
    plans = Plans(s.head(head), Engine(s, TUNED, max_seq=128))
    return works(plans.round(form, greedy=False), partial(keys, context=32))


def test_launches_belong_to_layers_head_attention_or_are_generated() -> None:
    s = Synthetic("evabyte-tiny")
    plans = Plans(s.head("cp,n=4,r=4"), Engine(s, TUNED, max_seq=128))
    builder = plans.round(Form("full"), greedy=False)
    found = works(builder, partial(keys, context=32))
    layers = [w for w in found if "layers." in w.layer]
    assert [w.part for w in layers] == ["layers", "attention", *["layers"] * 3] * 2
    assert all(w.summaries == (w.part == "attention") for w in layers)
    made = [w.part == "generated" for w in found]
    assert made == [isinstance(x.kernel, Generated) for x in builder.launches]
    assert {w.part for w in found[: made.index(True)]} == {"layers", "attention"}
    assert {w.part for w in found[made.index(True) :]} == {"generated", "head"}


def test_a_draft_alone_is_all_head_and_a_pass_has_none() -> None:
    s = Synthetic("byte-llama-tiny")
    plans = Plans(s.head("hmm,n=4,r=4"), Engine(s, TUNED, max_seq=128))
    draft = works(plans.draft(Form("full")), lambda _: 0)
    assert {w.part for w in draft} == {"head", "generated"}
    assert predict(draft, TUNED).moved["weights"] == 0
    decode = predict(works(plans.tokens(1), partial(keys, context=9)), TUNED)
    assert decode.moved["head"] == 0
    assert decode.moved["kv"] == 2 * 9 * 2 * 2 * 16 * 2  # layers, rows, k and v, heads, width, f16


def test_launches_of_older_gpus_never_overlap() -> None:
    s, old = Synthetic("byte-llama-tiny"), gpu_of("sm_80")
    plans = Plans(s.head("cp,n=4,r=4"), Engine(s, old, max_seq=128))
    assert all(w.apart for w in works(plans.tokens(1), lambda _: 0))
    new = works(Plans(s.head("cp,n=4,r=4"), Engine(s, TUNED, max_seq=128)).tokens(1), lambda _: 0)
    assert not all(w.apart for w in new)
    assert new[0].apart


# ------------------------------------------------------------ facts of the large shapes


def rounds(shape: str, head: str, *forms: Form) -> list[Prediction]:
    s = Synthetic(shape)
    plans = Plans(s.head(head), Engine(s, TUNED))
    made = [works(plans.round(f, greedy=False), partial(keys, context=1024)) for f in forms]
    return [predict(m, TUNED) for m in made]


@pytest.mark.parametrize("shape", ["evabyte-6.5b", "byte-llama-3.2-3b"])
def test_forms_of_a_large_head(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers halve the head's bytes; chosen experts are less still. No weight is made."""
    drawn = []
    from pcc.ir.noise import Noise

    read = Noise.read

    def counted(self: Noise, dtype: str, start: int, stop: int) -> Any:
        drawn.append(stop - start)
        return read(self, dtype, start, stop)

    monkeypatch.setattr(Noise, "read", counted)
    forms = (Form("full"), Form("full", int8=True), Form("latent-first"))
    full, integers, latent = rounds(shape, "btree,n=16,r=32", *forms)
    assert integers.moved["head"] == pytest.approx(full.moved["head"] / 2, rel=0.01)
    assert latent.moved["head"] < integers.moved["head"]
    assert latent.ms < integers.ms < full.ms
    assert latent.moved["weights"] == integers.moved["weights"] == full.moved["weights"]
    assert latent.parts["layers"] == full.parts["layers"]
    assert sum(drawn) < 10_000_000  # of billions


def test_a_slower_gpu_is_slower() -> None:
    s = Synthetic("evabyte-6.5b")
    plans = Plans(s.head("cp,n=8,r=8"), Engine(s, TUNED, int8=True))
    found = works(plans.round(Form("full", int8=True), greedy=False), partial(keys, context=1024))
    times = [predict(found, replace(TUNED, copy_rate=r)).ms for r in (8.0, 4.25, 3.0, 1.0, 0.2)]
    assert times == sorted(times)
    assert times[0] < times[-1]
    few = predict(found, replace(TUNED, processors=60))
    assert few.parts["layers"] > predict(found, TUNED).parts["layers"]
    assert predict(found, GPUS["sm_121"]).ms > predict(found, TUNED).ms


# ------------------------------------------------------------ the fit


def test_the_fit_finds_the_constants_that_made_the_samples() -> None:
    """Sizes as in rounds; times by known constants; every kind is fitted."""
    sizes = (
        Work("layers", weights=30_000_000, partial=2_000_000, blocks=128),
        Work("layers", weights=180_000_000, partial=100_000, blocks=132),
        Work("head", weights=1_300_000_000, partial=900_000, blocks=132, apart=True),
        Work("head", weights=670_000_000, integers=670_000_000, blocks=132),
        Work("attention", keys=4_000_000, scanned=75_000, blocks=128),
        Work("attention", keys=33_000_000, scanned=600_000, blocks=128),
        Work("attention", keys=16_000_000, scanned=75_000, blocks=256, summaries=True),
        Work("attention", keys=4_000_000, scanned=75_000, blocks=192),
        Work("generated", phases=6), Work("generated", phases=9, barriers=3),
    )  # fmt: skip
    gpus = (replace(TUNED, copy_rate=3.0), replace(TUNED, copy_rate=4.25))
    want = replace(ROUND, read=1.1, block=1.3, scanned=21.0)
    want = replace(want, generated=cost_fit.FIRST.generated)
    found = [
        cost_fit.Sample(
            w.part if w.part in cost_fit.FITS else "stream", w, g, duration(w, g, want).whole
        )
        for w in sizes
        for g in gpus
    ]
    got = cost_fit.fitted(found)
    for field in vars(want):
        assert getattr(got, field) == pytest.approx(getattr(want, field), rel=1e-3), field


def test_a_fit_without_rows_is_refused() -> None:
    with pytest.raises(SystemExit, match="stream"):
        cost_fit.fitted([])


def test_what_is_written_is_what_was_fitted() -> None:
    made: dict[str, Any] = {}
    exec(cost_fit.source(ROUND, {"step": 0.061, "draft": 0.07}), made)
    assert made["FITTED"] == vars(ROUND)
    assert (made["ROUND_ERROR"], made["DRAFT_ERROR"]) == (0.061, 0.07)
