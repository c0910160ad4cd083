"""Rows of GPU results, the yardstick's place in them, parts of a plan, and the merged tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcc
from pcc.cli import bench_gpu, plots
from pcc.errors import PccError
from pcc.runtime.bound import bound_ms, complete, quantiles, rates, row, with_yardstick
from pcc.runtime.parts import keys, moved, parts
from pcc.runtime.traffic import Attention
from pcc.shapes import Synthetic

ROOT = Path(__file__).resolve().parents[2]
MOVED = {"weights": 12_950_000_000, "head": 1_460_000_000, "kv": 540_000_000}


def made(**more: Any) -> dict[str, Any]:
    about = {
        "name": "a", "backend": "pcc-cuda", "shape": "evabyte-6.5b", "architecture": "btree",
        "n": 16, "r": 32, "batch": 1, "context": 1024, "precision": "bf16",
        "torch_graph_ms": None, "versions": {}, "gpu": "G", "commit": "c",
    }  # fmt: skip
    times = {"p10": 4.1, "p50": 4.2, "p90": 4.4}
    return row(about | more, times, MOVED, 4.26, 50)


def test_the_bound_is_the_bytes_at_the_bandwidth() -> None:
    """14.95 GB at 4.26 TB/s take 3.51 ms, whatever the units of the parts."""
    assert bound_ms(MOVED, 4.26) == pytest.approx(14.95 / 4.26)
    r = made()
    assert r["ratio_to_bound"] == pytest.approx(4.2 / (14.95 / 4.26))
    assert r["copy_share"] == pytest.approx(1 / r["ratio_to_bound"])
    assert not complete(r)
    assert complete({k: v for k, v in r.items() if k != "gpu"}) == ["gpu"]


def test_quantiles_and_rates() -> None:
    assert quantiles([3.0, 1.0, 2.0]) == {"p10": 1.2, "p50": 2.0, "p90": 2.8}
    r = rates(4.0, 3.2, 6.8, 2)
    assert r["tokens_per_second"] == pytest.approx([6.8 * 2 / 4e-3, 7.8 * 2 / 4e-3])
    assert r["break_even_tokens"] == pytest.approx(1.25)
    assert r["speedup"] == pytest.approx([6.8 * 3.2 / 4.0, 7.8 * 3.2 / 4.0])
    assert rates(4.0, None, 1.0, 1)["speedup"] is None


def test_the_yardstick_is_that_of_the_same_work_and_gpu() -> None:
    torch = made(name="t", backend="torch-cuda-graph", precision="fp16") | {"round_ms": 8.0}
    other = made(name="o", backend="torch-cuda-graph", gpu="H") | {"round_ms": 9.0}
    far = made(name="far", context=8192)
    found = {r["name"]: r["torch_graph_ms"] for r in with_yardstick([made(), torch, other, far])}
    assert found == {"a": 8.0, "t": 8.0, "o": 9.0, "far": None}


def torch_row(ms: float, precision: str, **more: Any) -> dict[str, Any]:
    about = {"name": f"t-{precision}", "backend": "torch-cuda-graph", "precision": precision}
    return made(**about | more) | {"round_ms": ms}


def beside(*rows: dict[str, Any]) -> tuple[Any, Any]:
    first = with_yardstick(rows)[0]
    return first["torch_graph_ms"], first["torch_precision"]


def test_the_yardstick_has_the_same_precision_or_moves_the_same_bytes() -> None:
    bf16, fp16, fp32 = (
        torch_row(ms, p) for ms, p in ((8.0, "bf16"), (9.0, "fp16"), (17.0, "fp32"))
    )
    assert beside(made(), fp16, bf16, fp32) == (8.0, "bf16")
    assert beside(made(precision="fp16"), fp32, bf16) == (8.0, "bf16")
    assert beside(made(), fp32) == (None, None)
    assert beside(made(precision="fp32"), bf16, fp16) == (None, None)
    assert beside(made(precision="fp32"), bf16, fp32) == (17.0, "fp32")
    # Beside 8-bit weights, whose bytes torch has no round of, stands its round in half.
    assert beside(made(precision="bf16+int8"), fp32, bf16) == (8.0, "bf16")
    assert beside(made(precision="bf16+int8"), fp32) == (None, None)
    for other in ("n", "r", "batch", "context"):
        assert beside(made(), torch_row(8.0, "bf16", **{other: 99})) == (None, None)


def test_the_newest_yardstick_counts() -> None:
    """By date, not by name or place."""
    late = torch_row(7.0, "bf16", name="a") | {"date": "2026-11-25T10:00:00+00:00"}
    early = torch_row(8.0, "bf16", name="z") | {"date": "2026-11-24T10:00:00+00:00"}
    assert beside(made(), late, early) == beside(made(), early, late) == (7.0, "bf16")


def test_a_yardstick_that_was_paired_before_does_not_stay() -> None:
    assert beside(made() | {"torch_graph_ms": 3.0}) == (None, None)


def test_parts_are_layers_of_one_kind() -> None:
    launches = [
        {"op": "t.contract", "layer": f"model.layers.{i}.down", "bytes": {"weights": 10, "kv": 1}}
        for i in range(3)
    ]
    launches.insert(1, {"op": "generated", "layer": ""})
    a, b = parts(launches)
    assert (a.name, a.layer, a.launches, a.bytes) == (
        "t.contract", "model.layers.*.down", (0, 2, 3), 33,
    )  # fmt: skip
    assert (b.name, b.launches, b.bytes) == ("generated", (1,), 0)


def test_attention_reads_the_rows_that_are_there() -> None:
    bytes = {"weights": 5, "activations": 7, "kv_row": 100, "kv_rows": 64}
    ring = bytes | {"kv_chunk": 16}
    assert [moved({"bytes": bytes}, rows) for rows in (0, 10, 200)] == [12, 1012, 6412]
    assert [moved({"bytes": ring}, rows) for rows in (63, 64, 64 + 33, 128)] == [
        12 + 100 * rows for rows in (63, 4, 4 + 33, 8)
    ]


@pytest.mark.parametrize("context", [1, 63, 64, 97, 8 * 64])
def test_a_window_and_its_summaries_count_as_the_ir_has_them(context: int) -> None:
    """A plan's launch and the attention of the IR that it was made from name the same rows."""
    listed = {"kv_row": 100, "kv_rows": 64, "kv_chunk": 16}
    assert keys(listed, context) == Attention(100, window=64, chunk=16).bytes(context)


