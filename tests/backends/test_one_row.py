"""Large weights that meet a single vector: a graph of their own for calls with one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import pcc
from pcc.errors import PccError
from pcc.frontends import templates

N, V, D = 4, 256, 256  # n V D floats are one MiB: the smallest weight that is streamed


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("one") / "m.pcc"
    circuit = templates.ff(N, V, context=D, seed=3)
    pcc.compile(circuit, queries=["prefix", "draft"], out=out)
    return pcc.load(out, threads=1)


def test_only_calls_with_one_context_take_it(engine: Any) -> None:
    spec = engine.queries["prefix"]
    assert engine.session_of("prefix", 1) is not engine.session_of("prefix", 2)
    assert engine.session_of("prefix", 2) is engine.session_of("prefix")
    (weight,) = engine.session_of("prefix", 1).get_overridable_initializers()
    assert tuple(weight.shape) == (D, N * V)
    assert [i.name for i in engine.session_of("prefix", 1).get_inputs()] == [
        i.name for i in engine.session_of("prefix").get_inputs()
    ]
    assert not engine.session_of("prefix").get_overridable_initializers()
    one, many = (onnx.load(engine.path / spec[k], load_external_data=False)
                 for k in ("one_row", "graph"))  # fmt: skip
    onnx.checker.check_model(str(engine.path / spec["one_row"]), full_check=True)
    assert [n.op_type for n in one.graph.node] == [n.op_type for n in many.graph.node]


def test_rows_are_the_same_alone_and_together(engine: Any) -> None:
    rng = np.random.default_rng(0)
    context, x = rng.normal(size=(3, D)).astype(np.float32), rng.integers(0, V, (3, N))
    together = engine.run("prefix", x=x, context=context)["log_cond"]
    for row in range(3):
        alone = engine.run("prefix", x=x[row : row + 1], context=context[row : row + 1])
        np.testing.assert_allclose(alone["log_cond"][0], together[row], atol=2e-5)
    shared = engine.run("prefix", x=x, context=context[:1])["log_cond"]  # one context, three rows
    np.testing.assert_allclose(shared[0], together[0], atol=2e-5)
    assert not np.allclose(shared[1], together[1])


def test_weights_are_on_disk_once(engine: Any) -> None:
    sizes = [p.stat().st_size for p in (engine.path / "graphs").iterdir()]
    assert max(sizes) < 1.2 * 4 * N * V * D
    assert sum(sizes) < 1.3 * 4 * N * V * D


def test_small_weights_have_no_second_graph(tmp_path: Path) -> None:
    pcc.compile(templates.ff(2, 8, context=16), queries=["prefix"], out=tmp_path / "m.pcc")
    engine = pcc.load(tmp_path / "m.pcc")
    assert "one_row" not in engine.queries["prefix"]
    assert engine.session_of("prefix", 1) is engine.session_of("prefix")


def test_a_second_graph_outside_the_bundle_is_refused(engine: Any, tmp_path: Path) -> None:
    import shutil

    from shipped import rewrite_manifest

    copy = tmp_path / "copy.pcc"
    shutil.copytree(engine.path, copy)
    rewrite_manifest(copy, queries__prefix__one_row="../other.onnx")
    with pytest.raises(PccError) as found:
        pcc.load(copy)
    assert found.value.code == "B215"
