"""Step graphs: names and shapes, the evaluator, frozen rows, greedy text, options, refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import head
from toy import Toy

from pcc.backends.onnx.lower import lower
from pcc.circuit import ops as c
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.interp.run import log_value, run
from pcc.ir.core import postorder, tensor
from pcc.ir.semiring import Real
from pcc.models import proposal as pr
from pcc.models.proposal import ff_from_heads
from pcc.models.step import OPTIONAL, StepGraph, StepOptions, Steps, step_graphs
from pcc.passes.manager import Manager
from pcc.tensor import ops as t

N, V = 3, 3
SETTINGS = ["temperature", "top_k", "top_p", "draft_temperature", "draft_top_p"]


class Compiled:
    """A graph in ONNX Runtime."""

    def __init__(self, graph: StepGraph, opset: int = 24) -> None:
        self.graph = graph
        model = lower(graph.module, opset=opset, inputs=graph.inputs, symbols=graph.symbols)
        self.session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.names = [o.name for o in self.session.get_outputs()]

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {i.name: feed[i.name] for i in self.session.get_inputs()}
        return dict(zip(self.names, self.session.run(None, given), strict=True))


def inputs(graph: StepGraph, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Return random inputs, with settings over and beyond their ranges."""
    rng = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for i in graph.inputs:
        shape = (rows, *i.shape)
        if i.key == "draft_q":
            feed[i.key] = rng.dirichlet(np.ones(i.shape[-1]), shape[:-1]).astype(np.float32)
        elif i.key in ("temperature", "draft_temperature"):
            feed[i.key] = rng.choice([0.0, 0.5, 1.0, 2.0], shape).astype(np.float32)
        elif i.dtype == "f32":
            feed[i.key] = rng.random(shape).astype(np.float32)
        elif i.dtype == "i64":
            feed[i.key] = rng.integers(0, V, shape)
        else:
            feed[i.key] = rng.random(shape) < 0.7
    return feed


@pytest.mark.parametrize(
    ("kind", "proposal", "mode", "opset"),
    [
        ("ff", "full", "max-product", 24),
        ("cp", "full", "latent-first", 17),
        ("hmm", "latent-first", "max-product", 24),
        ("btree", "full", "max-product", 24),
        ("btree", "latent-first", "latent-first", 17),
        ("hmm", "full", "stepwise", 24),
        ("btree", "full", "stepwise", 17),
    ],
)
def test_graphs_mean_what_the_evaluator_says(
    kind: str, proposal: str, mode: str, opset: int
) -> None:
    options = StepOptions(proposal=proposal, draft_mode=mode, extras=OPTIONAL)
    graphs = step_graphs(
        Toy(V, split=True), head(kind, N, 2, V), max_seq=32, chunk=4, options=options
    )
    for name, graph in graphs.items():
        feed = inputs(graph, 7, 1)
        got = Compiled(graph, opset)(feed)
        want = run(graph.module.roots, feed, Real())
        for (key, _), y in zip(graph.module.outputs, want, strict=True):
            assert got[key].shape == np.shape(y), (name, key)
            assert not np.isnan(got[key].astype(float)).any()
            assert np.abs(got[key].astype(float) - y.astype(float)).max() < 2e-5, (name, key)


@pytest.mark.parametrize("opset", [17, 24])
def test_graphs_pass_the_onnx_checker(opset: int) -> None:
    """Types and shapes inside the branches of `If` too."""
    graphs = step_graphs(Toy(V), head("hmm", N, 2, V), max_seq=9, chunk=4)
    for graph in graphs.values():
        model = lower(graph.module, opset=opset, inputs=graph.inputs, symbols=graph.symbols)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_names_are_those_of_the_contract() -> None:
    graphs = step_graphs(Toy(V), head("cp", N, 2, V), max_seq=32, chunk=4)
    names = {k: [i.key for i in g.inputs] for k, g in graphs.items()}
    assert names["step"] == [
        "window", "draft_q", "length", "active", *SETTINGS, "u", "past.memory",
    ]  # fmt: skip
    assert names["step_greedy"] == ["window", "length", "active", "past.memory"]
    assert names["prefill"] == ["input_ids", "valid", "length", *SETTINGS, "u", "past.memory"]
    assert names["verify"] == ["input_ids", "length", "past.memory"]
    outs = {k: {o for o, _ in g.module.outputs} for k, g in graphs.items()}
    common = {"next_window", "next_length", "emitted", "present.memory"}
    assert outs["step"] == common | {"n_emit", "next_draft_q"}
    assert outs["step_greedy"] == common | {"n_emit"}
    assert outs["prefill"] == common | {"next_draft_q"}
    assert outs["verify"] == {"logits", "hidden_states", "present.memory"}
    roles = [s.role for s in graphs["step"].slots]
    assert roles == ["accept", "accept", "carry", "latent", "token", "token"]
    assert [s.role for s in graphs["prefill"].slots] == roles[2:]


