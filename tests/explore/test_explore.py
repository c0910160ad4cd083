"""Whole explorations of a tiny verifier: figures, resume, failures, keys, the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifiers
import yaml
from shipped import Arena, Command

import pcc
from pcc.errors import PccError
from pcc.explore import Config, explore, prompts
from pcc.explore import run as running
from pcc.explore.records import Line, Report, conforms
from pcc.explore.results import Results
from pcc.runtime.measure import Autoregressive

Make = Callable[..., Config]
Setting = Callable[..., dict[str, Any]]
NAMES = ["cp4 n=3", "cp4 n=4", "ff4 n=3", "ff4 n=4"]


@pytest.fixture(scope="module")
def done(config: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Report]:
    c = config(tmp_path_factory.mktemp("done") / "deep" / "out")
    return c, explore(c)


@pytest.fixture
def copy(done: tuple[Config, Report], setting: Setting, tmp_path: Path) -> Path:
    """A finished exploration, to go on with."""
    shutil.copytree(done[0].out, tmp_path / "out")
    return tmp_path / "out"


def names(lines: list[Line]) -> list[str]:
    return [x["point"]["name"] for x in lines]


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "results.jsonl").read_bytes().splitlines()


# ---------------------------------------------------------------- figures


def test_what_is_written(done: tuple[Config, Report]) -> None:
    c, r = done
    out = Path(c.out)
    assert conforms(r, Report)
    assert json.loads((out / "report.json").read_text()) == r
    assert (names(r["points"]), r["complete"], r["missing"]) == (NAMES, True, [])
    assert [x["status"] for x in r["points"]] == ["ok"] * 4
    assert len(lines_of(out)) == 4
    assert "</html>" in (out / "index.html").read_text()
    assert {p.name for p in out.iterdir()} == {
        "results.jsonl", "report.json", "index.html", ".lock"
    }  # fmt: skip


def test_integers_of_the_head_are_measured(config: Make, tmp_path: Path) -> None:
    """A point of its own, with the same greedy text, and a command that says so."""
    grid = {"n": [4], "architecture": ["cp"], "int8": ["none", "head"]}
    r = explore(config(tmp_path / "out", grid=grid))
    assert [(x["point"]["int8"], x["status"]) for x in r["points"]] == [
        ("none", "ok"), ("head", "ok"),
    ]  # fmt: skip
    plain, integers = (r["commands"][name] for name in names(r["points"]))
    assert "--int8 head" in integers
    assert "--int8" not in plain


def test_figures_are_those_of_the_engine(done: tuple[Config, Report], tmp_path: Path) -> None:
    """Bytes per round counted again, by sessions of a bundle made with the printed command."""
    c, r = done
    found = r["points"][0]["figures"]
    assert found is not None
    words = r["commands"]["cp4 n=3"].split()
    assert words[:2] == ["pcc", "compile"]
    assert words[words.index("--window") + 1] == "3"
    bundle = pcc.compile(words[2], verifier=c.verifier, window=3, queries=["draft"],
                         max_seq=int(words[words.index("--max-seq") + 1]), out=tmp_path / "m.pcc",
                         validate=False).path  # fmt: skip
    engine = pcc.load(bundle, threads=1)
    for mode, greedy in (("greedy", True), ("sampled", False)):
        rounds = emitted = 0
        for k, p in enumerate(prompts.read(c.prompts)):
            session = engine.session(seed=k) if not greedy else engine.session(greedy=True)
            session.generate_ids([256, *p], 12)
            rounds += session.stats["rounds"]
            emitted += session.stats["tokens_emitted"]
        d = found[mode]  # type: ignore[literal-required]
        assert (d["rounds"], d["emitted"], sum(d["accepted_drafts"])) == (rounds, emitted, rounds)
        assert d["bytes_per_round"]["value"] == pytest.approx(emitted / rounds)
        assert len(d["accepted_drafts"]) == 3
        ms = d["ms_per_round"]["value"]
        assert d["bytes_per_second"] == pytest.approx(1e3 * emitted / rounds / ms)
    assert found["sameness"] == {"identical": 3, "near_ties": 0, "different": 0}
    assert set(found["graph_ms"]) == {"decode", "verify", "step_greedy", "step", "draft"}


def test_own_heads_and_adapted_layers(config: Make, tmp_path: Path) -> None:
    """Heads that come with an EvaByte, at a smaller window; a head with adapters on one layer."""
    how: dict[str, Any] = {"max_seq": 64, "chunk": 8, "queries": ["draft"], "validate": False}
    for kind in ("evabyte", "lora"):
        (tmp_path / kind).mkdir()
        verifiers.bundle(kind, tmp_path / kind, **how)
    own = config(tmp_path / "a", verifier=str(tmp_path / "evabyte" / "model"), heads=[],
                 own_heads=True, grid={"n": [3]})  # fmt: skip
    r = explore(own)
    assert [x["error"] for x in r["points"]] == [None]
    assert (names(r["points"]), r["points"][0]["status"]) == (["own-heads n=3"], "ok")
    assert r["commands"]["own-heads n=3"].startswith("pcc compile --verifier")
    more: dict[str, Any] = {
        "verifier": str(tmp_path / "lora" / "model"),
        "heads": [str(tmp_path / "lora" / "head")],
    }
    r = explore(config(tmp_path / "b", grid={"n": [4], "lora_layers": [1]}, **more))
    assert [(x["point"]["lora_layers"], x["status"]) for x in r["points"]] == [(1, "ok")]
    with pytest.raises(PccError, match="G102"):
        explore(config(tmp_path / "b", grid={"n": [4], "lora_layers": [0]}, **more))


# ---------------------------------------------------------------- resuming


def test_finished_points_are_not_measured_again(
    config: Make, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lines_of(copy)
    monkeypatch.setattr(running, "compile_point", lambda *_: pytest.fail("measured again"))
    r = explore(config(copy))
    assert lines_of(copy) == before
    assert names(r["points"]) == NAMES


def test_keys_follow_contents_not_names(
    ground: Path, setting: Setting, config: Make, copy: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same files elsewhere are the same points; other bytes in any of them are others."""
    moved = tmp_path / "moved"
    shutil.copytree(ground / "model", moved / "model")
    shutil.copytree(ground / "heads" / "cp4", moved / "renamed")
    shutil.copy(ground / "prompts.txt", moved / "p")
    asked: list[str] = []

    def fails(*args: Any) -> float:
        asked.append(args[1].name)
        raise PccError("T1", "not now")

    monkeypatch.setattr(running, "compile_point", fails)
    same: dict[str, Any] = {
        "verifier": str(moved / "model"), "heads": [str(moved / "renamed")],
        "prompts": {"path": str(moved / "p"), "limit": 3}, "target": {"max_ms_per_round": 9.0},
    }  # fmt: skip
    r = explore(config(copy, **same))
    assert (asked, names(r["points"])) == ([], ["renamed n=3", "renamed n=4"])
    assert set(r["commands"]) == {"renamed n=3", "renamed n=4"}
    measure = setting(copy)["measure"]
    for change in (
        {"prompts": {"path": str(moved / "p"), "limit": 2}}, {"measure": measure | {"tokens": 11}},
        {"measure": measure | {"temperature": 0.5}},
    ):  # fmt: skip
        explore(config(copy, **(same | change)))
        assert asked == ["renamed n=3", "renamed n=4"]
        asked.clear()
    for file in (moved / "renamed" / "config.yaml", moved / "model" / "config.json"):
        file.write_text(file.read_text() + "\n")
        explore(config(copy, **same))
        assert asked == ["renamed n=3", "renamed n=4"], file
        asked.clear()


