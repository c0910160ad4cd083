"""The published accept routine on its recorded cases, where the rule is the same.

Recorded: draft tokens x_1..x_n with q(x_i | x_<i), laws p_1..p_{n+1}, uniforms; x_i stays while
log u <= log p_i - log q_i. There x_1 is a draft too; pcc's first token is the carry, already
decided. So a recorded case is a window of n + 1 tokens with any carry in front. Differences: a tie
is kept there and rejected here (p = 0 must never stay); the residual is clamped to 1e-15 there and
to 0 here; and the loop around the routine drops the extra token after an accepted draft, which is
not exact and is not done here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_sampling import published

from pcc.backends.onnx.lower import lower
from pcc.circuit.circuit import Circuit
from pcc.circuit.queries import Query
from pcc.interp.run import run
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.models import acceptance as ac
from pcc.passes.manager import Manager
from pcc.passes.pipelines import tensor_pipeline
from pcc.tensor import ops as t

NAMES = ["ff-n4-r1-v16", "cp-n8-r4-v16", "hmm-n4-r4-v16", "btree-n8-r4-v16"]


def through_onnx(outputs: dict[str, Op], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    model = lower(Module("m", (), tuple(outputs.items())))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(list(outputs), {i.name: feed[i.name] for i in session.get_inputs()})


def conditionals(circuit: Circuit, x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """q(x_i = v | x_<i) in float64."""
    given = t.Input("x", "i64", "b", (circuit.n,))
    query = Query(circuit.root, (given,), "conditionals", "log_cond", max(circuit.cards))
    module = Module("q", circuit.cards, (("log_cond", query),))
    module = Manager(validate=False).run(module, tensor_pipeline())
    (logs,) = run(module.roots, {"x": x, "context": e.astype(np.float64)}, Real())
    return np.exp(logs)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_decisions(shared: Callable[[str], Path], name: str) -> None:
    data = np.load(shared("oracle/acceptance.npz"))
    circuit, e = published(data, name)
    tokens = data[f"{name}/tokens"].astype(np.int64)
    cases, n = tokens.shape
    q = conditionals(circuit, tokens, e)
    steps = np.diff(data[f"{name}/prefix_logp"], axis=1, prepend=0)
    drawn = np.take_along_axis(q, tokens[..., None], axis=2)[..., 0]
    assert np.abs(np.log(drawn) - steps).max() < 1e-4  # the same q, as recorded in fp32
    vocab = q.shape[2]
    logits = t.Input("logits", "f32", "b", (n + 1, vocab))
    draft_q = t.Input("draft_q", "f32", "b", (n, vocab))
    window = t.Input("window", "i64", "b", (n + 1,))
    u = t.Input("u", "f32", "b", (n + 1,))
    p = t.Softmax(logits)
    verdict = ac.sampled(p, draft_q, window, u)
    mass = ac.residual(p, draft_q, verdict.committed)
    feed = {
        "logits": data[f"{name}/logits"].astype(np.float32),
        "draft_q": q.astype(np.float32),
        "window": np.concatenate([np.zeros((cases, 1), np.int64), tokens], axis=1),
        "u": np.concatenate([data[f"{name}/noise"], np.full((cases, 1), 0.5)], 1).astype("f4"),
    }
    outs: dict[str, Op] = {"committed": verdict.committed, "mass": mass, "carry": verdict.carry}
    committed, rest, carry = through_onnx(outs, feed)
    accepted = data[f"{name}/accepted"]
    assert np.array_equal(committed - 1, accepted)
    assert len(np.unique(accepted)) > 3  # many outcomes, not one
    law = rest[:, 0] / rest[:, 0].sum(axis=1, keepdims=True)
    assert np.abs(law - data[f"{name}/last_probs"]).max() < 2e-5
    assert (law[np.arange(cases), carry] > 0).all()
    assert (law[np.arange(cases), data[f"{name}/last_token"].astype(int).ravel()] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decisions(shared: Callable[[str], Path], name: str) -> None:
    data = np.load(shared("oracle/acceptance.npz"))
    tokens = data[f"{name}/argmax_tokens"].astype(np.int64)
    laws = data[f"{name}/argmax_logits"].astype(np.float32)
    cases, n = tokens.shape
    logits = t.Input("logits", "f32", "b", laws.shape[1:])
    window = t.Input("window", "i64", "b", (n + 1,))
    verdict = ac.greedy(logits, window)
    feed = {
        "logits": laws,
        "window": np.concatenate([np.zeros((cases, 1), np.int64), tokens], axis=1),
    }
    outs = {"committed": verdict.committed, "carry": verdict.carry}
    committed, carry = through_onnx(outs, feed)
    assert np.array_equal(committed - 1, data[f"{name}/argmax_accepted"])
    assert np.array_equal(carry, data[f"{name}/argmax_next"].astype(int).ravel())
