"""Sessions on a device: what is launched ahead is what the host would have asked for, or nothing.

The device is one of the host's memory, whose work runs only when somebody waits for it; its graphs
run under ONNX Runtime. What is tested is order, addresses, chaining and dropping, not kernels.
"""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
from fake_cuda import Cuda
from fake_device import on_device
from shipped import refused

import pcc
from pcc.bundle import _Reader
from pcc.conformance import verifiers
from pcc.conformance.models import head
from pcc.errors import PccError
from pcc.runtime.contract import check_generation
from pcc.runtime.device.driver import MANY

PROMPT = b"\x07\x50ab"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("device")
    for batch in (1, 3):
        model = engines.llama_folder(at / f"model{batch}")
        how: dict[str, Any] = {"max_seq": 256, "chunk": 8, "queries": ["draft", "loglik"]}
        pcc.compile(
            head("hmm", 4, 3, vocab=258), verifier=model, out=at / f"{batch}.pcc",
            target="onnx-cuda", batch=batch, **how,
        )  # fmt: skip
    return at


@pytest.fixture(scope="module")
def host(folder: Path) -> Any:
    return pcc.load(folder / "1.pcc", threads=1)


def rounds_of(engine: Any) -> int:
    return sum(q.startswith("step") for q in engine.runner.opener.runs)


