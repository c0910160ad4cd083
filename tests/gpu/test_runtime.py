"""Sessions and queries on a GPU, against the host.

fp32 everywhere (TF32 off), so that texts are equal. Each test says what this machine lacks for it.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import pcc
from pcc.conformance import verifiers
from pcc.errors import PccError
from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory, Pinned
from pcc.runtime.device.moves import LARGEST, Move, Moves
from pcc.runtime.device.philox import Draws
from pcc.runtime.philox import ROLES, Uniforms

try:
    GPU = Device()
except PccError as e:
    pytest.skip(e.what, allow_module_level=True)

MODELS = ("llama", "byte_llama", "evabyte")
HOW = {"max_seq": 300, "chunk": 8, "queries": ["draft", "loglik", "sample"]}


def lacking(target):
    """Return what a target needs that is not here."""
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed: the host's text is unknown"
    if target == "onnx-cuda":
        there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return "" if there else "this onnxruntime has no CUDA provider"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return "" if nvcc else "there is no nvcc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module")
def open_engine(folder):
    """`open_engine(model, target, batch)` loads a bundle, compiled once."""

    def made(model, target, batch=1):
        if target != "onnx" and (what := lacking(target)):
            pytest.skip(what)
        out = folder / f"{model}.{target}.{batch}.pcc"
        if not out.exists():
            at = folder / f"{model}.{target}.{batch}"
            source, verifier = getattr(verifiers, model)(at)
            fixed = {} if target == "onnx" else {"batch": batch}
            pcc.compile(source, verifier=verifier, out=out, target=target, **HOW, **fixed)
        if target == "onnx":
            return pcc.load(out, threads=4)
        return pcc.load(out, provider="cuda")

    return made


TARGETS = ("onnx-cuda", "cuda")


def prompt_of(engine, size=30, seed=3):
    vocab = int(engine.generation()["vocab"])
    return np.random.default_rng(seed).integers(64, min(vocab, 256), size).tolist()


def test_uniforms_of_the_device():
    slots = [(role, 3 * k) for k, role in enumerate([*ROLES] * 20)]
    source = Uniforms(2**63 + 12345, slots, [0, 7, 2**32 - 1])
    stream, lengths = GPU.stream(), np.array([0, 99, 2**31 + 7])
    at, u = Memory(GPU, lengths.nbytes), Memory(GPU, 4 * 3 * len(slots))
    draws = Moves(GPU, [], Draws(GPU, source, at.address, u.address, stream))
    want, got = (np.empty((3, len(slots)), np.float32) for _ in range(2))
    GPU.upload(at.address, lengths.ctypes.data, lengths.nbytes, stream)
    draws.enqueue(stream)
    GPU.download(got.ctypes.data, u.address, got.nbytes, stream)
    GPU.wait(stream)
    source.fill(lengths, want)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("size", [4, 24, 19_456, LARGEST, LARGEST + 4, 6])
def test_moves_of_the_device(size):
    """Past goes to before, present to past, before to the host; recorded, launched three times."""
    stream, rng = GPU.stream(), np.random.default_rng(2)
    held = [Memory(GPU, size) for _ in range(3)]
    mirror = Pinned(GPU, size)
    past, present, before = (m.address for m in held)
    chain = Moves(GPU, [Move(past, present, size, kept=before)])
    shown = Moves(GPU, [Move(mirror.address, before, size, shown=True)])
    assert bool(chain.launches) == (size <= LARGEST and size % 4 == 0)
    values = [rng.integers(0, 256, size, np.uint8) for _ in range(3)]
    for m, v in zip(held, values, strict=True):
        GPU.upload(m.address, v.ctypes.data, size, stream)
    GPU.wait(stream)
    graph = GPU.capture(stream, lambda: (chain.enqueue(stream), shown.enqueue(stream)))
    for want in (values[0], values[1], values[1]):
        GPU.launch(graph, stream)
        GPU.wait(stream)
        assert mirror.array.tobytes() == want.tobytes()
    GPU.forget(graph)


def test_too_much_memory_is_refused():
    with pytest.raises(PccError, match="X305"):
        Memory(GPU, 1 << 42)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 4}, {"seed": 5, "top_p": 0.8}])
def test_texts_are_those_of_the_host(open_engine, model, target, options):
    engine, host = open_engine(model, target), open_engine(model, "onnx")
    prompt = prompt_of(engine)
    want = host.session(**options).generate_ids(prompt, 120)
    for ahead in (True, False):
        engine.run_ahead = ahead
        session = engine.session(**options)
        assert session.generate_ids(prompt, 120) == want, f"ahead={ahead}"
        call = session.rounds.call(session.rounds.step_name)
        assert not call.plain, call.plain  # it was recorded
        assert set(call.graphs) - {"fresh"} == ({"ahead0", "ahead1"} if ahead else set())
    engine.run_ahead = True


@pytest.mark.parametrize("target", TARGETS)
def test_rewinding_saving_and_other_sessions(open_engine, target, tmp_path):
    engine, host = open_engine("evabyte", target), open_engine("evabyte", "onnx")
    a, b, other = engine.session(seed=6), host.session(seed=6), engine.session(seed=7)
    prompt = prompt_of(engine)
    for s in (a, b):
        s.generate_ids(prompt, 60)
        s.rewind_to(50)
    other.generate_ids(prompt[:9], 40)
    assert a.generate(None, 40).ids == b.generate(None, 40).ids
    a.save(tmp_path / "a.npz")
    want = a.generate(None, 40).ids
    assert type(a).load(engine, tmp_path / "a.npz").generate(None, 40).ids == want


@pytest.mark.parametrize("target", TARGETS)
def test_batches(open_engine, target):
    engine, host = open_engine("llama", target, 3), open_engine("llama", "onnx")
    prompts = [b"a", b"bcd", b"\x01\x02\x03\x04\x05"]
    a, b = engine.session(seed=2), host.session(seed=2)
    for more in (prompts, None):
        got, want = (s.generate(more, 50, stop=[b"e"]) for s in (a, b))
        assert [r.bytes for r in got] == [r.bytes for r in want]


@pytest.mark.parametrize("target", TARGETS)
def test_queries(open_engine, target):
    engine, host = open_engine("llama", target), open_engine("llama", "onnx")
    rng, n = np.random.default_rng(0), int(engine.generation()["n"])
    for _ in range(4):
        feed = {"x": rng.integers(0, 258, (1, n)),
                "context": rng.normal(size=(1, engine.generation()["width"]))}  # fmt: skip
        got, want = (e.run("loglik", **feed)["log_prob"] for e in (engine, host))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_code_for_another_gpu_is_refused(open_engine, monkeypatch):
    engine = open_engine("llama", "cuda")
    monkeypatch.setattr(engine.runner.device, "capability", (8, 0))
    with pytest.raises(PccError, match="X306"):
        pcc.load(engine.path, provider="cuda").session(greedy=True).generate(b"a", 4)
