"""Every command: data on stdout, the rest on stderr, exit codes 0, 1, 2, 3, help."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shipped import JOINT, PCIR, Outcome, rewrite_manifest, small

import pcc
import pcc.environment

Call = Callable[..., Outcome]
COMMANDS = ("compile", "inspect", "verify", "opt", "doctor", "query")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "two.pcir"
    path.write_text(PCIR)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pcc.compile(small(), out=tmp_path_factory.mktemp("cli") / "small.pcc").path


@pytest.mark.wheel
def test_compile_inspect_query_in_their_own_processes(tmp_path: Path) -> None:
    """The whole way, as a user goes it."""
    (tmp_path / "two.pcir").write_text(PCIR)
    np.savez(tmp_path / "data.npz", x=np.array([[0, 2], [1, 0], [1, 2]]))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        done = [sys.executable, "-P", "-m", "pcc.cli", *args]
        return subprocess.run(done, cwd=tmp_path, capture_output=True, text=True)

    made = run("compile", "two.pcir", "-o", "two.pcc", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    manifest = json.loads(made.stdout)
    assert (manifest["circuit"]["n"], manifest["path"]) == (2, "two.pcc")
    asked = run("query", "two.pcc", "loglik", "--input", "data.npz")
    assert asked.returncode == 0
    got = json.loads(asked.stdout)["log_prob"]
    np.testing.assert_allclose(got, np.log(JOINT[[0, 1, 1], [2, 0, 2]]), atol=1e-6)
    bad = run("compile", "nowhere")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("nowhere: error[E140]: ")
    assert bad.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "two.pcc", "two.pcir"]


def test_help(command: Call) -> None:
    whole = command("-h")
    assert whole.code == 0
    for name in COMMANDS:
        assert name in whole.out
        for flag in ("-h", "--help"):
            shown = command(name, flag)
            assert shown.code == 0
            assert "Usage: pcc " + name in shown.out
            assert shown.err == ""
    assert command().code == 2  # no command: the help, but bad usage


def test_version(command: Call) -> None:
    assert command("--version").out == f"pcc {pcc.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ("fly",),
        ("compile",),
        ("compile", "a", "--opset", "new"),
        ("query", "a.pcc", "prefix"),
        ("inspect", "a.pcc", "--loud"),
        ("verify", "a.pcc", "--seed", "-1"),
        ("compile", "a", "--hmm-bias", "b=1", "--hmm-bias", "c"),
        ("inspect", "a.pcc", "--\x1b[31mloud"),
    ],
)
def test_bad_usage_is_exit_2(command: Call, args: tuple[str, ...]) -> None:
    done = command(*args)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error\[(C100|E140)\]: .*\(help: .*\)\n", done.err)


def test_compile_prints_what_was_compiled(command: Call, source: Path, tmp_path: Path) -> None:
    done = command("compile", source, "-o", tmp_path / "a.pcc")
    assert done.code == 0
    assert done.err == ""  # progress is for terminals
    for word in ("'two'", "n=2", "MB of graphs", "to-tensor", "conditionals", "compiled in"):
        assert word in done.out


def test_progress_goes_to_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcc.cli import output

    said: list[str] = []
    monkeypatch.setattr(output, "say", said.append)
    output.progress("unseen")
    monkeypatch.setattr(output.sys, "stderr", _Terminal())
    output.progress("at work")
    assert said == ["pcc: at work"]


class _Terminal:
    def isatty(self) -> bool:
        return True


def test_compile_options(command: Call, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pcc"
    args = ("compile", source, "-o", out, "--json")
    made = command(*args, "--query", "prefix", "--query", "mode", "--opset", 17).json
    assert list(made["queries"]) == ["prefix", "mode"]
    assert made["opset"] == 17
    again = command(*args)
    assert (again.code, "error[B201]" in again.err) == (2, True)
    assert set(command(*args, "--force").json["queries"]) >= {"loglik", "sample", "draft"}
    narrow = command("compile", source, "-o", tmp_path / "b.pcc", "--window", 1, "--json").json
    assert narrow["circuit"]["n"] == 1
    assert "at least two variables" in narrow["unsupported"]["draft"]
    for asked, says in (("both", "head, verifier, all"), ("head", "leave int8 out")):
        refused = command("compile", source, "-o", tmp_path / "c.pcc", "--int8", asked)
        assert (refused.code, "error[E141]" in refused.err, says in refused.err) == (2, True, True)


def test_inspect(command: Call, bundle: Path) -> None:
    assert command("inspect", bundle, "--json").json["circuit"]["kind"] == "cp"
    assert "n=3 r=2 V=4" in command("inspect", bundle).out
    text = command("inspect", bundle, "--ir", "circuit").out
    assert text.startswith("circuit @cp-n3-r2 {cards=[4 4 4]} {\n")
    assert command("inspect", bundle, "--ir", "circuit", "--json").json["text"] == text
    tensors = command("inspect", bundle, "--ir", "tensor-prefix").out
    assert " c." not in tensors
    assert " t." in tensors
    wrong = command("inspect", bundle, "--ir", "assembly")
    assert (wrong.code, wrong.out) == (2, "")
    assert "error[C101]" in wrong.err
    assert "optimised" in wrong.err


def test_verify_agrees_and_finds_a_difference(
    command: Call, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("verify", bundle)
    assert done.code == 0
    assert "agrees" in done.out
    report = command("verify", bundle, "--json", "--seed", 4).json
    assert report["ok"]
    assert {c["query"] for c in report["checks"]} == set(pcc.load(bundle).queries)

    # A bundle with one changed weight and an honest manifest: only the numbers can tell.
    import shutil

    from pcc.bundle import sha256

    bad = tmp_path / "bad.pcc"
    shutil.copytree(bundle, bad)
    graph = bad / "graphs" / "loglik.onnx"
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph)
    tensor = max(
        (t for t in model.graph.initializer if t.data_type == 1 and not t.external_data),
        key=lambda t: len(t.raw_data),
    )
    value = numpy_helper.to_array(tensor).copy()
    value.flat[0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    graph.write_bytes(model.SerializeToString())
    files = json.loads((bad / "manifest.json").read_text())["files"]
    rewrite_manifest(bad, files=files | {"graphs/loglik.onnx": sha256(graph)})
    found = command("verify", bad)
    assert found.code == 1
    assert "DIFFERS" in found.out
    report = command("verify", bad, "--json")
    assert report.code == 1
    assert {c["query"] for c in report.json["checks"] if not c["ok"]} == {"loglik"}


def test_query(command: Call, bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.integers(0, 4, (2, 3)), "context": rng.normal(size=(1, 5))}
    np.savez(tmp_path / "in.npz", **inputs)
    want = pcc.load(bundle).run("prefix", **inputs)["log_cond"]
    args = ("query", bundle, "prefix", "--input", tmp_path / "in.npz")
    np.testing.assert_allclose(command(*args).json["log_cond"], want, rtol=1e-6)
    out = tmp_path / "out.npz"
    done = command(*args, "-o", out, "--threads", 1)
    assert (done.code, done.out) == (0, "")
    assert "log_cond [2, 3]" in done.err
    np.testing.assert_allclose(np.load(out)["log_cond"], want, rtol=1e-6)
    assert "error[C112]" in command(*args, "-o", out).err
    assert command(*args, "-o", out, "--force").code == 0


def test_minus_infinity_is_null_in_json(command: Call, source: Path, tmp_path: Path) -> None:
    source.write_text(PCIR.replace("0.25 0.75 0.5 0.5)}", "0 1 0 1)}"))
    assert command("compile", source, "-o", tmp_path / "a.pcc").code == 0
    np.savez(tmp_path / "in.npz", x=np.array([[0, 1]]))
    done = command("query", tmp_path / "a.pcc", "loglik", "--input", tmp_path / "in.npz")
    assert done.json == {"log_prob": [None]}


def test_opt(command: Call, source: Path, tmp_path: Path) -> None:
    dumps, out = tmp_path / "dumps", tmp_path / "out.pcir"
    same = command("opt", source, "-p", "dce")
    assert (same.code, same.out) == (0, PCIR)
    done = command(
        "opt", source, "-p", "canonicalize,fuse-cpt,dce", "--dump-after-change", dumps,
        "--time-passes", "--explain", "fuse-cpt", "-o", out,
    )  # fmt: skip
    assert (done.code, done.out) == (0, "")
    assert "c.cpt" in out.read_text()
    assert [p.name for p in sorted(dumps.iterdir())] == ["01-fuse-cpt.pcir"]
    assert "fuse-cpt: did " in done.err
    assert "unchanged" in done.err
    assert "7 -> 6 nodes" in done.err
    stopped = command("opt", source, "-p", "canonicalize,fuse-cpt", "--stop-after", "canonicalize")
    assert stopped.out == PCIR
    assert command("opt", source).code == 0  # the default pipeline


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("-p", "fold-everything"), "E320"),
        (("-p", "fold-leaf-sums{grow=much}"), "E320"),
        (("-p", "fold-leaf-sums{grow=-5}"), "E320"),
        (("-p", "fold-leaf-sums{grow=0}"), "E320"),
        (("-p", "numerics{low=nan}"), "E320"),
        (("-p", "fold-layers,fold-leaf-sums"), "E322"),
        (("-p", "dce", "-o", "EXISTING"), "C112"),
        (("-p", "dce{"), "E321"),
        (("-p", "dce", "--stop-after", "canonicalize"), "C102"),
        (("-p", "dce", "--explain", "canonicalize"), "C102"),
    ],
)
def test_opt_refuses(command: Call, source: Path, args: tuple[str, ...], code: str) -> None:
    text = source.read_bytes()
    done = command("opt", source, *(source if a == "EXISTING" else a for a in args))
    assert (done.code, done.out) == (2, "")
    assert f"error[{code}]" in done.err
    assert source.read_bytes() == text


def test_opt_in_any_order_and_over_a_file(command: Call, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pcir"
    out.write_text("old")
    pipeline = ("-p", "fold-layers,fold-leaf-sums")
    assert "folded tables stack" in command("opt", source, *pipeline).err
    done = command("opt", source, *pipeline, "--any-order", "-o", out, "--force")
    assert (done.code, done.err) == (0, "")
    assert out.read_text().startswith("circuit")


def test_opt_replaces_no_arrays(command: Call, source: Path, tmp_path: Path) -> None:
    """Arrays of another text may lie beside the output, under its name."""
    (tmp_path / "out.safetensors").write_text("precious")
    done = command("opt", source, "-p", "dce", "-o", tmp_path / "out.pcir")
    assert (done.code, "error[C112]" in done.err) == (2, True)


def test_doctor(command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("doctor")
    assert done.code == 0
    parts = {f["name"]: f for f in command("doctor", "--json").json}
    assert parts["numpy"]["version"] == np.__version__
    assert parts["onnxruntime"]["state"] == "ok"
    seen = pcc.environment.installed
    lacking = {"onnxruntime": "", "onnxruntime-gpu": ""}
    monkeypatch.setattr(pcc.environment, "installed", lambda n: lacking.get(n, seen(n)))
    done = command("doctor")
    assert done.code == 3
    assert "pip install 'pcc[cpu]'" in done.out
    both = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(pcc.environment, "installed", lambda n: both.get(n, seen(n)))
    done = command("doctor")
    assert done.code == 3
    assert "never both" in done.out


def test_a_reader_that_leaves_is_no_difference(bundle: Path) -> None:
    """The program ends by the signal, silently, and not with 1."""
    args = [sys.executable, "-P", "-m", "pcc.cli", "inspect", str(bundle), "--json"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout is not None
        assert p.stderr is not None
        p.stdout.close()
        assert p.stderr.read() == b""
        assert p.wait() == -signal.SIGPIPE
