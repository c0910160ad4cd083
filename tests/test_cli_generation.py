"""`pcc run`, `pcc bench`, `pcc verify` and `pcc compile --verifier` as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from shipped import Arena, Command, rewrite_manifest

import pcc
from pcc import check_generation, knobs
from pcc.bundle import sha256
from pcc.check_generation import near_tie
from pcc.circuit import text
from pcc.frontends import templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
PROMPT = "def f("


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A verifier with a chat template, whose text may be any bytes."""
    folder = tmp_path_factory.mktemp("chat")
    engines.llama_folder(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    head = engines.head("cp", 4, 6)  # large enough for graphs of one row beside the others
    made = pcc.compile(
        head, verifier=folder / "model", out=folder / "m.pcc", queries=["draft"], max_seq=128,
        chunk=8, validate=False,
    )  # fmt: skip
    return pcc.load(made.path, threads=1)


def program(*args: object) -> subprocess.CompletedProcess[bytes]:
    whole = [sys.executable, "-P", "-m", "pcc.cli", *map(str, args)]
    return subprocess.run(whole, capture_output=True, check=False)


# ---------------------------------------------------------------- run


def test_run_writes_the_bytes_of_the_text(engine: Any) -> None:
    """Bytes that are no UTF-8 too; statistics and the memory go to stderr."""
    want = engine.session(seed=5).generate(PROMPT, 60)
    done = program("run", engine.path, "--prompt", PROMPT, "--max-new-bytes", 60, "--seed", 5,
                   "--stats")  # fmt: skip
    assert done.returncode == 0
    assert want.bytes.startswith(done.stdout)  # a character that the limit cuts is left out
    assert len(want.bytes) - len(done.stdout) <= 3
    lines = done.stderr.decode().splitlines()
    said = {a: b for a, b in (line.rsplit(None, 1) for line in lines if "[" not in line)}
    assert lines[0].startswith("memory beside weights, MB")
    megabytes = float(said["memory beside weights, MB"])
    assert megabytes == pytest.approx(engine.session().memory(7 + 60) / 1e6, rel=1e-3)
    assert int(said["rounds"]) == want.stats["rounds"]
    assert int(said["draft_tokens_accepted"]) == want.stats["draft_tokens_accepted"]
    assert "host_ms_per_round" in said


def test_run_prints_json(command: Command, engine: Any) -> None:
    args = ("run", engine.path, "--prompt", PROMPT, "--max-new-bytes", 30, "--json")
    first, again = command(*args, "--seed", 9).json, command(*args, "--seed", 9).json
    assert first["bytes"] == again["bytes"] != command(*args, "--seed", 10).json["bytes"]
    want = engine.session(seed=9).generate(PROMPT, 30, logprobs=True)
    assert (bytes(first["bytes"]), first["ids"]) == (want.bytes, want.ids)
    np.testing.assert_allclose(first["logprobs"], want.logprobs, rtol=1e-6)
    assert (first["reason"], len(first["logprobs"])) == ("length", len(first["ids"]))
    assert first["text"] == want.text
    greedy = command(*args, "--greedy").json
    assert greedy["bytes"] == command(*args, "--temperature", 0).json["bytes"]
    assert greedy["bytes"] == command(*args, "--top-k", 1, "--seed", 3).json["bytes"]


def test_run_stops(command: Command, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(PROMPT.encode())
    args = ("run", engine.path, "--prompt-file", tmp_path / "prompt", "--greedy", "--json")
    whole = bytes(command(*args).json["bytes"])
    at = next(i for i in range(2, 60) if whole[i] < 128 and whole[i] not in whole[:i])
    stop = chr(whole[at])
    done = command(*args, "--stop", "never there", "--stop", stop).json
    assert (bytes(done["bytes"]), done["reason"]) == (whole[:at], "stop")


def test_run_says_where_the_buffer_ends(command: Command, engine: Any) -> None:
    done = command("run", engine.path, "--prompt", PROMPT, "--max-new-bytes", 999, "--json")
    assert done.json["reason"] == "full"
    assert "buffer of 128 tokens is full" in done.err
    long = command("run", engine.path, "--prompt", "a" * 200, "--json")
    assert (long.code, long.out) == (2, "")
    assert "error[S121]: prompt 0 has 201 tokens, the engine holds 128" in long.err


def test_run_applies_the_chat_template(command: Command, engine: Any, tmp_path: Path) -> None:
    args = ("run", engine.path, "--max-new-bytes", 20, "--greedy", "--json", "--prompt")
    chat = command(*args, "hi", "--chat").json
    assert chat["bytes"] == command(*args, "<user>hi\n<model>").json["bytes"]
    # A template that does not begin with BOS: there is none.
    other = tmp_path / "other.pcc"
    shutil.copytree(engine.path, other)
    rewrite_manifest(other, generation__chat_template=TEMPLATE.removeprefix("{{ bos_token }}"))
    args = ("run", other, *args[2:])
    bare = command(*args, "hi", "--chat").json
    assert bare["bytes"] == command(*args, "<user>hi\n<model>", "--no-bos").json["bytes"]
    assert bare["bytes"] != chat["bytes"]


@pytest.mark.parametrize(
    ("template", "code"),
    [(None, "S150"), ("{{ 1 / 0 }}", "S151"), ("{{ messages.append(1) }}", "S151"), ("{%", "S151"),
     ("{{ ''.__class__.__mro__ }}", "S151")],
)  # fmt: skip
def test_chat_templates_that_are_refused(
    command: Command, engine: Any, tmp_path: Path, template: str | None, code: str
) -> None:
    other = tmp_path / "other.pcc"
    shutil.copytree(engine.path, other)
    rewrite_manifest(other, generation__chat_template=template)
    Arena(tmp_path, command).refuses(code, "run", other, "--prompt", "hi", "--chat")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), "C130"),
        (("--prompt", "a", "--prompt-file", "b"), "C130"),
        (("--prompt-file", "nowhere"), "C131"),
        (("--prompt", "a", "--temperature", "-1"), "S102"),
        (("--prompt", "a", "--top-p", "nan"), "S102"),
        (("--prompt", "a", "--stop", ""), "S104"),
        (("--prompt", "a", "--top-k", "100000000000000000000"), "S102"),
        (("--prompt", "", "--no-bos"), "S106"),
    ],
)
def test_run_refuses(command: Command, engine: Any, args: tuple[str, ...], code: str) -> None:
    Arena(engine.path, command).refuses(code, "run", engine.path, *args)


