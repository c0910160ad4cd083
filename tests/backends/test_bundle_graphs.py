"""What the backend writes for whole queries: valid models, one weight file, any batch size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Compiled, agree, check, session_of
from oracle import compile_query, optimised
from strategies import contexts, evidence, random_circuit

import pcc
from pcc.backends.onnx.lower import lower
from pcc.backends.onnx.weights import INLINE, save_models
from pcc.circuit.circuit import Circuit
from pcc.circuit.ops import CircuitOp, Cpt, Sum
from pcc.circuit.queries import QUERIES
from pcc.frontends import templates
from pcc.interp.reference import gap, reference
from pcc.interp.rounding import bounds
from pcc.ir.core import postorder
from pcc.passes.messages import expand_fused
from pcc.passes.pieces import layer_name

Values = np.ndarray[Any, Any]
DRAWN = ("sample", "mode", "draft")
CARDS = (3, 4, 2, 4, 3)


def circuits() -> Iterator[tuple[str, Circuit]]:
    """Trained circuits of every template and some random ones, with and without a context."""
    yield "ff", templates.ff(5, 4, seed=1)
    yield "cp", templates.cp(5, 4, 3, seed=1)
    yield "hmm", templates.hmm(5, 4, 3, seed=1)
    yield "btree", templates.btree(5, 4, 3, seed=1)
    yield "cp-context", templates.cp(5, 4, 3, seed=1, context=3)
    yield "hmm-context", templates.hmm(5, 4, 3, seed=1, context=3)
    yield "btree-context", templates.btree(5, 4, 3, seed=1, context=3)
    yield "random-3", random_circuit(3)
    yield "random-8", random_circuit(8)


CIRCUITS = dict(circuits())
EVERY = pytest.mark.parametrize("name", CIRCUITS)


def inputs(circuit: Circuit, query: str, rows: int, slots: int) -> dict[str, Values]:
    """Rows with impossible values among them, one context row for each."""
    rng = np.random.default_rng(rows)
    x, observed = evidence(circuit, rows, seed=rows)
    x = x.copy()
    x[::3, 0] = 99  # outside: probability zero
    return {
        "x": x,
        "observed": observed,
        "target": rng.random(x.shape) < 0.5,
        "carry": x[:, 0],
        "u": rng.choice(np.array([0.0, 2.0**-24, 0.3, 0.7, 1 - 2.0**-24], "f4"), (rows, slots)),
        **contexts(circuit, rows, seed=rows),
    }


def slots_of(compiled: Compiled) -> int:
    return next((int(i.shape[1]) for i in compiled.session.get_inputs() if i.name == "u"), 0)


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("query", QUERIES)
@EVERY
def test_every_query_of_every_circuit(name: str, query: str, opset: int) -> None:
    """Valid models; one session for any batch size; no NaN, -inf where the evaluator has it."""
    circuit = CIRCUITS[name]
    if query == "draft" and circuit.n < 2:
        pytest.skip("a draft needs two variables")
    compiled = compile_query(circuit, query, opset=opset)
    for rows in (1, 3, 64):
        feed = inputs(circuit, query, rows, slots_of(compiled))
        want, got = compiled.meaning(feed), compiled(feed)
        for key, value in got.items():
            assert len(value) == rows
            assert not np.isnan(value.astype(float)).any()
            if query not in DRAWN:
                agree(want[key], value, tolerance=2e-5, what=f"{key} rows={rows}")


@pytest.mark.parametrize("name", ["hmm", "btree", "cp-context"])
def test_a_large_batch_is_its_rows(name: str) -> None:
    """A row alone equals the row among thousands."""
    circuit = CIRCUITS[name]
    for query, key in (("prefix", "log_cond"), ("sample", "x")):
        compiled = compile_query(circuit, query)
        feed = inputs(circuit, query, 5000, slots_of(compiled))
        whole = compiled(feed)[key]
        for row in (0, 1, 2500, 4999):
            alone = compiled({k: v[row : row + 1] for k, v in feed.items()})[key]
            agree(alone[0].astype(float), whole[row].astype(float), tolerance=1e-6)
        parts = [
            compiled({k: v[a : a + 1250] for k, v in feed.items()})[key]
            for a in range(0, 5000, 1250)
        ]
        agree(np.concatenate(parts).astype(float), whole.astype(float), tolerance=1e-6)


@EVERY
def test_the_compiled_joint_sums_to_one_or_to_the_evaluator(name: str) -> None:
    circuit = CIRCUITS[name]
    states = np.array(list(itertools.product(*(range(k) for k in circuit.cards))))
    compiled = compile_query(circuit, "loglik")
    feed = {"x": states, **contexts(circuit, 1)}
    want, got = compiled.meaning(feed)["log_prob"], compiled(feed)["log_prob"]
    np.testing.assert_allclose(np.exp(got.astype(float)).sum(), np.exp(want).sum(), rtol=2e-6)
    if not name.startswith("random"):
        np.testing.assert_allclose(np.exp(got.astype(float)).sum(), 1.0, rtol=2e-6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "m.pcc"
    pcc.compile(templates.hmm(6, 8, 40, seed=2), out=path)
    return path


def protos(bundle: Path) -> dict[str, onnx.ModelProto]:
    files = sorted((bundle / "graphs").glob("*.onnx"))
    return {p.stem: onnx.load(str(p), load_external_data=False) for p in files}


def test_the_graphs_of_a_bundle_are_valid(bundle: Path) -> None:
    found = protos(bundle)
    assert set(found) == set(QUERIES)
    for name in found:
        check(onnx.load(str(bundle / "graphs" / f"{name}.onnx")))
        onnx.checker.check_model(str(bundle / "graphs" / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize("opset", [24, 17])
def test_more_folds_than_an_inline_tensor_holds(tmp_path: Path, opset: int) -> None:
    """Shape inference reads the 130 sizes of a Split, which are more than 1 KiB."""
    for context, queries in ((0, ["loglik", "sample"]), (8, ["loglik"])):
        circuit = templates.hmm(130, 2, 4, seed=1, context=context)
        path = tmp_path / f"{context}.pcc"
        pcc.compile(circuit, out=path, queries=queries, opset=opset, validate=False)
        for proto in protos(path).values():
            external = {w.name for w in proto.graph.initializer if w.data_location == 1}
            wide = [n for n in proto.graph.node if n.op_type == "Split" and len(n.output) > 128]
            assert wide
            assert not external & {name for n in wide for name in n.input}
    assert pcc.verify(path, rows=1).ok


def test_one_weight_file_holds_equal_tensors_once(bundle: Path) -> None:
    places: dict[tuple[int, int], int] = {}
    for proto in protos(bundle).values():
        for w in proto.graph.initializer:
            if w.data_location != onnx.TensorProto.EXTERNAL:
                assert len(w.raw_data) < INLINE or len(w.dims) < 2
                continue
            where = {e.key: e.value for e in w.external_data}
            assert where["location"] == "weights.bin"
            spot = (int(where["offset"]), int(where["length"]))
            assert spot[0] % 64 == 0
            places[spot] = places.get(spot, 0) + 1
    data = (bundle / "graphs" / "weights.bin").read_bytes()
    blocks = [data[a : a + size] for a, size in places]
    assert len(set(blocks)) == len(blocks)  # no two places hold the same bytes
    assert max(places.values()) > 1  # some are read by several graphs
    ends = sorted((a, a + size) for a, size in places)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(ends))
    assert [p.name for p in (bundle / "graphs").iterdir() if p.suffix != ".onnx"] == ["weights.bin"]


def test_equal_arrays_of_two_graphs_are_written_once(tmp_path: Path) -> None:
    circuit = CIRCUITS["btree"]
    modules = [compile_query(circuit, q).module for q in ("loglik", "loglik")]
    models = {f"g{i}": lower(m) for i, m in enumerate(modules)}
    save_models(models, tmp_path)
    once = (tmp_path / "weights.bin").stat().st_size if (tmp_path / "weights.bin").exists() else 0
    save_models({"alone": lower(modules[0])}, tmp_path, weights="alone.bin")
    assert once == (tmp_path / "alone.bin").stat().st_size


def test_every_node_says_where_it_comes_from(bundle: Path) -> None:
    for proto in protos(bundle).values():
        names = [n.name for n in proto.graph.node]
        assert len(set(names)) == len(names)
        for node in proto.graph.node:
            props = {p.key: p.value for p in node.metadata_props}
            assert props.keys() >= {"pcc.op", "pcc.layer"}, node.name
            assert props["pcc.op"].startswith("t.") or props["pcc.op"] == "output"
            assert props["pcc.layer"], node.name
        model = {p.key: p.value for p in proto.metadata_props}
        assert model["pcc.query"] in QUERIES
        assert model["pcc.circuit"]
        assert proto.producer_name == "pcc"


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["hmm", "btree", "hmm-context", "btree-context"])
def test_nodes_name_their_circuit_layers(name: str, query: str) -> None:
    """Nearly every node names a circuit layer, and every layer with weights is named."""
    root = optimised(CIRCUITS[name], maximise=query == "mode")
    layers = {layer_name(n) for n in postorder(root) if isinstance(n, CircuitOp)}
    layers |= {layer_name(n) for n in postorder(expand_fused(root)) if isinstance(n, CircuitOp)}
    proto = compile_query(CIRCUITS[name], query).proto
    found = [{p.key: p.value for p in n.metadata_props} for n in proto.graph.node]
    inner = [p for p in found if p["pcc.op"] not in ("t.input", "output")]
    named = [p["pcc.layer"] for p in inner if p["pcc.layer"].startswith("c.")]
    assert set(named) <= layers
    # The rest is the query's own arithmetic, after the circuit.
    assert len(named) >= 0.6 * len(inner), (len(named), len(inner))
    scopes = {p.split(" ")[1] for p in named}
    weighted = (n for n in postorder(root) if isinstance(n, Sum | Cpt))
    assert {layer_name(n).split(" ")[1] for n in weighted} <= scopes


def test_inputs_and_outputs_have_the_documented_names(bundle: Path) -> None:
    for query, proto in protos(bundle).items():
        taken = [i.name for i in proto.graph.input]
        assert taken == list(QUERIES[query].inputs)
        outs = [o.name for o in proto.graph.output]
        assert outs == [f"{o}_out" if o in taken else o for o, _, _ in QUERIES[query].outputs]
        for value in (*proto.graph.input, *proto.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_bundle_verifies(bundle: Path) -> None:
    report = pcc.verify(bundle)
    assert report.ok, [c for c in report.checks if not c.ok]
    assert {c.query for c in report.checks} == set(QUERIES)


@pytest.mark.parametrize("context", [0, 4])
def test_bundles_of_many_variables_verify(tmp_path: Path, context: int) -> None:
    """At log p = -1000 two neighbours of float32 are 6e-5 apart; 192 sums round that often."""
    circuit, queries = templates.ff(192, 200, context=context), ["loglik", "conditional", "mode"]
    made = pcc.compile(circuit, out=tmp_path / "m.pcc", queries=queries, validate=False)
    report = pcc.verify(made.path)
    assert report.ok, report.checks
    assert max(c.error for c in report.checks) > 5e-5
    assert max(c.bound for c in report.checks) < 5e-3
    numerics = made.manifest["numerics"]
    assert all(numerics["max_abs_error"][q] <= numerics["bound"][q] for q in queries)


def test_a_conditional_is_bound_by_the_joints_that_it_divides() -> None:
    x = np.zeros((1, 2), np.int64)
    circuit = templates.ff(2, 3)
    given = {"x": x, "observed": np.array([[True, False]]), "target": np.array([[False, True]])}
    log = np.log(1e-30)
    (far,) = bounds(circuit, "prefix", given, {"log_cond": np.array([[log, -0.1]])}).values()
    np.testing.assert_allclose(far, 5e-5 + 2 * 2**0.5 * 2**-24 * (0.1 - log), rtol=1e-3)
    (near,) = bounds(circuit, "conditional", given, {"log_prob": np.array([0.0])}).values()
    first = -reference(circuit, "marginal", given)["log_prob"]
    np.testing.assert_allclose(near - 5e-5, 2 * 2**0.5 * 2**-24 * first, rtol=1e-6)


def test_logits_may_be_minus_infinity_but_not_a_whole_row(tmp_path: Path) -> None:
    """Truncated logits give zero probabilities; a row that leaves nothing is refused."""
    circuit = templates.hmm(3, 2, 4, seed=1, context=3)
    queries = ["loglik", "conditionals", "sample"]
    pcc.compile(circuit, out=tmp_path / "m.pcc", queries=queries, parameters="logits")
    engine, rng = pcc.load(tmp_path / "m.pcc", threads=1), np.random.default_rng(4)
    logits = {
        i["name"]: rng.normal(size=(8, *i["shape"][1:])).astype(np.float32)
        for i in engine.queries["loglik"]["inputs"]
        if "logits" in i["name"]
    }
    slots = len(engine.queries["sample"]["random"]["slots"])
    for a in logits.values():
        a[:, ..., 1] = -np.inf
    x = np.tile(np.array([[0, 2, 3]]), (8, 1))
    x[::2, 1] = 1  # cut away
    joint = engine.run("loglik", x=x, **logits)["log_prob"]
    assert np.isneginf(joint[::2]).all()
    assert np.isfinite(joint[1::2]).all()
    rows = engine.run("conditionals", x=x[1::2], **{k: v[1::2] for k, v in logits.items()})
    assert not np.isnan(rows["log_cond"]).any()
    assert np.isneginf(rows["log_cond"][..., 1]).all()
    u = rng.random((8, slots), dtype=np.float32)
    assert (engine.run("sample", u=u, **logits)["x"] != 1).all()
    for name in logits:
        gone = {k: v.copy() for k, v in logits.items()}
        gone[name][(2, *[0] * (gone[name].ndim - 2))] = -np.inf
        with pytest.raises(pcc.PccError, match="R105"):
            engine.run("loglik", x=x, **gone)


def test_a_changed_weight_is_noticed_by_the_samples() -> None:
    """The stored samples would show a graph that computes something else."""
    circuit = CIRCUITS["hmm"]
    compiled = compile_query(circuit, "loglik")
    feed = inputs(circuit, "loglik", 3, 0)
    feed["x"] = np.clip(feed["x"], 0, 1)
    model = ir.from_proto(compiled.proto)
    for value in model.graph.initializers.values():
        a = value.const_value.numpy()  # type: ignore[union-attr]
        if a.dtype == np.float32 and a.ndim > 1:
            value.const_value = ir.tensor((a * np.float32(1.01)).astype(np.float32))
    wrong = session_of(ir.to_proto(model)).run(None, {"x": feed["x"]})[0]
    assert gap(compiled.meaning(feed)["log_prob"], wrong) > 1e-3
