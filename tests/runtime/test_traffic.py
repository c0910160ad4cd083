"""The bytes that a graph must move, against what its module and its model say."""

from __future__ import annotations

from typing import Any

import pytest
import verifiers
from engines import INNER, LAYERS, WIDTH

from pcc.errors import PccError
from pcc.runtime.traffic import Attention, moved, read, traffic
from pcc.stored import Stages
from pcc.tensor.nn import Embedding, Rotary
from pcc.tensor.ops import Const


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {k: verifiers.engine(k, tmp_path_factory.mktemp(k)) for k in ("llama", "byte-llama")}


def test_weights_of_a_llama(engines: dict[str, Any]) -> None:
    """Every matrix once, whatever the graph is called; the head's apart."""
    engine, keys, vocab, n, r = engines["llama"], WIDTH // 2, 258, 4, 3
    layer = WIDTH * (2 * WIDTH + 2 * keys) + 3 * INNER * WIDTH
    body = LAYERS * layer + vocab * WIDTH
    head = (n * r * vocab + (n - 1) * r * r + r) * WIDTH
    for query in ("step", "verify", "decode"):
        found = moved(engine.path, engine.manifest, query, 100, 1)
        norms = (2 * LAYERS + 1) * WIDTH
        assert 4 * body <= found["weights"] <= 4 * (body + norms) + 4096
        assert found["head"] == 0 if query != "step" else found["head"] >= 4 * head
        assert found["head"] <= 4 * head + 4096
        assert found["kv"] == 4 * LAYERS * 2 * keys * 100
    assert moved(engine.path, engine.manifest, "step", 100, 3)["kv"] == 3 * found["kv"]


@pytest.mark.parametrize("query", ["step", "prefill_greedy"])
def test_every_array_of_the_module_is_seen(engines: dict[str, Any], query: str) -> None:
    """Arrays that are read whole and tables are together what the module holds."""
    engine = engines["byte-llama"]
    module = Stages(engine.path, engine.manifest["files"]).module(f"tensor-{query}")
    found = traffic(engine.path, engine.manifest["files"], query)
    nodes = list(module.nodes())
    large = {f"#{n.value.ref}" for n in nodes if isinstance(n, Const) and n.value.value.size > 99}
    words = {f"#{n.table.value.ref}" for n in nodes if isinstance(n, Embedding)}
    turns = {f"#{x.value.ref}" for n in nodes if isinstance(n, Rotary) for x in (n.cos, n.sin)}
    tables = words | turns
    assert len(words) == 2  # of bytes and of subwords
    assert large - tables <= set(found.weights)
    assert not tables & set(found.weights)


def test_rows_that_attention_reads() -> None:
    """Plain, restricted to a window, and EvaByte's: exact rows of its window, and summaries."""
    assert Attention(10).bytes(1000) == 10_000
    assert Attention(10, window=64).bytes(1000) == 640
    assert Attention(10, window=2048, chunk=16).bytes(1024) == 10_240
    assert Attention(10, window=2048, chunk=16).bytes(8192 + 100) == 10 * (100 + 4 * 128)


def test_evabyte_is_read_as_such() -> None:
    text = (
        "  %5 = t.eva_attention %0, %1, %2, %3, %4, %9 {scale=0.5, window=2048, chunk=16}"
        " : f32[b|2,3,4]\n"
    )
    kinds = "".join(
        f'  %{i} = t.input {{key="k{i}"}} : {d}[b|2,{r},4]\n'
        for i, (d, r) in enumerate([("f32", 3), ("f16", 64), ("f16", 64), ("f16", 8), ("f16", 8)])
    )
    (found,) = read(kinds + text).attentions
    assert found == Attention(2 * 2 * 4 * 2, 2048, 16)


def test_a_query_without_ir_is_refused(engines: dict[str, Any]) -> None:
    with pytest.raises(PccError, match="B217"):
        traffic(engines["llama"].path, engines["llama"].manifest["files"], "nothing")