def test_run_needs_a_verifier(command: Command, tmp_path: Path) -> None:
    pcc.compile(engines.head("cp", 3, 2), out=tmp_path / "m.pcc", queries=["loglik"])
    Arena(tmp_path, command).refuses("R110", "run", tmp_path / "m.pcc", "--prompt", "a")


# ---------------------------------------------------------------- bench, verify


def altered(bundle: Path, out: Path, graph: str) -> Path:
    """A bundle whose graph scales its first layer's input otherwise, with an honest manifest."""
    shutil.copytree(bundle, out)
    path = out / "graphs" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    norm = next(
        t for t in model.graph.initializer
        if list(t.dims) == [engines.WIDTH] and t.data_type == 1 and not t.external_data
    )  # fmt: skip
    value = numpy_helper.to_array(norm).copy()
    value[::2] *= -1.5
    norm.CopyFrom(numpy_helper.from_array(value, norm.name))
    path.write_bytes(model.SerializeToString())
    files = json.loads((out / "manifest.json").read_text())["files"]
    rewrite_manifest(out, files=files | {f"graphs/{graph}.onnx": sha256(path)})
    return out


def test_bench(command: Command, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"one\n\ntwo two\n\xff\xfe\n")
    args = ("bench", engine.path, "--prompts", tmp_path / "prompts.txt", "--repeats", 5,
            "--max-new-tokens", 20)  # fmt: skip
    done = command(*args, "--plot", tmp_path / "plot.svg")
    assert done.code == 0
    for word in (
        "3/3 identical",
        "verify only",
        "speculative, sampled",
        "break-even",
        "step_greedy",
        "host time",
    ):
        assert word in done.out
    assert (tmp_path / "plot.svg").read_text().rstrip().endswith("</svg>")
    report = command(*args, "--limit", 2, "--json").json
    assert (report["prompts"], report["greedy"]["identical"]) == (2, 2)
    stats = report["greedy"]["stats"]
    seconds = stats["rounds"] * report["graphs"]["verify"]["p50_ms"] / 1e3
    bound = report["verify_only"]["bytes_per_second"]
    assert bound == pytest.approx(stats["tokens_emitted"] / seconds)
    assert sum(stats["acceptance_length_histogram"]) == stats["rounds"]
    assert report["greedy"]["bytes_per_round"] == stats["tokens_emitted"] / stats["rounds"]
    assert set(report["graphs"]) >= {"decode", "verify", "step", "step_greedy", "draft"}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("a\nb")
    assert command("bench", engine.path, "--prompts", folder, *args[4:], "--json").code == 0


