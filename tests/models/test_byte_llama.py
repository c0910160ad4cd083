"""byte-Llama: the published values, its dictionary against a direct search, its recent ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_models import features, longest_words, read_folder
from graphs import Compiled
from model_runs import Runner, close, follow, in_passes, state_of

from pcc.backends.onnx.ngram_rules import table_of
from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.module import Module
from pcc.models.byte_llama import ByteLlama, read_ngrams
from pcc.models.config import Config
from pcc.models.load import load_model
from pcc.tensor import ops as t
from pcc.tensor.ngram import LongestSuffix

Shared = Callable[[str], Path]
BACKBONE = "oracle/checkpoints/Llama3-2-3B-IT-Byte-tiny-backbone"
TOLD = "oracle/checkpoints/llama-tiny-hmm-n-4-r-4"
ROWS = 160
ENGINES = pytest.mark.parametrize("opset", [None, 24, 17], ids=["float64", "opset24", "opset17"])


def words(seed: int, count: int, vocab: int, longest: int) -> dict[str, Any]:
    """A dictionary of all single ids and random longer words, in the published form."""
    rng, table = np.random.default_rng(seed), {str(i + 1): i + 1 for i in range(vocab)}
    while len(table) < vocab + count:
        word = rng.integers(1, vocab + 1, rng.integers(2, longest + 1))
        table.setdefault(",".join(map(str, word)), len(table) + 1)
    table[""] = -1
    return {
        "expand_input_ids": True,
        "expand_input_ids_maxlen": longest,
        "expand_input_ids_vocab_size": len(table),
        "expand_input_ids_dict": [table, [2, 3]],
    }


@pytest.fixture(scope="module")
def folder(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone with a dictionary that its text meets at every length."""
    from safetensors.torch import load_file, save_file

    source, out = shared(BACKBONE), tmp_path_factory.mktemp("byte-llama")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 5}
    config |= words(0, 200, 5, 8)
    state = load_file(source / "model.safetensors")
    rows = config["expand_input_ids_vocab_size"]
    for name, count in (("model.embed_tokens", 5), ("lm_head", 5)):
        state[f"{name}.weight"] = state[f"{name}.weight"][:count].clone()
    table = state["model.expand_embed_tokens.weight"]
    state["model.expand_embed_tokens.weight"] = table[np.arange(rows) % len(table)].clone()
    save_file(state, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


@ENGINES
def test_published_hidden_states_and_logits(shared: Shared, opset: int | None) -> None:
    with np.load(shared(TOLD) / "expected_first_round.npz") as file:
        want = dict(file)
    model = load_model(shared(BACKBONE), max_rows=ROWS)
    assert isinstance(model, ByteLlama)
    ids = want["prompt"].astype(np.int64)
    out = Runner(model, ROWS, opset)(ids[None], np.array([0]), state_of(model, ROWS, 1))
    close(out["hidden"][0], want["base_hidden_f32"], want["base_logits_f32"])
    close(out["logits"][0], want["base_logits_f32"])


@ENGINES
@pytest.mark.parametrize("widths", [[60], [1] * 12 + [48], [5] * 12, [20, 1, 39]], ids=str)
def test_chunks_see_words_that_begin_before_them(
    folder: Path, opset: int | None, widths: list[int]
) -> None:
    config, weights = read_folder(folder)
    ids = np.random.default_rng(3).integers(0, 5, 60)
    lengths = {len(k.split(",")) for k in config["expand_input_ids_dict"][0] if k}
    assert lengths == set(range(1, 9))
    plain = longest_words(config, ids)
    assert (plain >= 5).mean() > 0.3  # most words are longer than one id
    hidden, logits = features(config, weights, ids)
    model = load_model(folder, max_rows=ROWS)
    state = state_of(model, ROWS, 1, fill=20.0)
    got = in_passes(Runner(model, ROWS, opset), ids[None], widths, state)
    close(got["hidden"][0], hidden, logits)
    close(got["logits"][0], logits)


@pytest.mark.parametrize("width", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_greedy_text_is_reproduced(shared: Shared, width: int) -> None:
    told = json.loads((shared(TOLD) / "expected.json").read_text())
    run = Runner(load_model(shared(BACKBONE), max_rows=ROWS), ROWS, 24)
    text, prompt = told["ar_greedy_f32_tokens"], told["prompt"]
    assert follow(run, np.array([*prompt, *text]), len(prompt), width, 268) == text


@pytest.mark.parametrize("width", [1, 4, 11])
def test_recent_ids_follow_what_is_committed(folder: Path, width: int) -> None:
    config, weights = read_folder(folder)
    model = load_model(folder, max_rows=ROWS)
    ids = list(np.random.default_rng(8).integers(0, 5, 9))
    for _ in range(30):
        ids.append(int(features(config, weights, np.array(ids))[1][-1].argmax()))
    assert follow(Runner(model, ROWS, 24), np.array(ids), 9, width, 5) == ids[9:]


def test_nothing_committed_changes_nothing(folder: Path) -> None:
    model = load_model(folder, max_rows=ROWS)
    state = state_of(model, ROWS, 2)
    state["recent_ids"] = np.arange(14).reshape(2, 7) % 5
    out = Runner(model, ROWS, 24)(
        np.ones((2, 3), np.int64), np.array([9, 9]), state, np.array([0, 2])
    )
    assert out["present.recent_ids"][0].tolist() == state["recent_ids"][0].tolist()
    assert out["present.recent_ids"][1].tolist() == [*state["recent_ids"][1, 2:], 1, 1]


# ---------------------------------------------------------------- the op and its hash table


def arrays(table: dict[str, Any], longest: int) -> tuple[Array, Array, Array]:
    keys = [[int(i) - 1 for i in k.split(",")] for k in table["expand_input_ids_dict"][0] if k]
    padded = np.array([[*k, *[-1] * (longest - len(k))] for k in keys])
    rows = [v - 1 for k, v in table["expand_input_ids_dict"][0].items() if k]
    return Array.of(padded), Array.of(np.array(rows)), Array.of(np.array([1, 2]))


@pytest.mark.parametrize(
    ("vocab", "count", "longest"), [(3, 60, 9), (40, 900, 16), (4, 3, 2), (1 << 17, 50, 5)]
)
def test_longest_suffix_against_a_direct_search(vocab: int, count: int, longest: int) -> None:
    table = words(1, count, vocab, longest)
    x = t.Input("x", "i64", "b", (longest + 29,))
    op = LongestSuffix(x, *arrays(table, longest), 0)
    ids = np.random.default_rng(2).integers(0, vocab, (3, longest + 29))
    ids[1, : longest - 1] = -1
    module = Module("suffix", (), (("y", op),))
    want = np.stack([longest_words(table, row[row >= 0]) for row in ids[:2]][:1])[:, longest - 1 :]
    begun = longest_words(table, ids[1, longest - 1 :])
    for opset in (24, 17):
        compiled = Compiled(module, opset=opset)
        got = compiled({"x": ids})["y"]
        assert np.array_equal(got, compiled.meaning({"x": ids})["y"])
        assert np.array_equal(got[0], want[0])
        assert np.array_equal(got[1], begun)


def test_ids_that_no_key_has_match_nothing() -> None:
    """Not even those that another id and its neighbour would be packed to."""
    keys = np.array([[1, -1], [0, 1], [2, 0]])
    op = LongestSuffix(
        t.Input("x", "i64", "b", (40,)), Array.of(keys), Array.of(np.array([5, 6, 7])),
        Array.of(np.array([9])), 3,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 12, (3, 40))
    compiled = Compiled(Module("m", (), (("y", op),)), opset=24)
    got = compiled({"x": ids})["y"]
    assert np.array_equal(got, compiled.meaning({"x": ids})["y"])
    assert {3, 5, 6, 7} == set(got.ravel().tolist())


@pytest.mark.parametrize("count", [20000, pytest.param(128000, marks=pytest.mark.slow)])
def test_every_word_has_its_own_slot(count: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (count, 16))
    keys[np.arange(16) >= rng.integers(1, 12, count)[:, None]] = -1
    keys = np.unique(keys, axis=0)
    found = table_of(Array.of(keys), Array.of(np.arange(len(keys))))
    buckets, spots = found.hashes(keys + 1)
    slots = (spots + found.shift[buckets]) % len(found.words)
    assert len(set(slots.tolist())) == len(keys)
    assert len(found.words) < 2.3 * len(keys)


@pytest.mark.parametrize(
    ("vocab", "longest", "narrow"),
    [
        (4, 9, True),
        (2, 40, True),
        (268, 16, True),
        (2000, 3, True),
        (5000, 3, False),
        (1 << 20, 4, False),
    ],
)
def test_numbers_of_a_table_are_small_where_the_vocabulary_is(
    vocab: int, longest: int, narrow: bool
) -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, vocab, (900, longest))
    keys[np.arange(longest) >= rng.integers(1, longest + 1, 900)[:, None]] = -1
    keys[0] = vocab - 1
    keys = np.unique(keys, axis=0)
    found = table_of(Array.of(keys), Array.of(np.arange(len(keys))))
    assert (found.prime < 2**22) == narrow
    assert narrow or found.prime > 2**31, "which a runtime of 32 bits refuses"
    digit = found.base - 1  # the largest
    bits = 22 if narrow else 63
    assert digit * int(found.factors.max()) < 2**bits
    assert longest * (found.prime - 1) < 2**bits
    assert found.base**found.digits <= 2**bits
    assert found.words.max() < 2**bits
    assert 2 * len(found.values) < 2**bits
    assert found.prime > 4 * max(*found.slots, *found.buckets), "hashes are spread"
    buckets, spots = found.hashes(keys + 1)
    assert buckets.max() < len(found.shift)
    slots = (spots + found.shift[buckets]) % len(found.values)
    assert len(set(slots.tolist())) == len(keys)
    assert found.values[slots].tolist() == list(range(len(keys)))


def test_the_op_in_the_text_form() -> None:
    x = t.Input("x", "i64", "b", (20,))
    op = LongestSuffix(x, *arrays(words(1, 40, 4, 9), 9), 0)
    m = Module("m", (), (("y", op),))
    again = parse(show(m), resources=resources(m))
    assert again.roots[0] is op


def test_the_op_refuses_what_does_not_fit() -> None:
    keys, rows, alone = arrays(words(1, 5, 4, 3), 3)
    with pytest.raises(PccError, match="E110"):
        LongestSuffix(t.Input("x", "i64", "b", (2,)), keys, rows, alone, 0)
    with pytest.raises(PccError, match="E110"):
        LongestSuffix(t.Input("x", "f32", "b", (9,)), keys, rows, alone, 0)
    with pytest.raises(PccError, match="E111"):
        LongestSuffix(t.Input("x", "i64", "b", (9,)), keys, rows, alone, -1)


@pytest.mark.parametrize(
    "change",
    [
        {"expand_input_ids_dict": None},
        {"expand_input_ids_dict": [{}, []]},
        {"expand_input_ids_dict": [{"1,x": 1}, []]},
        {"expand_input_ids_dict": [{"1": 99}, []]},
        {"expand_input_ids_dict": [{"1": 1, "01": 2}, []]},
        {"expand_input_ids_dict": [{"1,1,1,1": 1}, []]},
        {"expand_input_ids_dict": [{"1": 1}, ["a"]]},
        {"expand_input_ids_maxlen": 100000},
    ],
)
def test_a_broken_dictionary_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    data = words(1, 5, 4, 3) | {"model_type": "tpu_llama"} | change
    with pytest.raises(PccError, match="M113"):
        read_ngrams(Config(data, {}, {}, tmp_path / "config.json"), 4, 10)


def test_a_forgotten_word_is_noticed(folder: Path) -> None:
    model = load_model(folder, max_rows=ROWS)
    assert isinstance(model, ByteLlama)
    assert model.ngrams is not None
    short = replace(model.ngrams, keys=model.ngrams.keys[:40], rows=model.ngrams.rows[:40])
    ids = np.random.default_rng(3).integers(0, 5, (1, 60))
    whole, cut = (
        Runner(m, ROWS)(ids, np.array([0]), state_of(m, ROWS, 1))["hidden"]
        for m in (model, replace(model, ngrams=short))
    )
    assert np.abs(whole - cut).max() > 1e-2
