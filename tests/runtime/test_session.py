"""Sessions on compiled engines: the verifier's own text, streams, files, limits, faults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest

import pcc
from pcc.errors import PccError
from pcc.runtime.measure import Autoregressive, compare_greedy


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engines.engine(tmp_path_factory.mktemp("engine"))


PROMPT = b"\x07\x50ab"


def test_greedy_text_is_autoregressive(engine: Any) -> None:
    rng = np.random.default_rng(0)
    prompts = [[256, *rng.integers(0, 256, k).tolist()] for k in (1, 7, 8, 9, 20, 31)]
    compared, stats = compare_greedy(engine, prompts, 120, lambda _: None)
    assert not [d for d in compared.differences if not d["near_tie"]]
    assert compared.identical + compared.near_ties == len(prompts)
    assert min(stats["acceptance_length_histogram"]) > 0  # drafts end at every position
    text, _ = Autoregressive(engine).generate(prompts[0], 120)
    assert len({tuple(text[i : i + 8]) for i in range(112)}) > 60  # and do not repeat


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 4}, {"seed": 4, "top_p": 0.8}])
def test_seeds_reproduce_and_calls_add_up(engine: Any, options: dict[str, Any]) -> None:
    whole = engine.session(**options).generate(PROMPT, 60)
    again = engine.session(**options).generate(PROMPT, 60)
    assert whole.bytes == again.bytes
    assert whole.reason == "length"
    assert len(whole.bytes) == 60
    session = engine.session(**options)
    parts = [session.generate(PROMPT, 7)] + [session.generate(None, k) for k in (1, 0, 20, 32)]
    assert b"".join(p.bytes for p in parts) == whole.bytes
    streamed = b"".join(engine.session(**options).stream(PROMPT, 60, text=False))
    assert streamed == whole.bytes


def test_other_seeds_and_streams_differ(engine: Any) -> None:
    texts = {engine.session(seed=s).generate(PROMPT, 40).bytes for s in range(5)}
    texts |= {engine.session(stream=s).generate(PROMPT, 40).bytes for s in range(1, 4)}
    assert len(texts) == 8


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 2}])
def test_a_row_alone_equals_the_row_in_a_batch(engine: Any, options: dict[str, Any]) -> None:
    prompts = [PROMPT, b"x", b"0123456789abcdef01", b"\xff"]
    together = engine.session(**options).generate(prompts, 50)
    for i, p in enumerate(prompts):
        alone = engine.session(stream=i, **options).generate(p, 50)
        assert alone.bytes == together[i].bytes, i


def test_finished_rows_are_frozen(engine: Any) -> None:
    session = engine.session(greedy=True)
    first = engine.session(greedy=True).generate(PROMPT, 40)
    stop = first.bytes[5:8]
    out = session.generate([PROMPT, b"x"], 40, [stop])
    assert out[0].reason == "stop"
    assert out[0].bytes == first.bytes[: first.bytes.find(stop)]
    after = session.generate(None, 20)
    want = first.bytes[first.bytes.find(stop) + len(stop) :][:20]
    assert after[0].bytes == want


def test_log_probabilities_are_the_verifiers(engine: Any) -> None:
    result = engine.session(seed=1).generate(PROMPT, 30, logprobs=True)
    ids = [256, *PROMPT, *result.ids]
    c = engine.queries["verify"]["inputs"]
    states = {i["name"]: [1, *i["shape"][1:]] for i in c if i["name"].startswith("past.")}
    rows = 256 + 8
    n = engine.generation()["n"]
    past = {
        k: np.zeros([rows if isinstance(d, str) else d for d in s], np.float32)
        for k, s in states.items()
    }
    logs = []
    session = engine.session_of("verify")
    names = [o["onnx"] for o in engine.queries["verify"]["outputs"]]
    for at in range(0, len(ids) - 1, n):
        piece = (ids[at : at + n] + [0] * n)[:n]
        feed = {"input_ids": np.array([piece]), "length": np.array([at]), **past}
        out = dict(zip(names, session.run(names, feed), strict=True))
        past = {k: out[k.replace("past.", "present.")] for k in past}
        z = out["logits"][0].astype(np.float64)
        logs.append(z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
                    - z.max(-1, keepdims=True))  # fmt: skip
    table = np.concatenate(logs)
    first = len(PROMPT)
    want = [table[first + i, t] for i, t in enumerate(result.ids)]
    np.testing.assert_allclose(result.logprobs, want, atol=2e-4)


@pytest.mark.parametrize("prompts", [[1, 2, 3], [[1, 2, 3], [4, 5]]])
def test_ids_go_on_where_they_stopped(engine: Any, prompts: list[Any]) -> None:
    """Without a prompt; two calls give the ids of one."""
    whole = engine.session(seed=3).generate_ids(prompts, 30)
    session = engine.session(seed=3)
    first, then = session.generate_ids(prompts, 11), session.generate_ids(None, 19)
    if isinstance(prompts[0], int):
        assert first + then == whole
    else:
        assert [a + b for a, b in zip(first, then, strict=True)] == whole


def test_saved_sessions_go_on_exactly(engine: Any, tmp_path: Path) -> None:
    for options in ({"greedy": True}, {"seed": 6}):
        whole = engine.session(**options).generate(PROMPT, 80).bytes
        session = engine.session(**options)
        first = session.generate(PROMPT, 33).bytes
        session.save(tmp_path / "s.npz")
        from pcc.runtime.session import Session

        later = Session.load(engine, tmp_path / "s.npz")
        assert first + later.generate(None, 47).bytes == whole
        assert first + session.generate(None, 47).bytes == whole


def test_damaged_and_foreign_sessions_are_refused(engine: Any, tmp_path: Path) -> None:
    from pcc.runtime.session import Session

    session = engine.session(greedy=True)
    with pytest.raises(PccError, match="S140"):
        session.save(tmp_path / "s.npz")
    session.generate(PROMPT, 5)
    session.save(tmp_path / "s.npz")
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(PccError, match="C11"):
        Session.load(engine, tmp_path / "cut.npz")
    with np.load(tmp_path / "s.npz") as z:
        arrays = dict(z)
    arrays["length"] = arrays["length"] + 1
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(PccError, match="S141"):
        Session.load(engine, tmp_path / "wrong.npz")
    other = engines.engine(tmp_path, "cp")
    with pytest.raises(PccError, match="another engine"):
        Session.load(other, tmp_path / "s.npz")


def test_rewinding_decodes_the_same_text_again(engine: Any) -> None:
    session = engine.session(greedy=True)
    whole = session.generate(PROMPT, 80).ids
    start = 1 + len(PROMPT)
    for kept in (59, 30, 1, 0):
        session.rewind_to(start + kept)
        again = session.generate(None, 15).ids  # ids may be one more: some are no bytes
        assert again == whole[kept : kept + len(again)]
        assert len(again) >= 15
    session.rewind_to(2)
    assert session.tokens == [[256, PROMPT[0]]]
    with pytest.raises(PccError, match="S105"):
        session.rewind_to(500)


def test_the_buffer_ends_cleanly(engine: Any) -> None:
    session = engine.session(greedy=True)
    result = session.generate(PROMPT, 10_000)
    assert result.reason == "full"
    assert 1 + len(PROMPT) + len(result.ids) == 256
    plain, _ = Autoregressive(engine).generate([256, *PROMPT], 256 - 5)
    assert result.ids == plain
    assert session.generate(None, 10).bytes == b""
    with pytest.raises(PccError, match="S121"):
        engine.session(greedy=True).generate(b"a" * 300)
    long = engine.session(greedy=True).generate(b"a" * 254, 10)
    assert (long.reason, len(long.ids)) == ("full", 1)


def test_cancelling_keeps_what_was_decided(engine: Any) -> None:
    whole = engine.session(seed=5).generate(PROMPT, 60).bytes
    session = engine.session(seed=5)
    stream = session.stream(PROMPT, 60, text=False)
    got = next(stream)
    stream.close()
    assert got + session.generate(None, 60 - len(got)).bytes == whole
    session = engine.session(seed=5)
    out = b""
    for chunk in session.stream(PROMPT, 60, text=False):
        out += chunk
        session.cancel()
    assert 0 < len(out) < 60
    assert out + session.generate(None, 60 - len(out)).bytes == whole


def test_sessions_share_an_engine(engine: Any) -> None:
    a, b = engine.session(seed=1), engine.session(greedy=True)
    one, two = a.generate(PROMPT, 5).bytes, b.generate(b"zz", 5).bytes
    one += a.generate(None, 25).bytes
    two += b.generate(None, 25).bytes
    assert one == engine.session(seed=1).generate(PROMPT, 30).bytes
    assert two == engine.session(greedy=True).generate(b"zz", 30).bytes


def test_sessions_run_in_threads(engine: Any) -> None:
    prompts = [bytes([b]) * 3 for b in range(8)]
    alone = [engine.session(seed=1).generate(p, 60).bytes for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: engine.session(seed=1).generate(p, 60).bytes, prompts))
    assert together == alone


def test_statistics_add_up(engine: Any) -> None:
    session = engine.session(greedy=True)
    session.generate(PROMPT, 100)
    s = session.stats
    assert s["rounds"] == sum(s["acceptance_length_histogram"])
    assert s["correction_tokens"] + s["bonus_tokens"] == s["rounds"]
    assert s["tokens_emitted"] == s["draft_tokens_accepted"] + s["rounds"]
    assert s["draft_tokens_evaluated"] == s["draft_tokens_accepted"] + s["correction_tokens"]
    assert s["prompt_tokens"] == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.generate(None),
        lambda s: s.generate_ids(None),
        lambda s: s.generate([]),
        lambda s: s.generate(b"a", -1),
        lambda s: s.generate(b"a", 5, [""]),
        lambda s: s.generate_ids([1, 999], 4),
        lambda s: s.generate(b"", bos=False),
    ],
)
def test_misuse_is_an_error_with_a_code(engine: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(PccError, match=r"S1\d\d"):
        call(engine.session(greedy=True))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -2}, {"temperature": 1e-5}, {"nonsense": 1},
     {"stream": -1}, {"draft_temperature": 0}, {"seed": -1}, {"seed": 1 << 64},
     {"seed": 1.5, "greedy": True}],
)  # fmt: skip
def test_options_out_of_range(engine: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PccError, match=r"S10[12]"):
        engine.session(**options)


def test_truncation_keeps_to_the_nucleus(engine: Any) -> None:
    greedy = engine.session(greedy=True).generate(PROMPT, 40).bytes
    assert engine.session(seed=3, top_k=1).generate(PROMPT, 40).bytes == greedy
    assert engine.session(seed=3, top_p=0.0).generate(PROMPT, 40).bytes == greedy
    assert engine.session(temperature=0).generate(PROMPT, 40).bytes == greedy


def test_values_that_are_not_numbers_name_their_layer(tmp_path: Path) -> None:
    engine = engines.engine(tmp_path, config={"noise": 0.25})
    session = engine.session(greedy=True)
    session.generate(PROMPT, 4)
    session.rounds.states.past["key.1"].array[:] = np.nan
    done = bytes(session.rows[0].text)
    with pytest.raises(PccError, match=r"S130.*layer"):
        session.generate(None, 50)
    assert bytes(session.rows[0].text)[: len(done)] == done  # nothing is lost of what was made


LOUD = """
import sys
import onnxruntime as ort
import pcc
from pcc.runtime.buffers import Buffer, States