def test_a_frozen_row_does_not_move_and_rows_are_independent() -> None:
    graph = Steps(Toy(V, split=True), head("hmm", N, 2, V), 40).step()
    step, feed = Compiled(graph), inputs(graph, 9, 4)
    out = step(feed)
    off = ~feed["active"]
    assert off.any()
    assert (out["n_emit"][off] == 0).all()
    assert (out["emitted"][off] == -1).all()
    for name in ("window", "draft_q", "length"):
        assert np.array_equal(out[f"next_{name}"][off], feed[name][off])
    for name in ("memory", "draft_memory"):
        assert np.array_equal(out[f"present.{name}"][off], feed[f"past.{name}"][off])
    for i in range(9):
        alone = step({k: v[i : i + 1] for k, v in feed.items()})
        assert all(np.array_equal(alone[k][0], out[k][i]) for k in out)


def test_emitted_tokens_and_their_log_probs() -> None:
    options = StepOptions(extras=OPTIONAL)
    graph = Steps(Toy(V), head("cp", N, 2, V), 40, options).step()
    feed = inputs(graph, 40, 8) | {"active": np.ones(40, bool)}
    out = Compiled(graph)(feed)
    logs = out["logits"] - np.log(np.exp(out["logits"]).sum(axis=-1, keepdims=True))
    assert len(set(out["n_emit"])) == N
    for i, s in enumerate(out["n_emit"]):
        said = out["emitted"][i]
        assert np.array_equal(said[: s - 1], feed["window"][i, 1:s])
        assert said[s - 1] == out["next_window"][i, 0]
        assert (said[s:] == -1).all()
        assert (out["margin"][i, : s - 1] > 0).all()
        assert s == N or out["margin"][i, s - 1] <= 0
        assert np.allclose(out["log_probs"][i, :s], logs[i, range(s), said[:s]], atol=1e-5)
        assert (out["log_probs"][i, s:] == 0).all()


@pytest.mark.parametrize("mode", pr.GREEDY_KINDS)
@pytest.mark.parametrize("kind", ["ff", "cp", "hmm", "btree"])
def test_greedy_text_is_the_autoregressive_text(kind: str, mode: str) -> None:
    toy, prompts = Toy(V, split=True), [[0], [1, 2], [2, 2, 1], [1]]
    seed = 7 if mode == "stepwise" else 3  # drafts of which some are right
    work = Steps(toy, head(kind, N, 2, V, seed), 40, StepOptions(draft_mode=mode))
    prefill, step = Compiled(work.prefill_greedy(3)), Compiled(work.step_greedy())
    state = {f"past.{s.name}": np.zeros((4, *s.shape), np.float32) for s in work.states}
    feed = {
        "input_ids": np.array([p + [0] * (3 - len(p)) for p in prompts]),
        "valid": np.array([len(p) for p in prompts]),
        "length": np.zeros(4, np.int64),
    }
    out = prefill(feed | state)
    said = [[int(x)] for x in out["emitted"][:, 0]]
    counts = []
    while min(map(len, said)) < 24:
        state = {k: out["present." + k.removeprefix("past.")] for k in state}
        now = {"window": out["next_window"], "length": out["next_length"]}
        out = step(now | state | {"active": np.ones(4, bool)})
        counts += out["n_emit"].tolist()
        for row, e, s in zip(said, out["emitted"], out["n_emit"], strict=True):
            row += e[:s].tolist()
        assert (
            out["next_length"] == [len(p) + len(r) - 1 for p, r in zip(prompts, said, strict=True)]
        ).all()
    for prompt, row in zip(prompts, said, strict=True):
        text = list(prompt)
        for token in row:
            assert token == int(np.argmax(toy.law(text)))
            text.append(token)
    assert min(counts) == 1
    assert max(counts) > 1


def joint_latents(circuit: Circuit, feed: dict[str, np.ndarray]) -> np.ndarray:
    """p(z, x_1 = carry) `[B, r]` (cp) or `[B, r, r, r]` (hmm with n = 3), from the parameters."""
    sums = [n for n in postorder(circuit.root) if isinstance(n, c.Sum)]
    *steps, first = run(tuple(n.w for n in sums), feed, Real())
    (p,) = run((leaf_of(circuit).p,), feed, Real())
    start = first[:, 0, 0] * p[np.arange(len(p)), 0, :, feed["carry"]]
    if not steps:
        return start
    last, middle = steps
    return np.einsum("bi,bij,bjk->bijk", start, middle[:, 0], last[:, 0])


def leaf_of(circuit: Circuit) -> c.Categorical:
    return next(n for n in postorder(circuit.root) if isinstance(n, c.Categorical))