OPTIONS: list[dict[str, Any]] = [
    {"greedy": True}, {"seed": 4}, {"seed": 5, "temperature": 0.7, "top_p": 0.8, "stream": 9},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ahead", [True, False])
def test_bytes_are_those_of_the_host(
    folder: Path, host: Any, options: dict[str, Any], ahead: bool
) -> None:
    engine = on_device(folder / "1.pcc", ahead=ahead)
    session, plain = engine.session(**options), host.session(**options)
    want, got = plain.generate(PROMPT, 90), session.generate(PROMPT, 90)
    assert got.bytes == want.bytes
    assert got.ids == want.ids
    assert session.generate(None, 40).bytes == plain.generate(None, 40).bytes  # goes on
    wanted = session.rounds.statistics.passes
    assert wanted == plain.rounds.statistics.passes > 20
    engine.runner.device.wait(engine.runner.stream)
    # The round beyond the end of the first call is what the second begins with; one is left over.
    assert rounds_of(engine) == wanted + (1 if ahead else 0)
    assert engine.cu.calls["cuGraphLaunch"] >= wanted - 4


def test_a_round_is_launched_before_the_one_before_is_waited_for(folder: Path) -> None:
    engine = on_device(folder / "1.pcc")
    session = engine.session(greedy=True)
    session.generate(PROMPT, 40)
    assert session.rounds.call("step_greedy").flight is not None
    assert engine.cu.queue  # it is on its way, and has not run
    ran = rounds_of(engine)
    session.rounds.place.quiet()
    assert rounds_of(engine) == ran + 1
    assert session.rounds.call("step_greedy").flight is None


def nodes_of(session: Any, query: str) -> dict[str, int]:
    """Return how much work each recorded graph of a call holds."""
    graphs = session.rounds.call(query).graphs
    return {name: len(session.engine.cu.graphs[g]) for name, g in graphs.items()}


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("unified", [True, False])
def test_a_round_holds_two_nodes_beside_its_graph(
    folder: Path, host: Any, options: dict[str, Any], unified: bool
) -> None:
    """What is handed on and drawn; the graph; the results, as a copy where it has to be one."""
    engine = on_device(folder / "1.pcc", Cuda(unified=unified))
    session = engine.session(**options)
    assert session.generate(PROMPT, 60).bytes == host.session(**options).generate(PROMPT, 60).bytes
    query = session.rounds.step_name
    assert nodes_of(session, query) == {"ahead0": 3, "ahead1": 3}
    assert (engine.cu.calls["cuMemcpyDtoHAsync"] > 0) is not unified
    assert engine.cu.calls["cuMemcpyDtoDAsync"] == 0


def test_uploads_end_once_rounds_are_launched_ahead(folder: Path) -> None:
    engine = on_device(folder / "1.pcc")
    session = engine.session(seed=3)
    session.generate(PROMPT, 30)
    before = dict(engine.cu.calls)
    session.generate(None, 60)
    spent = {k: engine.cu.calls[k] - before[k] for k in before}
    fresh = spent["cuGraphLaunch"] - session.rounds.statistics.passes
    assert spent["cuMemcpyHtoDAsync"] == 0  # within graphs that are recorded already
    assert fresh <= 2


def test_rewinding_and_new_prompts_drop_what_was_launched(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    a, b = engine.session(seed=6), host.session(seed=6)
    for s in (a, b):
        s.generate(PROMPT, 40)
        s.rewind_to(20)
    assert a.generate(None, 30).ids == b.generate(None, 30).ids
    assert a.generate(b"other", 30).ids == b.generate(b"other", 30).ids


def test_two_sessions_take_turns(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    want = [host.session(seed=k).generate(PROMPT, 80).bytes for k in (1, 2)]
    sessions = [engine.session(seed=k) for k in (1, 2)]
    streams = [s.stream(PROMPT, 80, text=False) for s in sessions]
    got = [b"", b""]
    alive = [True, True]
    while any(alive):
        for i, s in enumerate(streams):
            piece = next(s, None)
            alive[i] = piece is not None
            got[i] += piece or b""
    assert got == want


def test_rows_of_a_batch_end_apart(folder: Path) -> None:
    host = pcc.load(folder / "3.pcc", threads=1)
    engine = on_device(folder / "3.pcc")
    prompts = [b"a", b"bcd", b"\x01\x02\x03\x04\x05"]
    a, b = engine.session(seed=2), host.session(seed=2)
    got, want = (s.generate(prompts, 50, stop=[b"e", b"\x10"]) for s in (a, b))
    assert [r.bytes for r in got] == [r.bytes for r in want]
    assert len({len(r.ids) for r in want}) > 1  # a row ends while others go on
    got, want = (s.generate(None, 40) for s in (a, b))
    assert [r.bytes for r in got] == [r.bytes for r in want]


def test_the_end_of_the_buffer(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    a, b = (e.session(seed=8).generate(PROMPT, 10_000) for e in (engine, host))
    assert a.ids == b.ids
    assert a.reason == "full"


def test_sessions_are_saved_and_loaded_across(folder: Path, host: Any, tmp_path: Path) -> None:
    engine = on_device(folder / "1.pcc")
    a, b = engine.session(seed=9), host.session(seed=9)
    a.generate(PROMPT, 33)
    b.generate(PROMPT, 33)
    a.save(tmp_path / "a.npz")
    b.save(tmp_path / "b.npz")
    want = b.generate(None, 40).ids
    assert a.generate(None, 40).ids == want
    assert type(a).load(host, tmp_path / "a.npz").generate(None, 40).ids == want
    assert type(a).load(engine, tmp_path / "b.npz").generate(None, 40).ids == want


def test_a_round_that_fails_is_not_committed(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    session = engine.session(seed=11)
    session.generate(PROMPT, 40)
    left = [3]

    def spoil(found: dict[str, Any]) -> None:
        if "n_emit" in found:
            left[0] -= 1
            if not left[0]:
                found["margin"][:] = np.nan

    engine.runner.opener.spoil = spoil
    with pytest.raises(PccError, match="S130"):
        session.generate(None, 60)
    engine.runner.opener.spoil = None
    want = host.session(seed=11).generate_ids([256, *PROMPT], 100)
    got = session.rows[0].ids
    assert got == want[: len(got)]
    session.generate(None, 30)
    assert session.rows[0].ids[:70] == want[:70]


def test_queries_without_a_session(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    rng = np.random.default_rng(0)
    for _ in range(4):  # plainly, then recorded
        x = rng.integers(0, 258, (1, 4))
        context = rng.normal(size=(1, engine.generation()["width"]))
        got = engine.run("loglik", x=x, context=context)
        want = host.run("loglik", x=x, context=context)
        np.testing.assert_array_equal(got["log_prob"], want["log_prob"])
    assert engine.cu.calls["cuGraphLaunch"] == 2


def test_what_a_query_takes_and_gives_under_one_name(tmp_path: Path) -> None:
    """`sample` and `mode` take `x` and return `x`: two arrays, the output is `x_out`."""
    model = engines.llama_folder(tmp_path / "model")
    how: dict[str, Any] = {"queries": ["sample", "mode"], "max_seq": 64, "chunk": 8}
    pcc.compile(head("cp", 4, 3, vocab=258), verifier=model, out=tmp_path / "m.pcc",
                target="onnx-cuda", **how)  # fmt: skip
    host, engine = pcc.load(tmp_path / "m.pcc", threads=1), on_device(tmp_path / "m.pcc")
    rng = np.random.default_rng(5)
    for query in ("sample", "mode"):
        slots = [i["shape"][1] for i in host.queries[query]["inputs"] if i["name"] == "u"]
        for _ in range(4):  # plainly, then recorded
            x, observed = rng.integers(0, 258, (1, 4)), np.array([[True, False, True, False]])
            feed: dict[str, Any] = {"x": x, "observed": observed}
            feed["context"] = rng.normal(size=(1, engine.generation()["width"]))
            if slots:
                feed["u"] = rng.random((1, slots[0]))
            got, want = (e.run(query, **feed) for e in (engine, host))
            assert got["x"].tolist() == want["x"].tolist()
            assert (got["x"] == x)[observed].all()
            call = engine.runner._alone[query]
            assert call.inputs["x"].array.tolist() == x.tolist()  # not written over


def test_verify_runs_on_the_device(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    spec = engine.generation()
    rng = np.random.default_rng(1)
    past = {
        f"past.{k}": rng.normal(size=(1, *s)).astype(np.float32)
        for k, s in spec["buckets"][-1]["states"].items()
    }
    feed = {"input_ids": rng.integers(0, 258, (1, 4)), "length": np.array([17]), **past}
    got = engine.runner.answer("verify", feed, 1)
    want = host.runner.answer("verify", {k: v.copy() for k, v in feed.items()}, 1)
    assert len(got) == len(want) > 2
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wrong_rows_and_memory(folder: Path) -> None:
    engine = on_device(folder / "1.pcc")
    found = refused("R104", lambda: engine.session(greedy=True).generate([b"a", b"b"], 4))
    assert "--batch 2" in str(found)
    session = engine.session(greedy=True)
    need = session.memory(200)
    session.generate(PROMPT, 4)
    assert 0 < need <= engine.cu.used
    small = on_device(folder / "1.pcc")
    small.cu.room = need // 2
    found = refused("X305", lambda: small.session(greedy=True).generate(PROMPT, 4))
    assert "needed" in found.what


def test_memory_is_given_back(folder: Path) -> None:
    engine = on_device(folder / "1.pcc")
    session = engine.session(seed=1)
    session.generate(PROMPT, 30)
    held = engine.cu.used
    for _ in range(3):
        session.generate(b"again", 30)
    assert engine.cu.used == held  # states and arrays of the sequence before are gone


def test_a_session_in_a_cycle_waits_for_a_stream_that_is_still_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of garbage in a cycle, streams may be finalized before the calls that wait for them."""
    faults: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", faults.append)
    engine = on_device(folder / "1.pcc")
    device, session = engine.runner.device, engine.session(seed=3)
    session.generate(PROMPT, 30)
    engine.within = [session, engine]
    del engine, session
    gc.collect()
    assert not faults
    for _ in range(2):
        assert not device.cu.ended
        device.stream()
    assert device.cu.ended


def test_what_cannot_be_recorded_runs_plainly(folder: Path, host: Any) -> None:
    engine = on_device(folder / "1.pcc")
    engine.cu.fails["cuStreamBeginCapture"] = 900
    session = engine.session(seed=12)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        got = session.generate(PROMPT, 60)
    assert got.bytes == host.session(seed=12).generate(PROMPT, 60).bytes
    assert engine.cu.calls["cuGraphLaunch"] == 0


@pytest.mark.parametrize("kind", ["byte_llama", "evabyte"])
def test_rings_and_recent_ids(kind: str, tmp_path: Path) -> None:
    """States that a round does not write in place, and rings that wrap, survive what is dropped."""
    source, model = getattr(verifiers, kind)(tmp_path / kind)
    how: dict[str, Any] = {"max_seq": 300, "chunk": 8, "queries": ["draft"]}
    pcc.compile(source, verifier=model, out=tmp_path / "m.pcc", target="onnx-cuda", **how)
    host, engine = pcc.load(tmp_path / "m.pcc", threads=1), on_device(tmp_path / "m.pcc")
    vocab = int(engine.generation()["vocab"])
    rng = np.random.default_rng(3)
    prompt = rng.integers(64, min(vocab, 256), 30).tolist()
    a, b = engine.session(seed=21), host.session(seed=21)
    assert a.generate_ids(prompt, 90) == b.generate_ids(prompt, 90)
    assert nodes_of(a, "step") == {"ahead0": 3, "ahead1": 3}
    for s in (a, b):
        s.rewind_to(70)
    assert a.generate(None, 60).ids == b.generate(None, 60).ids
    count = [4]

    def spoil(found: dict[str, Any]) -> None:
        count[0] -= "n_emit" in found
        if not count[0] and "n_emit" in found:
            found["margin"][:] = np.nan

    engine.runner.opener.spoil = spoil
    with pytest.raises(PccError, match="S130"):
        a.generate(None, 60)
    engine.runner.opener.spoil = None
    a.rounds.place.quiet()
    if kind == "byte_llama":  # the last tokens before the carry: not those of the failed round
        recent = a.rounds.states.read("recent_ids")[0].tolist()
        assert recent == a.rows[0].ids[-1 - len(recent) : -1]
    b.generate(None, 100)
    had = len(a.rows[0].ids)
    assert a.rows[0].ids == b.rows[0].ids[:had]
    a.generate(None, 30)
    assert a.rows[0].ids[: had + 20] == b.rows[0].ids[: had + 20]
    # Ids of a model that is nearly certain hide a wrong state; its probabilities do not.
    logs = [s.rows[0].log_probs[: had + 20] for s in (a, b)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-5)


@pytest.mark.parametrize("ahead", [True, False])
def test_rings_too_short_for_a_second_try_launch_nothing_ahead(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round beside another must fit the ring: 2 n <= span, where a cache is one."""
    source, model = verifiers.evabyte(tmp_path / "eva")
    pcc.compile(source, verifier=model, out=tmp_path / "m.pcc", target="onnx-cuda", max_seq=300,
                chunk=8, queries=["draft"])  # fmt: skip
    host, engine = pcc.load(tmp_path / "m.pcc", threads=1), on_device(tmp_path / "m.pcc")
    span = 2 * int(engine.generation()["n"]) - (0 if ahead else 1)
    monkeypatch.setattr("pcc.runtime.device.call.EVA_SPAN", span)
    session = engine.session(seed=5)
    got = session.generate_ids(list(range(70, 80)), 60)
    assert got == host.session(seed=5).generate_ids(list(range(70, 80)), 60)
    engine.runner.device.wait(engine.runner.stream)
    assert rounds_of(engine) == session.rounds.statistics.passes + ahead
    assert (session.rounds.call("step").flight is not None) is ahead


def test_caches_that_are_no_rings_are_rolled_back_by_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcc.runtime.device.call.EVA_SPAN", 1)
    session = on_device(folder / "1.pcc").session(seed=5)
    session.generate(PROMPT, 40)
    assert session.rounds.call("step").flight is not None


LIES: dict[str, tuple[str, Any]] = {
    "none": ("n_emit", 0), "negative": ("n_emit", -1), "many": ("n_emit", 99),
    "beyond": ("emitted", 258), "huge": ("emitted", 1 << 62), "window": ("next_window", 258),
    "before": ("next_window", -7), "length": ("next_length", 1 << 40),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("prompt", [True, False])
def test_numbers_that_no_graph_gives(folder: Path, lie: str, prompt: bool) -> None:
    """Kernels are a stranger's: what they count and choose is checked before it is used."""
    name, value = LIES[lie]
    if (name == "n_emit" and prompt) or (name == "next_length" and not prompt):
        return  # prompts emit one token; rounds add what they emitted
    engine = on_device(folder / "1.pcc", ahead=False)
    session = engine.session(greedy=True)
    if not prompt:
        session.generate(PROMPT, 3)

    def spoil(found: dict[str, Any]) -> None:
        found[name] = np.full_like(found[name], value)

    engine.runner.opener.spoil = spoil
    refused("S131", lambda: session.generate(PROMPT if prompt else None, 40))


def test_tokens_beyond_those_counted(folder: Path) -> None:
    engine = on_device(folder / "1.pcc", ahead=False)

    def spoil(found: dict[str, Any]) -> None:
        if "n_emit" in found:
            found["n_emit"] = np.ones_like(found["n_emit"])
            found["emitted"] = np.full_like(found["emitted"], 7)

    engine.runner.opener.spoil = spoil
    refused("S131", lambda: engine.session(seed=1).generate(PROMPT, 40))


def changed(kind: str, m: dict[str, Any]) -> None:
    """Let a static bundle's manifest promise other memory than its graphs write."""
    g, queries = m["generation"], m["queries"]
    state = g["states"][0]
    if kind == "small buckets":
        g["buckets"][0]["states"][state["name"]][state["rows_axis"]] -= 1
    elif kind == "two buckets":
        g["buckets"].insert(0, {**g["buckets"][0], "rows": g["buckets"][0]["rows"] - 1})
    elif kind == "other type":
        state["dtype"] = "f16"
    elif kind == "unlike rows":
        queries["step"]["batch"] = 2
    elif kind == "no rows":
        del queries["step"]["batch"]
    elif kind == "one array":
        queries["loglik"]["outputs"][0]["onnx"] = "x"
    elif kind == "moved state":
        moved = [o for o in queries["step"]["outputs"] if o["name"].startswith("present.")]
        moved[0]["onnx"] = "elsewhere"


KINDS = ("", "small buckets", "two buckets", "other type", "unlike rows", "no rows", "one array",
         "moved state")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_that_promise_other_memory(folder: Path, kind: str) -> None:
    manifest = copy.deepcopy(pcc.load(folder / "1.pcc", threads=1).manifest)
    changed(kind, manifest)

    def read() -> None:
        _Reader("here").check(manifest)
        check_generation(manifest, "here")

    if kind:
        refused("B215", read)
    else:
        read()


def test_modules_are_loaded_once_for_all_prompts(folder: Path) -> None:
    """Two: how a round begins, and how its results go."""
    engine = on_device(folder / "1.pcc")
    session = engine.session(seed=3)
    for _ in range(4):
        session.generate(PROMPT, 20)
    assert engine.cu.open["module"] == engine.cu.calls["cuModuleLoadData"] == 2
    for _ in range(70):
        session.generate(PROMPT, 1)
    gc.collect()
    assert engine.cu.open["event"] < 3 * MANY  # of three for each prompt
    cu, device = engine.cu, engine.runner.device
    del session, engine
    gc.collect()
    kept = [device.stream(), device.stream()]
    assert cu.open == {"module": 2, "stream": len(kept), "event": 0}