ort.set_default_logger_severity(2)
real, resize = ort.InferenceSession, States.resize

def loud(path, options, providers):
    options.log_severity_level = 2
    return real(path, options, providers=providers)

def apart(self, shapes):
    resize(self, shapes)
    for s in self.specs:
        self.present[s["name"]] = Buffer((self.batch, *shapes[s["name"]]), s["dtype"])

ort.InferenceSession = loud
if sys.argv[2] == "apart":
    States.resize = apart
print(pcc.load(sys.argv[1], threads=1).session(greedy=True).generate(b"ab", 20).bytes)
"""


def test_caches_are_written_in_place(engine: Any) -> None:
    """ONNX Runtime warns where a cache that is bound as past and present is copied after all."""

    def run(how: str) -> tuple[str, bool]:
        args = [sys.executable, "-c", LOUD, str(engine.path), how]
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        return done.stdout, "copying past_cache" in done.stderr

    want = f"{engine.session(greedy=True).generate(b'ab', 20).bytes}\n"
    assert run("as they are") == (want, False)
    assert run("apart") == (want, True)


def test_a_head_for_another_verifier_is_refused(tmp_path: Path) -> None:
    folder = engines.llama_folder(tmp_path / "model")
    with pytest.raises(PccError, match="M145"):
        pcc.compile(engines.head("cp", 3, 2, vocab=30), verifier=folder, out=tmp_path / "m.pcc")
    assert not (tmp_path / "m.pcc").exists()


def test_bundles_without_a_verifier_say_so(tmp_path: Path) -> None:
    pcc.compile(engines.head("cp", 3, 2), out=tmp_path / "m.pcc", queries=["loglik"])
    with pytest.raises(PccError, match="R110"):
        pcc.load(tmp_path / "m.pcc").session()