def shown() -> list[dict[str, Any]]:
    more = {
        "graphs": {"step": {"p10": 1.0, "p50": 2.0, "p90": 3.0}}, "rates": rates(4.0, 3.0, 1.0, 1),
        "parts": [
            {"part": "p", "layer": "l", "launches": 3, "ms": 1.0, "bytes": 9, "of_copy": 0.5}
        ],
    }  # fmt: skip
    return [made() | more, made(name="b", context=8192) | more]


def test_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    bench_gpu.show(shown())
    out = capsys.readouterr().out
    assert "4.26 TB/s" in out
    assert "1.20" in out  # the ratio
    plots.draw_gpu(shown(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_contexts_are_checked() -> None:
    assert bench_gpu.checked((), 50) == (1024,)
    assert bench_gpu.checked((8, 8, 9), 5) == (8, 9)
    with pytest.raises(PccError, match="C135"):
        bench_gpu.checked((0,), 50)


def test_acceptance_is_of_the_drafts_of_a_round() -> None:
    def asked(accepted: float | None) -> bench_gpu.Asked:
        return bench_gpu.Asked((), "cuda", (1,), 5, accepted=accepted)

    assert bench_gpu.accepted_of(asked(7.0), "x", 8) == 7.0
    assert bench_gpu.accepted_of(asked(None), "evabyte-6.5b", 16) == 6.8
    assert bench_gpu.accepted_of(asked(None), "evabyte-6.5b", 4) == 3
    with pytest.raises(PccError, match="C135"):
        bench_gpu.accepted_of(asked(7.5), "x", 8)


@pytest.mark.parametrize(
    "options",
    [
        ("--gpu", "--prompts", "p.txt"), ("--gpu", "--max-new-tokens", "128"),
        ("--gpu", "--no-sampled"), ("--gpu", "--threads", "1"), ("--context", "7"),
        ("--accepted", "1"), ("--shape", "x"), ("--json-out", "r.json"), ("--also", "b.pcc"),
    ],
)  # fmt: skip
def test_options_that_a_bench_does_not_read_are_refused(options: tuple[str, ...]) -> None:
    """Even where they are given their defaults."""
    from typer.testing import CliRunner

    from pcc.cli import app

    done = CliRunner().invoke(app, ["bench", "m.pcc", *options])
    assert isinstance(done.exception, PccError)
    assert (done.exception.code, done.exception.exit_code) == ("C138", 2)


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that cannot be timed takes nothing from those before it."""
    from types import SimpleNamespace

    import pcc
    from pcc.runtime import measure_gpu
    from pcc.runtime.device import driver

    def rows_of(engine: Path, *_: Any) -> Any:
        if engine.name == "b":
            raise PccError("R121", "too long")
        yield made(name="one")
        yield made(name="two")

    monkeypatch.setattr(driver, "device", lambda: SimpleNamespace(name="G"))
    monkeypatch.setattr(measure_gpu, "copy_bandwidth", lambda _: 4.0)
    monkeypatch.setattr(pcc, "load", lambda path, provider: path)
    monkeypatch.setattr(bench_gpu, "rows_of", rows_of)
    out = tmp_path / "rows.json"
    asked = bench_gpu.Asked((Path("a"), Path("b")), "cuda", (1,), 5)
    with pytest.raises(PccError, match="R121"):
        bench_gpu.bench_gpu(asked, None, out, as_json=True)
    assert [r["name"] for r in json.loads(out.read_text())] == ["one", "two"]


# ---------------------------------------------------------------- merging


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.gpu.merge

    return benchmarks.gpu.merge


def part(name: str, value: Any, writes: str = "rows", stage: str = "s") -> dict[str, Any]:
    return {
        "stage": stage, "name": name, "status": 0, "writes": writes, "data": value, "commit": "new",
    }  # fmt: skip


def test_rows_are_merged_by_name_and_gpu(merge: Any) -> None:
    old = [made(), made(name="kept")]
    torch = made(name="t", backend="torch-cuda-graph") | {"round_ms": 8.4}
    rows = merge.merged(old, [part("x", [made() | {"round_ms": 4.0}]), part("y", torch, "row")])
    by = {r["name"]: r for r in rows}
    assert set(by) == {"a", "kept", "t"}
    assert (by["a"]["round_ms"], by["a"]["commit"]) == (4.0, "new")
    assert by["kept"]["commit"] == "c"
    assert by["a"]["torch_graph_ms"] == 8.4
    assert "| 2.10 |" in merge.table(rows)
    with pytest.raises(SystemExit, match="lacks gpu"):
        merge.merged([], [part("x", [{k: v for k, v in made().items() if k != "gpu"}])])


def test_reports_keep_what_is_not_equal(merge: Any) -> None:
    report = {
        "target": "cuda", "provider": "cuda", "precision": "fp32", "ok": True,
        "complete": True, "batches": [1], "parts": ["ops"], "only": [], "halves": ["f16"],
        "suites": [{"suite": "ops", "ok": 9, "tie": 1, "differs": 0, "refused": 0, "skipped": 2}],
        "findings": [{"verdict": "tie", "case": "a"}, {"verdict": "skipped", "case": "b"}],
    }  # fmt: skip
    (found,) = merge.reports([], [part("n", report, "report", "conformance-cuda")])
    assert [f["case"] for f in found["findings"]] == ["a"]
    line = "| cuda | cuda | fp32 | ops | stored f16 too; batch 1 | 9 | 1 | 0 | 0 | 2 |"
    assert line in merge.verdicts([found])


def verdict(*, complete: bool, ok: int, status: int = 0, name: str = "n") -> dict[str, Any]:
    suite = {"suite": "protocol", "tie": 0, "differs": 0, "refused": 0, "skipped": 0, "ok": ok}
    report = {
        "target": "cuda", "provider": "cuda", "precision": "fp16", "ok": True, "seconds": 130.8,
        "complete": complete, "batches": [1], "suites": [suite], "findings": [],
    }  # fmt: skip
    return part(name, report, "report", "conformance-cuda") | {"status": status}


@pytest.mark.parametrize(("complete", "status"), [(False, 0), (False, 124), (True, 124)])
def test_a_report_that_was_cut_off_is_marked(merge: Any, complete: bool, status: int) -> None:
    cut = verdict(complete=complete, ok=2, status=status)
    (found,) = merge.reports([], [cut])
    assert (found["ok"], found["complete"]) == (False, False)
    assert "| batch 1; **cut off after 131 s** | 2 |" in merge.verdicts([found])
    whole = verdict(complete=True, ok=9, status=1)
    for order in ([whole, cut], [cut, whole]):
        (found,) = merge.reports([], order)
        assert found["complete"]
        assert found["suites"][0]["ok"] == 9
    (old,) = merge.reports([], [whole])
    assert merge.reports([old], [cut]) == [old]


def test_reports_say_what_of_a_suite_was_run(merge: Any) -> None:
    """Older ones do not say it themselves: the command of that name does."""
    report = verdict(complete=True, ok=1, name="cuda-ops")
    report["data"]["suites"][0]["suite"] = "ops"
    said = merge.verdicts(merge.reports([], [report]))
    assert "| ops | stored f16, bf16 too; batch 1 |" in said
    report["data"]["suites"][0]["suite"] = "queries"
    report["data"] |= {"only": ["contextual"]}
    assert "only contextual; batch 1" in merge.verdicts(merge.reports([], [report]))
    report["data"]["suites"][0]["suite"] = "protocol"
    report["data"] |= {"only": [], "checkpoints": "hub"}
    assert "published checkpoints; batch 1" in merge.verdicts(merge.reports([], [report]))
    report["data"]["suites"][0]["suite"] = "queries"
    report["data"] |= {"only": [], "batches": [1, 3]}
    assert "| queries | batch 1, 3 | 1 |" in merge.verdicts(merge.reports([], [report]))


def test_rows_say_the_precision_of_another_yardstick(merge: Any) -> None:
    rows = merge.merged([], [part("x", [made(precision="fp16"), torch_row(8.4, "bf16")])])
    assert "| 8.40 (bf16) |" in merge.table(rows)
    assert "| 8.40 (bf16) |" in merge.short(rows)


def test_an_older_row_replaces_no_newer_one(merge: Any) -> None:
    new, old = ({"date": d} for d in ("2026-11-25", "2026-11-24"))
    rows = merge.merged([made() | new], [part("x", [made() | old | {"round_ms": 1.0}])])
    assert rows[0]["round_ms"] == 4.2
    later = part("x", [made() | {"round_ms": 1.0}]) | {"date": "2026-11-26"}
    rows = merge.merged([made() | new], [later])
    assert (rows[0]["round_ms"], rows[0]["date"]) == (1.0, "2026-11-26")


def test_rates_are_those_of_this_program(merge: Any) -> None:
    """Rows of earlier programs state a token more as a single number."""
    more = {
        "rates": {"acceptance": 1.0, "tokens_per_second": 9},
        "graphs": {"decode": {"p50": 3.0}},
    }
    (r,) = merge.merged([], [part("x", [made() | more])])
    assert r["rates"] == rates(4.2, 3.0, 1.0, 1)


def test_every_stage_asks_for_what_can_be_checked(merge: Any) -> None:
    from benchmarks.gpu.stages import STAGES
    from pcc.conformance.asked import check_parts, check_setting
    from pcc.conformance.bundles import Setting
    from pcc.conformance.scenarios import SCENARIOS

    seen = 0
    for c in (c for s in STAGES for c in s.commands if "conformance" in c.args):
        pairs = list(zip(c.args, c.args[1:], strict=False))

        def given(option: str, pairs: Any = pairs) -> list[str]:
            return [v for k, v in pairs if k == option]

        (target,), (provider,) = given("--target"), given("--provider")
        setting = Setting(target, provider, *given("--precision"), halves=tuple(given("--half")),
                          only=tuple(given("--only")))  # fmt: skip
        check_setting(setting)
        check_parts([setting], given("--part"), SCENARIOS)
        seen += 1
    assert seen > 10


def test_tables_go_between_their_markers(merge: Any) -> None:
    page = "a\n<!-- h200 -->\nold\n<!-- end h200 -->\nz\n"
    new = merge.placed(page, "h200", "new")
    assert new == "a\n<!-- h200 -->\nnew\n<!-- end h200 -->\nz\n"
    assert merge.placed(new, "other", "x") == new


def test_the_runner_keeps_what_a_failing_command_leaves(
    merge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that fails, one that hangs and one that writes rows: three entries."""
    import benchmarks.gpu.run_h200 as runner
    from benchmarks.gpu.stages import Command, Stage

    write = ("-c", "import sys; open(sys.argv[1], 'w').write('[1]')", "{json}")
    stage = Stage("s", (
        Command("fails", ("-c", "print('why'); raise SystemExit(3)"), 20),
        Command("hangs", ("-c", "import time; time.sleep(60)"), 1),
        Command("writes", write, 20, "system", "rows"),
    ))  # fmt: skip
    monkeypatch.setattr(runner, "STAGES", (stage,))
    monkeypatch.setattr(
        sys, "argv", ["run", "--out", str(tmp_path), "--work", str(tmp_path / "w"), "s"]
    )
    assert runner.main() == 1
    entries = json.loads((tmp_path / "parts.json").read_text())
    assert [e["status"] for e in entries] == [3, 124, 0]
    assert "why" in entries[0]["log"]
    assert entries[2]["data"] == [1]


def test_every_stage_names_what_exists(merge: Any) -> None:
    from benchmarks.gpu.stages import STAGES

    assert len({s.name for s in STAGES}) == len(STAGES)
    for stage in STAGES:
        for c in stage.commands:
            script = c.args[0].replace("{root}", str(ROOT))
            assert c.args[0].startswith("-") or Path(script).is_file(), script


def test_drafts_and_rounds_have_tables_of_their_own(merge: Any) -> None:
    draft = made(name="d", graph="draft", proposal="latent-first", gpu="H", date="2026-02-01")
    rows = merge.merged([], [part("x", [made(date="2026-01-01"), draft])])
    assert merge.table(merge.rounds(rows)).count("\n") == 2  # the head of the table, and one row
    assert "| first | 1 | 4.2000 (4.1000, 4.4000) | 14950.0 |" in merge.drafts(rows)
    assert [r["gpu"] for r in merge.newest(rows)] == ["H"]


@pytest.mark.parametrize("proposal", ["full", "latent-first"])
def test_a_draft_alone_is_the_draft_of_a_round(proposal: str, tmp_path: Path) -> None:
    """The bundle that is timed: one graph, whose answers are those of a head's own query."""
    from benchmarks.gpu import drafts
    from pcc.conformance.bundles import Setting

    out = tmp_path / "m.pcc"
    drafts.written("evabyte-tiny", "cp,n=4,r=3", proposal, Setting("onnx", "cpu"), out)
    engine = pcc.load(out)
    assert list(engine.queries) == ["draft"]
    feed = {
        "context": np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32),
        "carry": np.array([7 % engine.cards[0]]), "u": np.full((1, 4), 0.5, np.float32),
    }  # fmt: skip
    q = engine.run("draft", **feed)["q"]
    assert q.shape == (1, 3, 320)
    np.testing.assert_allclose(q.sum(-1), 1, atol=1e-5)
    if proposal == "full":
        whole = pcc.compile(Synthetic("evabyte-tiny").head("cp,n=4,r=3"), queries=["draft"],
                            out=tmp_path / "w.pcc")  # fmt: skip
        want = pcc.load(whole.path).run("draft", **feed)["q"]
        np.testing.assert_allclose(q, want, atol=1e-6)