@pytest.mark.parametrize("kind", ["cp", "hmm"])
def test_latent_first_greedy_takes_the_likeliest_latents(kind: str) -> None:
    """By enumeration: argmax_z p(z, carry), then argmax_x of each chosen expert."""
    circuit, rng = head(kind, 3, 3, 4, seed=11), np.random.default_rng(0)
    draft = pr.greedy(circuit, Manager(), "latent-first")
    feed = {"carry": np.arange(4).repeat(10), "context": rng.normal(size=(40, 5)) * 3}
    (x,) = run(draft.module.roots, feed, Real())
    joint = joint_latents(circuit, feed)
    (p,) = run((leaf_of(circuit).p,), feed, Real())
    choices = set()
    for row in range(40):
        z = np.unravel_index(joint[row].argmax(), joint.shape[1:])
        z = z if len(z) == 3 else (z[0],) * 3
        choices.add(z)
        assert x[row].tolist() == [int(p[row, i, z[i]].argmax()) for i in (1, 2)]
    assert len(choices) > 2


@pytest.mark.parametrize("kind", ["cp", "hmm"])
def test_latent_first_draws_from_the_posterior(kind: str) -> None:
    """E_z q(x | z) over a grid of uniforms is the circuit's conditional law of the second token."""
    circuit = head(kind, 3, 3, 4, seed=11)
    draft = pr.sampled(circuit, Manager(), "latent-first", truncation=False)
    assert draft.slots[0].role == "latent"
    cells, e = 40_000, np.random.default_rng(5).normal(size=(1, 5)) * 2
    u = np.random.default_rng(1).random((cells, len(draft.slots)))
    feed = {"carry": np.full(cells, 2), "context": e, "u": u}
    x, q = run(draft.module.roots, feed, Real())
    assert q.shape == (cells, 2, 4)
    joint = joint_latents(circuit, {"carry": np.array([2]), "context": e})[0]
    (p,) = run((leaf_of(circuit).p,), feed, Real())
    over = joint if joint.ndim == 1 else joint.sum(axis=(0, 2))
    want = over / over.sum() @ p[0, 1]
    assert np.abs(q[:, 0].mean(axis=0) - want).max() < 0.01
    assert np.abs(np.bincount(x[:, 0], minlength=4) / cells - want).max() < 0.01


def test_latent_first_reads_few_experts() -> None:
    """R + n - 1 of n r experts: the weights of the others are read by no product."""
    steps = Steps(Toy(V), head("cp", 4, 8, V), 40, StepOptions(proposal="latent-first"))
    module = steps.sampled().module
    notes = [line for r in steps.manager.records for line in r.notes]
    assert any("11 of 32 experts" in line for line in notes)
    products = [n for n in module.nodes() if isinstance(n, t.Contract) and n.eq[0] == "d"]
    sizes = sorted(int(np.prod(tensor(n).shape[:-1])) for n in products)
    assert sizes == [1, 3, 8]  # the root's weights, three chosen experts, eight of slot 1


def test_without_truncation_the_settings_are_no_inputs() -> None:
    graphs = step_graphs(
        Toy(V), head("cp", N, 2, V), max_seq=9, chunk=2, options=StepOptions(truncation=False)
    )
    names = {i.key for g in graphs.values() for i in g.inputs}
    assert not names & {"draft_temperature", "draft_top_p"}
    assert {"temperature", "top_k", "top_p"} <= names


def test_prediction_heads_as_a_proposal() -> None:
    heads = np.random.default_rng(0).normal(size=(N, V, 5))
    circuit = ff_from_heads(heads, "own-heads")
    e = np.random.default_rng(1).normal(size=(6, 5))
    z = np.einsum("nvd,bd->bnv", heads.astype(np.float32).astype(float), e)
    logs = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    x = np.random.default_rng(2).integers(0, V, (6, N))
    want = np.take_along_axis(logs, x[..., None], axis=2).sum(axis=(1, 2))
    got = log_value(circuit.root, x, None, {"context": e})[:, 0, 0]
    assert np.allclose(got, want, atol=1e-12)
    assert step_graphs(Toy(V), circuit, max_seq=9, chunk=2)["step"].slots[-1].role == "token"
    assert circuit.with_logits().inputs().keys() == {"emission_logits"}
    with pytest.raises(PccError, match="M140"):
        ff_from_heads(heads[0])


@pytest.mark.parametrize(
    ("code", "circuit", "options"),
    [
        ("M145", lambda: templates.cp(3, 2, 4, context=5), {}),
        ("M147", lambda: templates.cp(3, 2, 3, context=6), {}),
        ("M146", lambda: templates.cp(3, 2, 3, context=5).with_logits(), {}),
        ("E134", lambda: templates.cp(1, 2, 3, context=5), {}),
        ("M142", lambda: templates.cp(3, 2, 3, context=5), {"proposal": "half"}),
        ("M142", lambda: templates.cp(3, 2, 3, context=5), {"draft_mode": "best"}),
        ("M143", lambda: templates.cp(3, 2, 3, context=5), {"extras": ("loss",)}),
    ],
)
def test_refusals(code: str, circuit, options: dict) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PccError, match=code):
        step_graphs(Toy(3), circuit(), max_seq=9, chunk=2, options=StepOptions(**options))
