"""`pcc.compile`: what it takes, what it lists as unsupported, what it leaves when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipped import JOINT, PCIR, TINY, refused, small

import pcc
from pcc.circuit.queries import QUERIES


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def test_every_query_of_a_file_by_hand(tmp_path: Path) -> None:
    """A circuit of two variables: all answers from its joint table."""
    (tmp_path / "two.pcir").write_text(PCIR)
    made = pcc.compile(tmp_path / "two.pcir", out=tmp_path / "two.pcc")
    assert (set(made.manifest["queries"]), made.manifest["unsupported"]) == (set(QUERIES), {})
    engine = pcc.load(made.path)
    x = np.array(list(product(range(2), range(3))))
    joint, px, py = JOINT[x[:, 0], x[:, 1]], JOINT.sum(1), JOINT.sum(0)

    def ask(query: str, output: str, **inputs: Any) -> Any:
        return engine.run(query, **inputs)[output]

    near = {"atol": 1e-6}
    np.testing.assert_allclose(np.exp(ask("loglik", "log_prob", x=x)), joint, **near)
    seen = np.tile([[False, True]], (6, 1))
    got = np.exp(ask("marginal", "log_prob", x=x, observed=seen))
    np.testing.assert_allclose(got, py[x[:, 1]], **near)
    got = np.exp(ask("conditional", "log_prob", x=x, observed=seen, target=~seen))
    np.testing.assert_allclose(got, joint / py[x[:, 1]], **near)
    got = np.exp(ask("prefix", "log_cond", x=x))
    want = np.stack([px[x[:, 0]], joint / px[x[:, 0]]], 1)
    np.testing.assert_allclose(got, want, **near)
    got = np.exp(ask("conditionals", "log_cond", x=x))
    assert (got[:, 0, 2] == 0).all()  # variable 0 has two values: the rest is -inf
    np.testing.assert_allclose(got[:, 0, :2], np.tile(px, (6, 1)), **near)
    np.testing.assert_allclose(got[:, 1], (JOINT / px[:, None])[x[:, 0]], **near)
    got = np.exp(ask("univariate", "log_marg", x=x, observed=seen))
    np.testing.assert_allclose(got[:, 0, :2], (JOINT / py).T[x[:, 1]], **near)


def test_logits_as_inputs(tmp_path: Path) -> None:
    """The logits that the context makes, given as inputs, make the same answers."""
    by_context = pcc.load(pcc.compile(small(), out=tmp_path / "a.pcc", queries=["prefix"]).path)
    made = pcc.compile(small(), out=tmp_path / "b.pcc", queries=["prefix"], parameters="logits")
    assert made.manifest["circuit"]["parameters"] == "logits"
    rng = np.random.default_rng(5)
    context, x = rng.normal(size=(2, 5)).astype(np.float32), rng.integers(0, 4, (2, 3))
    from pcc.interp.run import run
    from pcc.ir.semiring import Real

    names = [name for name, _, _ in small().logits]
    nodes = tuple(node for _, node, _ in small().logits)
    logits = dict(zip(names, run(nodes, {"context": context}, Real()), strict=True))
    given = {k: np.asarray(v, np.float32) for k, v in logits.items()}
    want = by_context.run("prefix", x=x, context=context)["log_cond"]
    got = pcc.load(made.path).run("prefix", x=x, **given)["log_cond"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    refused("E123", lambda: pcc.compile(pcc.templates.ff(2, 3), out=None, parameters="logits"))


def test_a_window_sums_the_rest_out(tmp_path: Path) -> None:
    whole = pcc.load(pcc.compile(TINY / "btree-n-8-r-4", out=tmp_path / "a.pcc",
                                 queries=["marginal"]).path)  # fmt: skip
    part = pcc.load(pcc.compile(TINY / "btree-n-8-r-4", out=tmp_path / "b.pcc", window=3,
                                queries=["loglik"]).path)  # fmt: skip
    rng = np.random.default_rng(2)
    x, context = rng.integers(0, 128, (4, 8)), rng.normal(size=(4, 32)).astype(np.float32)
    seen = np.tile(np.arange(8) < 3, (4, 1))
    want = whole.run("marginal", x=x, observed=seen, context=context)["log_prob"]
    got = part.run("loglik", x=x[:, :3], context=context)["log_prob"]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_unsupported_queries_are_listed_with_the_reason(tmp_path: Path) -> None:
    b = pcc.Builder([0, 3])
    circuit = b.circuit(b.product(b.gaussian(0, [0.0], [1.0]), b.categorical(1, [0.2, 0.3, 0.5])))
    made = pcc.compile(circuit, out=tmp_path / "m.pcc")
    finite = {q for q, s in QUERIES.items() if s.finite}
    assert set(made.manifest["unsupported"]) == finite
    assert set(made.manifest["queries"]) == set(QUERIES) - finite
    assert all("finite" in why for why in made.manifest["unsupported"].values())
    engine = pcc.load(made.path)
    assert "finite" in refused("R101", lambda: engine.run("sample")).what
    refused("E132", lambda: pcc.compile(circuit, out=tmp_path / "n.pcc", queries=["sample"]))
    assert not (tmp_path / "n.pcc").exists()


def test_no_name_is_a_temporary_bundle(scratch: Path) -> None:
    made = pcc.compile(pcc.templates.ff(2, 3), out=None, queries=["loglik"])
    assert scratch in made.path.parents
    assert pcc.verify(made.path).ok
    before = sorted(scratch.iterdir())
    refused("E140", lambda: pcc.compile("/absent", out=None))
    refused("E143", lambda: pcc.compile(pcc.templates.ff(2, 3), out=None, window=9))
    assert sorted(scratch.iterdir()) == before


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("E141", {"target": "abacus"}),
        ("E141", {"precision": "fp7"}),
        ("E141", {"parameters": "guess"}),
        ("E142", {"queries": ["wish"]}),
        ("E145", {"step": 3}),
        ("E410", {"opset": 5}),
        ("E141", {"target": []}),
        ("E142", {"queries": [3]}),
        ("E148", {"queries": "loglik"}),
        ("E148", {"queries": 3}),
        ("E148", {"opset": "24"}),
        ("E148", {"opset": True}),
        ("E148", {"window": "2"}),
        ("E148", {"window": 0}),
        ("M150", {"max_seq": -1}),
        ("M150", {"chunk": 2.0}),
        ("E148", {"verifier": 3}),
        ("E148", {"force": 1}),
    ],
)
def test_options_that_are_refused(
    tmp_path: Path, scratch: Path, code: str, options: dict[str, Any]
) -> None:
    (tmp_path / "two.pcir").write_text(PCIR)
    found = refused(code, lambda: pcc.compile(tmp_path / "two.pcir", out=tmp_path / "a", **options))
    assert found.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "two.pcir"]
    assert list(scratch.iterdir()) == []


def test_arguments_of_other_types(tmp_path: Path) -> None:
    refused("E148", lambda: pcc.compile(3, out=None))  # type: ignore[arg-type]
    refused("E148", lambda: pcc.compile(small(), out=3))  # type: ignore[arg-type]
    make: Any = pcc.templates.cp
    for sizes in (("3", 2, 4), (3, 2.0, 4), (3, 2, None), (True, 2, 4)):
        refused("T100", lambda s=sizes: make(*s))  # type: ignore[misc]
    for how in ({"context": "5"}, {"seed": -1}, {"seed": "x"}):
        refused("T100", lambda h=how: make(3, 2, 4, **h))  # type: ignore[misc]
    ragged = [[0.5], [0.5, 0.5]]
    for given in (5, {"emissions": ragged, "sums": []}, {"emissions": [], "sums": 5},
                  {"emissions": np.ones((3, 2, 4)), "sums": [ragged]}):  # fmt: skip
        refused("T101", lambda g=given: make(3, 2, 4, weights=g))  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Ended while it works, `pcc compile` removes what it has written."""
    (tmp_path / "two.pcir").write_text(PCIR)
    args = [sys.executable, "-P", "-m", "pcc.cli", "compile", "two.pcir", "-o", "m.pcc"]
    with subprocess.Popen(
        args, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
    ) as running:  # fmt: skip
        while running.poll() is None and not list(tmp_path.glob(".m.pcc.*")):
            time.sleep(0.005)
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (128 + number, "")
    assert [p.name for p in tmp_path.iterdir()] == ["two.pcir"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pcc.compile(small(), out=tmp_path / "a.pcc", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_when_the_folder_is_just_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def made(path: Path, mode: int = 0o777) -> None:
        real(path, mode)
        raise KeyboardInterrupt

    circuit = small()
    with monkeypatch.context() as patched:
        patched.setattr("pcc.bundle.os.mkdir", made)
        with pytest.raises(KeyboardInterrupt):
            pcc.compile(circuit, out=tmp_path / "a.pcc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [1, 2])
def test_a_signal_while_a_bundle_is_replaced_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The old one, until the new one is there."""
    out = tmp_path / "a.pcc"
    pcc.compile(pcc.templates.ff(2, 3), out=out)
    real, moves = os.replace, list[Path]()

    def replace(source: Path, to: Path) -> None:
        real(source, to)
        if Path(to).parent == tmp_path:
            moves.append(Path(to))
            if len(moves) == after:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pcc.bundle.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            pcc.compile(pcc.templates.cp(2, 2, 3), out=out, force=True)
    kinds = [pcc.load(p, threads=1).manifest["circuit"]["kind"] for p in tmp_path.iterdir()]
    assert kinds == ["ff" if after == 1 else "cp"]


@pytest.mark.parametrize("mixture", [False, True])
def test_a_circuit_that_is_zero_everywhere(tmp_path: Path, mixture: bool) -> None:
    """It has no law: probability zero throughout, draws in range, no NaN, and no false alarm."""
    b = pcc.Builder([2, 3])
    root = b.product(b.categorical(0, [0.0, 0.0]), b.categorical(1, [0.2, 0.3, 0.5]))
    if mixture:
        other = b.product(b.categorical(0, [0.5, 0.5]), b.categorical(1, [0.0, 0.0, 0.0]))
        root = b.sum([root, other], [0.3, 0.7])
    made = pcc.compile(b.circuit(root), out=tmp_path / "zero.pcc")
    assert pcc.verify(made.path).ok
    engine, rng = pcc.load(made.path), np.random.default_rng(1)
    x = np.array(list(product(range(2), range(3))))
    assert np.isneginf(engine.run("loglik", x=x)["log_prob"]).all()
    assert np.isneginf(engine.run("conditionals", x=x)["log_cond"]).all()
    for query, more in (("sample", {}), ("draft", {"carry": x[:, 0]})):
        slots = len(engine.queries[query]["random"]["slots"])
        out = engine.run(query, u=rng.random((6, slots), dtype=np.float32), **more)
        assert ((out["x"] >= 0) & (out["x"] < ([2, 3] if query == "sample" else [3]))).all()
        if query == "sample":
            assert np.isneginf(out["log_prob"]).all()
        else:
            assert ((out["q"] >= 0) & (out["q"] <= 1 + 1e-6)).all()