def test_bench_and_verify_find_another_text(command: Command, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    bad = altered(engine.path, tmp_path / "bad.pcc", "decode")
    done = command("bench", bad, "--prompts", tmp_path / "prompts.txt", "--repeats", 5,
                   "--max-new-tokens", 40)  # fmt: skip
    assert done.code == 1
    assert "DIFFERENT TEXT" in done.out
    report = command("verify", bad, "--json")
    assert report.code == 1
    wrong = [c for c in report.json["checks"] if not c["ok"]]
    assert [c["query"] for c in wrong] == ["step_greedy"]
    assert "greedy text" in wrong[0]["what"]


@pytest.mark.parametrize(
    ("prompts", "args", "code"),
    [(b"\n\n", (), "C132"), (b"a" * 300, (), "S121"), (b"a", ("--plot", "x.pdf"), "C133")],
)
def test_bench_refuses(
    command: Command, engine: Any, tmp_path: Path, prompts: bytes, args: tuple[str, ...], code: str
) -> None:
    (tmp_path / "p").write_bytes(prompts)
    Arena(tmp_path, command).refuses(
        code, "bench", engine.path, "--prompts", tmp_path / "p", "--repeats", 5,
        "--max-new-tokens", 4, *args,
    )  # fmt: skip


@pytest.mark.parametrize(("plot", "code"), [("x.pdf", "C133"), ("nowhere/x.svg", "C134")])
def test_bench_refuses_a_plot_before_it_measures(
    command: Command, engine: Any, tmp_path: Path, plot: str, code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured first")

    (tmp_path / "p").write_text("one\n")
    monkeypatch.setattr("pcc.cli.generation.measure", measured)
    args = ("bench", engine.path, "--prompts", tmp_path / "p", "--plot", tmp_path / plot)
    Arena(tmp_path, command).refuses(code, *args)


@pytest.mark.parametrize("most", [60, 7])
def test_an_interruption_loses_nothing(
    engine: Any, most: int, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    """What was decided is written, up to what was asked for."""
    from pcc.cli.generation import _stream
    from pcc.runtime.rounds import Rounds

    session, rounds, step = engine.session(seed=5), [0], Rounds.step

    def interrupted(self: Rounds) -> Any:
        rounds[0] += 1
        if rounds[0] > 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Rounds, "step", interrupted)
    # Any byte may begin this stop string, so that all of them are withheld at some time.
    _stream(session, PROMPT.encode(), most, [bytes(range(256)) * 2], bos=True)
    decided = bytes(session.rows[0].text)
    written = capfdbinary.readouterr().out
    assert written == decided[:most]


def test_verify_says_the_verdict_first(command: Command, engine: Any) -> None:
    """States that agree are one line for each graph; --json has all of them."""
    checks = command("verify", engine.path, "--json").json["checks"]
    lines = command("verify", engine.path).out.splitlines()
    said = f"agrees, {len(checks)} of {len(checks)} checks are within bounds"
    assert lines[0].endswith(said)
    assert sum("states" in line and line.endswith("ok") for line in lines) >= 5
    assert not [line for line in lines if " present." in line]
    states = sum(c["what"].startswith("present.") for c in checks)
    counts = [int(line.split()[1]) for line in lines if " states" in line]
    assert sum(counts) == states
    assert len(lines) == 2 + len(checks) - states + len(counts)


def test_verify_shows_what_differs_first(command: Command, engine: Any, tmp_path: Path) -> None:
    bad = altered(engine.path, tmp_path / "bad.pcc", "step")
    lines = command("verify", bad).out.splitlines()
    assert "DIFFERS, " in lines[0]
    wrong = [line.endswith("DIFFERS") for line in lines[2:]]
    assert any(wrong)
    assert wrong == sorted(wrong, reverse=True)


def test_verify_compares_every_graph(command: Command, engine: Any, tmp_path: Path) -> None:
    checks = command("verify", engine.path, "--json").json["checks"]
    assert all(c["ok"] for c in checks)
    want = {"verify", "prefill", "prefill_greedy", "step", "step_greedy", "draft"}
    assert {c["query"] for c in checks} == want
    for graph in ("step", "step.one"):  # both graphs of a query are checked
        bad = altered(engine.path, tmp_path / f"{graph}.pcc", graph)
        report = command("verify", bad, "--json")
        assert report.code == 1
        wrong = [c for c in report.json["checks"] if not c["ok"]]
        assert {c["query"] for c in wrong} == {"step"}
        assert {"any number" in c["what"] for c in wrong} == {graph == "step"}


@pytest.mark.parametrize(("margin", "ok"), [(knobs.LOGIT_TIES["f32"] / 2, True), (0.1, False)])
def test_near_ties_are_reported(
    engine: Any, monkeypatch: pytest.MonkeyPatch, margin: float, ok: bool
) -> None:
    """The reference decides otherwise at one token: a tie by its margin, or a difference."""
    real = check_generation.run

    def other(roots: Any, inputs: Any, semiring: Any) -> list[Any]:
        values = [np.array(v) for v in real(roots, inputs, semiring)]
        if "window" in inputs and "u" not in inputs:
            names = [n for n, _ in step.outputs]
            emitted, margins = (values[names.index(n)] for n in ("emitted", "margin"))
            emitted[0, 0] = (emitted[0, 0] + 1) % 258
            margins[0, 0] = margin
        return values

    step = check_generation.Stages(engine.path, engine.manifest["files"]).module(
        "tensor-step_greedy"
    )
    monkeypatch.setattr(check_generation, "run", other)
    report = pcc.verify(engine.path)
    assert report.ok == ok
    found = [c for c in report.checks if "near-tie" in c.what]
    assert [c.query for c in found] == (["step_greedy"] * 2 if ok else [])  # both of its graphs
    assert all(c.query == "step_greedy" for c in report.checks if not c.ok)


def test_which_margin_decides() -> None:
    want = {"emitted": np.array([[3, 5, -1]]), "margin": np.array([[0.5, 1e-7, 0.4]])}
    assert near_tie(want, want) is None
    assert near_tie(want, {"emitted": np.array([[4, 5, -1]])}) is None
    late = {"emitted": np.array([[3, 6, -1]])}
    assert near_tie(want, late) == 1e-7
    wide = {**want, "margin": np.array([[0.5, 0.04, 0.4]])}
    assert [near_tie(wide, late, stored=s) for s in ("f32", "f16", "bf16")] == [None, 0.04, 0.04]


# ---------------------------------------------------------------- compile


def broken(folder: Path, fault: str) -> tuple[object, ...]:
    """Write a head and a model folder with one fault; return what `pcc compile` is given."""
    model = engines.llama_folder(folder / "model")
    head = templates.cp(
        3, 2, 30 if fault == "vocabulary" else 258,
        context=32 if fault == "width" else engines.WIDTH, seed=1,
    )  # fmt: skip
    text.save(head.module(), folder / "head.pcir")
    config = json.loads((model / "config.json").read_text())
    weights = model / "model.safetensors"
    if fault == "shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    elif fault == "hidden size":
        (model / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "no heads":
        return ("--verifier", model)
    elif fault == "no folder":
        return (folder / "head.pcir", "--verifier", folder / "nowhere")
    elif fault == "no source":
        return ()
    elif fault == "length":
        return (folder / "head.pcir", "--verifier", model, "--max-seq", 0)
    return (folder / "head.pcir", "--verifier", model)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("shard", "M103"), ("hidden size", "M105"), ("cut", "F104"), ("vocabulary", "M145"),
        ("width", "M147"), ("no heads", "M153"), ("no folder", "M101"), ("no source", "E140"),
        ("length", "M150"),
    ],
)  # fmt: skip
def test_compile_refuses_a_verifier(
    command: Command, tmp_path: Path, fault: str, code: str
) -> None:
    """One line, exit code 2, and nothing is left behind."""
    args = broken(tmp_path, fault)
    Arena(tmp_path, command).refuses(code, "compile", *args, "-o", tmp_path / "m.pcc")


def test_compile_with_a_verifier(command: Command, tmp_path: Path) -> None:
    args = broken(tmp_path, "none")
    done = command("compile", *args, "-o", tmp_path / "m.pcc", "--max-seq", 64, "--chunk", 8,
                   "--query", "draft", "--no-validate", "--json")  # fmt: skip
    assert done.code == 0
    made = done.json
    assert (made["generation"]["max_seq"], made["generation"]["n"]) == (64, 3)
    assert made["verifier"]["kind"] == "Decoder"
    assert set(made["queries"]) >= {"step", "step_greedy", "prefill", "verify", "decode", "draft"}
    ran = command("run", tmp_path / "m.pcc", "--prompt", "a", "--max-new-bytes", 9, "--json").json
    assert len(ran["bytes"]) == 9