def test_a_killed_run_goes_on(setting: Setting, config: Make, tmp_path: Path) -> None:
    """SIGKILL after the first point, a line cut in half, bundles left behind: nothing is lost."""
    out = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(setting(out, grid={"n": [4]})))
    words = [sys.executable, "-P", "-m", "pcc.cli", "explore", str(tmp_path / "c.yaml"), "--quiet"]
    running_now = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    results = out / "results.jsonl"
    while time.monotonic() < end:  # the file exists a moment before its first line is whole
        if results.exists() and b"\n" in results.read_bytes():
            break
        time.sleep(0.01)
    running_now.kill()
    assert running_now.wait() == -signal.SIGKILL
    first = lines_of(out)
    assert len(first) == 1
    with (out / "results.jsonl").open("ab") as f:
        f.write(first[0][:200])
    (out / ".work" / "left.pcc").mkdir(parents=True, exist_ok=True)
    r = explore(config(out, grid={"n": [4]}))
    assert (names(r["points"]), r["complete"]) == ([NAMES[1], NAMES[3]], True)
    assert lines_of(out)[0] == first[0]
    assert len(Results(out / "results.jsonl").lines) == 2
    assert not (out / ".work").exists()


def test_an_interruption_leaves_a_report(config: Make, tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text.startswith("2 of 4"):
            raise KeyboardInterrupt

    c = config(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        explore(c, progress=stop)
    r = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (names(r["points"]), r["complete"]) == (NAMES[:1], False)
    assert "Interrupted" in (tmp_path / "out" / "index.html").read_text()


# ---------------------------------------------------------------- failures


def test_failed_points_are_recorded_and_lose_no_other(
    ground: Path, setting: Setting, config: Make, tmp_path: Path
) -> None:
    """An unknown precision, a head cut short, and one of another width, beside a good head."""
    shutil.copytree(ground / "heads" / "cp4", tmp_path / "cut")
    file = tmp_path / "cut" / "model@1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    heads = [str(tmp_path / "cut"), str(ground / "heads" / "ff4"), str(tmp_path / "nowhere")]
    grid = {"n": [4], "precision": ["int3", "fp32"]}
    c = config(tmp_path / "out", heads=heads, grid=grid)
    r = explore(c)
    found = {x["point"]["name"]: (x["status"], (x["error"] or {"code": ""})["code"])
             for x in r["points"]}  # fmt: skip
    assert found == {
        "cut n=0": ("failed", "F104"), "nowhere n=0": ("failed", "E140"),
        "ff4 n=4 int3": ("failed", "E141"), "ff4 n=4": ("ok", ""),
    }  # fmt: skip
    best = r["modes"]["greedy"]["best"]
    assert best is not None
    before = len(lines_of(tmp_path / "out"))
    explore(c)  # failed points are tried again, the others are not
    assert len(lines_of(tmp_path / "out")) == before + 3


def test_any_exception_at_a_point_is_recorded(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(running, "compile_point", broken)
    r = explore(config(tmp_path / "out"))
    assert {(x["error"] or {})["code"] for x in r["points"]} == {"G190"}  # type: ignore[typeddict-item]
    assert all("a bug" in x["error"]["what"] for x in r["points"] if x["error"])


def test_another_greedy_text_is_on_no_front(
    config: Make, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Autoregressive.generate

    def other(self: Autoregressive, prompt: Any, count: int) -> tuple[list[int], list[float]]:
        out, margins = real(self, prompt, count)
        out[-1], margins[-1] = (out[-1] + 1) % 258, 1.0
        return out, margins

    monkeypatch.setattr(Autoregressive, "generate", other)
    c = config(tmp_path / "out", heads=[str(ground / "heads" / "ff4")], grid={"n": [4]})
    r = explore(c)
    assert [x["status"] for x in r["points"]] == ["different"]
    figures = r["points"][0]["figures"]
    assert figures is not None
    assert figures["sameness"]["different"] == 3
    assert r["modes"]["greedy"]["front"] == ["autoregressive"]


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("G103", {"heads": ["nowhere/*"]}), ("M101", {"verifier": "nowhere"}),
        ("G106", {"prompts": {"path": "nowhere"}}), ("G102", {"grid": {"architecture": ["hmm"]}}),
        ("X202", {"measure": {"provider": "cuda"}}),
    ],
)  # fmt: skip
def test_explorations_that_cannot_start(
    config: Make, tmp_path: Path, code: str, more: dict[str, Any]
) -> None:
    if code == "X202":
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has the provider")
    with pytest.raises(PccError) as caught:
        explore(config(tmp_path / "out", **more))
    assert caught.value.code == code


def test_heads_that_nobody_gave_are_named(config: Make, copy: Path) -> None:
    r = explore(config(copy, grid={"architecture": ["cp", "hmm"], "n": [3, 4], "r": [2]}))
    assert names(r["points"]) == NAMES[:2]
    assert r["missing"] == ["hmm-n3-r2", "hmm-n4-r2"]


# ---------------------------------------------------------------- training


def test_missing_heads_are_trained(config: Make, ground: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    train = {
        "folder": str(tmp_path / "trained"), "data": {"paths": [str(tmp_path / "text")],
        "length": 32}, "optim": {"steps": 2, "batch": 2, "warmup": 1}, "run": {"device": "cpu"},
    }  # fmt: skip
    grid = {"architecture": ["cp"], "n": [3, 4], "r": [2, 3]}
    heads = [str(ground / "heads" / "cp4")]
    c = config(tmp_path / "out", heads=heads, grid=grid, train=train)
    r = explore(c)
    assert [x["error"] for x in r["points"]] == [None] * 4
    assert names(r["points"]) == [*NAMES[:2], "cp-n4-r3 n=3", "cp-n4-r3 n=4"]
    assert [x["point"]["r"] for x in r["points"]] == [2, 2, 3, 3]
    made = next((tmp_path / "trained" / "cp-n4-r3").glob("model@*"))
    stamp = made.stat().st_mtime_ns
    assert names(explore(c)["points"]) == names(r["points"])
    assert made.stat().st_mtime_ns == stamp  # nor is a whole head trained again
    assert torch.is_grad_enabled()
    bad = config(tmp_path / "out", heads=heads, grid=grid, train={
        **train, "folder": str(tmp_path / "other"), "data": {"paths": [str(tmp_path / "none")]},
    })  # fmt: skip
    lines = explore(bad)["points"]
    assert [x["status"] for x in lines] == ["ok", "ok", "failed"]
    assert (lines[-1]["point"]["head"], bool(lines[-1]["error"])) == ("cp-n4-r3", True)


# ---------------------------------------------------------------- command line


def test_command(command: Command, setting: Setting, copy: Path, tmp_path: Path) -> None:
    raw = setting(copy, target={"max_ms_per_round": 1e-6})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    got = command("explore", tmp_path / "c.yaml", "--plot", tmp_path / "p.svg")
    assert got.code == 0
    for word in (*NAMES, "autoregressive", "greedy", "sampled", "best: ", "index.html"):
        assert word in got.out
    assert "no point takes at most 1e-06 ms per round" in got.out
    assert "measured before" in got.err
    assert (tmp_path / "p.svg").read_text().rstrip().endswith("</svg>")
    quiet = command("explore", tmp_path / "c.yaml", "--json", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert conforms(quiet.json, Report)
    there = tmp_path / "there"
    shutil.copytree(copy, there)
    assert command("explore", tmp_path / "c.yaml", "-o", there, "--json").code == 0
    assert json.loads((there / "report.json").read_text())["complete"]


def test_command_refuses(command: Command, setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(setting(tmp_path / "out", heads=["no/*"])))
    (tmp_path / "d.yaml").write_text("grid: [1")
    arena = Arena(tmp_path, command)
    arena.refuses("F102", "explore", tmp_path / "d.yaml")
    arena.refuses("F102", "explore", tmp_path / "none.yaml")
    arena.refuses("C133", "explore", tmp_path / "c.yaml", "--plot", tmp_path / "p.pdf")
    got = command("explore", tmp_path / "c.yaml", "--quiet")
    assert (got.code, got.out) == (2, "")
    assert "error[G103]: no head has such a name (help: " in got.err


def test_terminals_get_no_control_characters(
    command: Command, ground: Path, setting: Setting, tmp_path: Path
) -> None:
    hostile = tmp_path / "a\x1b[2J<b>$x$"
    shutil.copytree(ground / "heads" / "ff4", hostile)
    raw = setting(tmp_path / "out", heads=[str(hostile)], grid={"n": [4]})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    got = command("explore", tmp_path / "c.yaml", "--plot", tmp_path / "p.png")
    assert got.code == 0
    assert "a?[2J<b>$x$ n=4" in got.out
    assert "\x1b" not in got.out + got.err
    assert "<b>" not in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(json.loads((tmp_path / "out" / "report.json").read_text())["drift"])
