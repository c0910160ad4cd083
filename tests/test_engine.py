"""The engine: defaults, ranges, providers, threads; it needs no part of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipped import JOINT, PCIR, refused, small

import pcc
from pcc.errors import PccError
from pcc.runtime import ort


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pcc.compile(small(), out=tmp_path_factory.mktemp("engine") / "small.pcc").path


@pytest.mark.wheel
def test_the_engine_needs_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "two.pcir").write_text(PCIR)
    pcc.compile(tmp_path / "two.pcir", out=tmp_path / "two.pcc")
    code = """
import sys, numpy as np, pcc
engine = pcc.load("two.pcc", threads=1)
print(engine.run("loglik", x=np.array([[1, 2]]))["log_prob"][0])
parts = ("passes", "driver", "frontends", "backends", "models", "train", "cli")
bad = [m for m in sys.modules if m.split(".")[:1] == ["pcc"] and m.split(".")[1:2] != []
       and m.split(".")[1] in parts]
sys.exit(", ".join(bad + [m for m in ("onnx", "onnx_ir", "torch", "sympy")
    if m in sys.modules]) or 0)
"""
    run = [sys.executable, "-P", "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(np.log(JOINT[1, 2]), abs=1e-6)


def test_defaults_and_broadcast(made: Path) -> None:
    engine = pcc.load(made)
    rng = np.random.default_rng(1)
    x, context = rng.integers(0, 4, (4, 3)), rng.normal(size=(1, 5)).astype(np.float32)
    full = engine.run("prefix", x=x, context=np.repeat(context, 4, 0))["log_cond"]
    np.testing.assert_allclose(engine.run("prefix", x=x, context=context)["log_cond"], full, 1e-5)
    total = engine.run("marginal", context=np.repeat(context, 2, 0))["log_prob"]
    np.testing.assert_allclose(total, [0, 0], atol=1e-6)  # nothing observed
    want = engine.run("loglik", x=np.zeros((1, 3), np.int64), context=context)["log_prob"]
    np.testing.assert_array_equal(engine.run("loglik", context=context)["log_prob"], want)
    wide = {"x": x.astype(np.uint8), "context": context.astype(np.float64)}
    np.testing.assert_allclose(engine.run("prefix", **wide)["log_cond"], full, 1e-5)


X, CONTEXT, SEEN = np.zeros((2, 3), np.int64), np.zeros((2, 5), np.float32), np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("code", "query", "inputs"),
    [
        ("R101", "wish", {}),
        ("R102", "prefix", {"x": X, "context": CONTEXT, "y": X}),
        ("R103", "prefix", {"x": X}),
        ("R104", "prefix", {"x": X[:, :2], "context": CONTEXT}),
        ("R104", "prefix", {"x": X[0], "context": CONTEXT}),
        ("R104", "prefix", {"x": np.zeros((3, 3), int), "context": CONTEXT}),
        ("R104", "prefix", {"x": X[:0], "context": CONTEXT[:0]}),
        ("R104", "marginal", {"x": X, "observed": SEEN[:1], "context": CONTEXT}),
        ("R105", "prefix", {"x": X + 4, "context": CONTEXT}),
        ("R105", "prefix", {"x": X - 1, "context": CONTEXT}),
        ("R105", "prefix", {"x": X.astype(np.uint64) - np.uint64(1), "context": CONTEXT}),
        ("R105", "marginal", {"x": X + 9, "observed": SEEN, "context": CONTEXT}),
        ("R105", "prefix", {"x": X, "context": CONTEXT * np.nan}),
        ("R105", "prefix", {"x": X, "context": CONTEXT + np.inf}),
        ("R105", "prefix", {"x": X, "context": np.full((2, 5), 1e300)}),
        ("R105", "sample", {"u": np.full((2, 4), 1.0), "context": CONTEXT}),
        ("R105", "sample", {"u": np.full((2, 4), -0.5), "context": CONTEXT}),
        ("R105", "sample", {"u": np.full((2, 4), np.nan), "context": CONTEXT}),
        ("R105", "draft", {"carry": np.array([4, 0]), "u": np.zeros((2, 3)), "context": CONTEXT}),
        ("R106", "prefix", {"x": X + 0.0, "context": CONTEXT}),
        ("R106", "prefix", {"x": X * np.nan, "context": CONTEXT}),
        ("R106", "prefix", {"x": X > 0, "context": CONTEXT}),
        ("R106", "prefix", {"x": X.astype(str), "context": CONTEXT}),
        ("R106", "prefix", {"x": X.astype(object), "context": CONTEXT}),
        ("R106", "prefix", {"x": X, "context": CONTEXT + 1j}),
        ("R106", "marginal", {"x": X, "observed": X, "context": CONTEXT}),
    ],
)
def test_inputs_that_are_refused(made: Path, code: str, query: str, inputs: dict[str, Any]) -> None:
    engine = pcc.load(made)
    with np.errstate(invalid="ignore"):
        found = refused(code, lambda: engine.run(query, **inputs))
    assert "\n" not in found.what


def test_large_finite_contexts_are_no_overflow(made: Path) -> None:
    huge = np.full((1, 5), 8e37, np.float32)  # finite; their sum is not
    out = pcc.load(made).run("prefix", x=X[:1], context=huge)["log_cond"]
    assert not np.isnan(out).any()


def test_numbers_that_overflow_are_an_error_and_never_nan(tmp_path: Path) -> None:
    """3e38 is finite; what the head makes of it is not: every query says in which row."""
    circuit = pcc.templates.cp(4, 3, 5, context=3)
    engine = pcc.load(pcc.compile(circuit, out=tmp_path / "m.pcc", validate=False).path)
    context = np.zeros((2, 3), np.float32)
    context[1] = 3e38
    rows: dict[str, Any] = {
        "x": np.ones((2, 4), np.int64),
        "observed": np.array([[True, False, False, True]] * 2),
        "target": np.array([[False, True, False, False]] * 2),
        "carry": np.ones(2, np.int64),
    }
    for query, spec in engine.queries.items():
        names = {i["name"] for i in spec["inputs"]}
        given = {k: v for k, v in rows.items() if k in names}
        if "u" in names:
            given["u"] = np.full((2, len(spec["random"]["slots"])), 0.5, np.float32)
        if query in ("loglik", "conditional", "univariate", "sample", "mode", "draft"):
            found = refused("R109", lambda: engine.run(query, **given, context=context))  # noqa: B023
            assert query in found.what
            assert "row 1" in found.what
        fine = engine.run(query, **given, context=context[:1])
        assert not any(np.isnan(v.astype(float)).any() for v in fine.values())


def test_ties_of_the_largest_logits_share_the_probability(tmp_path: Path) -> None:
    """Beside 3e38 the logarithm of a normaliser vanishes, unless the maximum goes first."""
    made = pcc.compile(pcc.templates.ff(2, 5, context=3), out=tmp_path / "m.pcc",
                       queries=["loglik"], parameters="logits")  # fmt: skip
    engine = pcc.load(made.path)
    (name,) = (i["name"] for i in engine.queries["loglik"]["inputs"] if "logits" in i["name"])
    shape = next(i["shape"] for i in engine.queries["loglik"]["inputs"] if i["name"] == name)
    logits = np.full((2, *shape[1:]), -3.3e38, np.float32)
    logits[..., 1:4] = 3.3e38
    got = engine.run("loglik", x=np.array([[1, 3], [0, 2]]), **{name: logits})["log_prob"]
    np.testing.assert_allclose(got, [2 * np.log(1 / 3), -np.inf], atol=1e-6)


def test_unobserved_values_do_not_matter(made: Path) -> None:
    engine, context = pcc.load(made), np.ones((1, 5), np.float32)
    seen = np.array([[True, False, False]])
    a = engine.run("marginal", x=np.array([[1, 0, 0]]), observed=seen, context=context)
    b = engine.run("marginal", x=np.array([[1, -7, 1 << 40]]), observed=seen, context=context)
    np.testing.assert_array_equal(a["log_prob"], b["log_prob"])
    with pytest.raises(PccError, match="R105"):  # a target counts as observed
        engine.run("conditional", x=np.array([[1, -7, 0]]), observed=seen,
                   target=np.array([[False, True, False]]), context=context)  # fmt: skip


def test_nan_is_never_unobserved(tmp_path: Path) -> None:
    b = pcc.Builder([0, 3])
    circuit = b.circuit(b.product(b.gaussian(0, [0.5], [2.0]), b.categorical(1, [0.2, 0.3, 0.5])))
    engine = pcc.load(pcc.compile(circuit, queries=["marginal"], out=tmp_path / "m.pcc").path)
    seen = np.array([[False, True]])

    def ask(*x: float) -> float:
        given = np.array([x], np.float32)
        return float(engine.run("marginal", x=given, observed=seen)["log_prob"][0])

    assert ask(0, 2) == ask(np.inf, 2) == pytest.approx(np.log(0.5), abs=1e-6)
    for bad in ((np.nan, 2.0), (0.0, np.nan), (0.0, 2.5), (0.0, 3.0), (0.0, -1.0)):
        refused("R105", lambda x=bad: ask(*x))  # type: ignore[misc]


def test_threads(made: Path) -> None:
    x = np.array([[1, 2, 3]])
    outs = [
        pcc.load(made, threads=t).run("prefix", x=x, context=CONTEXT[:1])["log_cond"]
        for t in (None, 1, 2)
    ]
    assert all(np.array_equal(o, outs[0]) for o in outs)
    engine = pcc.load(made, threads=1)
    assert engine.session_of("prefix").get_session_options().intra_op_num_threads == 1
    for bad in (0, -1, 10**9):
        refused("R107", lambda t=bad: pcc.load(made, threads=t))  # type: ignore[misc]


def test_providers_are_never_replaced(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("R108", lambda: pcc.load(made, provider="abacus"))
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        found = refused("X202", lambda: pcc.load(made, provider="cuda"))
        assert found.exit_code == 3
        assert "pcc[gpu]" in found.hint

    # A runtime that lists CUDA, cannot start it and falls back without a word.
    class Session:
        @staticmethod
        def get_providers() -> list[str]:
            return ["CPUExecutionProvider"]

    class Degrading:
        __version__ = "1.30.0"
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        @staticmethod
        def InferenceSession(*_: Any, **__: Any) -> Session:  # noqa: N802
            return Session()

    monkeypatch.setattr(ort, "import_ort", lambda: Degrading)
    found = refused("X203", lambda: pcc.load(made, provider="cuda").session_of("prefix"))
    assert found.exit_code == 3
    assert "asked for CUDAExecutionProvider, got CPUExecutionProvider" in found.what


def test_arguments_of_other_types(made: Path) -> None:
    load: Any = pcc.load
    for threads in ("4", 1.5, True, []):
        refused("R107", lambda t=threads: load(made, threads=t))  # type: ignore[misc]
    for path in (None, 3, b"m.pcc"):
        refused("B210", lambda p=path: load(p))  # type: ignore[misc]
    refused("R108", lambda: load(made, provider=[]))
    engine: Any = load(made)
    refused("R101", lambda: engine.run(3))
    refused("R101", lambda: engine.run([]))
    refused("R106", lambda: engine.run("loglik", x=[[0, 1], [2]]))
    refused("R106", lambda: engine.run("loglik", x=None, context=np.zeros((1, 5))))
    refused("R106", lambda: engine.run("loglik", x=[["a", "b", "c"]], context=np.zeros((1, 5))))
    refused("R104", lambda: engine.run("loglik", x=[[0, 1, 2]], context=0.5))
