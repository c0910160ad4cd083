"""Temperature, top-k and nucleus: by definition, on edges, and as the published code computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from toy_law import adjusted

from pcc.backends.onnx.lower import lower
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.interp.run import log_value, run
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.models.proposal import truncated
from pcc.passes import pieces as mk
from pcc.tensor import ops as t
from pcc.tensor.sampling import Temper, Truncate

ROWS = np.array(
    [
        [0.0, 1.0, 2.0, -1.0],
        [2.0, 2.0, 2.0, 2.0],  # all tie
        [-np.inf, 0.5, 0.5, -np.inf],
        [80.0, -80.0, 79.0, 0.0],
    ],
    np.float32,
)
SETTINGS = [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (0.0, 0, 1.0),
    (1e-30, 0, 1.0),
    (-1.0, 0, 1.0),
    (1.0, 1, 1.0),
    (1.0, 2, 1.0),
    (3.0, 3, 0.7),
    (1.0, 0, 0.0),
    (1.0, 0, 0.5),
    (1.0, 9, 1.5),
    (2.0, 0, 0.9),
]


def graph(x_batch: str) -> tuple[Op, dict[str, np.ndarray]]:
    """Return the law of `ROWS` under each setting, one setting per row of the batch."""
    count = len(SETTINGS)
    feed: dict[str, np.ndarray] = {
        "temperature": np.array([s[0] for s in SETTINGS], np.float32),
        "top_k": np.array([s[1] for s in SETTINGS]),
        "top_p": np.array([s[2] for s in SETTINGS], np.float32),
    }
    x: Op = mk.const(ROWS)
    if x_batch:
        x = t.Input("x", "f32", "b", ROWS.shape)
        feed["x"] = np.broadcast_to(ROWS, (count, *ROWS.shape)).copy()
    soft = t.Softmax(Temper(x, t.Input("temperature", "f32", "b", ())))
    law = Truncate(soft, t.Input("top_k", "i64", "b", ()), t.Input("top_p", "f32", "b", ()))
    return law, feed


def through_onnx(op: Op, feed: dict[str, np.ndarray], opset: int) -> np.ndarray:
    model = lower(Module("m", (), (("y", op),)), opset=opset)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]


@pytest.mark.parametrize("opset", [17, 24])
@pytest.mark.parametrize("x_batch", ["", "b"])
def test_law_by_definition(x_batch: str, opset: int) -> None:
    law, feed = graph(x_batch)
    (judged,) = run((law,), feed, Real())
    got = through_onnx(law, feed, opset)
    assert np.abs(got - judged).max() < 1e-6
    assert np.allclose(got.sum(axis=-1), 1, atol=1e-6)
    for i, (temperature, top_k, top_p) in enumerate(SETTINGS):
        for j, row in enumerate(ROWS.astype(np.float64)):
            p = np.exp(row - row.max())
            if temperature <= 1e-20:  # the first largest
                want = np.eye(len(row))[row.argmax()]
                if temperature > 0 and (row == row.max()).sum() > 1:
                    want = (row == row.max()) / (row == row.max()).sum()
            else:
                want = adjusted(p, temperature, top_k, top_p)
            assert np.abs(judged[i, j] - want).max() < 1e-12, (i, j)


def test_a_neutral_row_is_untouched_whatever_its_neighbours() -> None:
    law, feed = graph("b")
    among = through_onnx(law, feed, 24)[0]
    alone = through_onnx(law, {k: v[:1] for k, v in feed.items()}, 24)[0]
    assert np.array_equal(among, alone)


def test_all_neutral_takes_the_short_branch() -> None:
    law, feed = graph("b")
    plain = {**feed, "temperature": np.ones(3, np.float32), "top_k": np.zeros(3, np.int64)}
    plain |= {"top_p": np.ones(3, np.float32), "x": feed["x"][:3]}
    got = through_onnx(law, plain, 24)
    assert np.array_equal(got, through_onnx(t.Softmax(t.Input("x", "f32", "b", (4, 4))), plain, 24))


def test_wrong_operands_are_refused() -> None:
    p = mk.const(np.ones((2, 3), np.float32))
    one, whole = mk.const(np.float32(1)), mk.const(np.int64(0))
    for make in (
        lambda: Temper(p, p),
        lambda: Temper(whole, one),
        lambda: Truncate(p, one, one),
        lambda: Truncate(p, whole, p),
    ):
        with pytest.raises(PccError, match="E110"):
            make()


def test_settings_act_on_parameters_but_not_on_slot_one() -> None:
    """Draft top-p 0: one latent and one token each, but slot 1 keeps its whole law."""
    circuit = templates.cp(3, 3, 4, context=2, seed=1)
    root = truncated(circuit.root)
    x = np.array([[a, b, c] for a in range(4) for b in range(4) for c in range(4)])
    feed = {
        "context": np.array([[0.3, -0.2]]),
        "draft_temperature": np.ones(1),
        "draft_top_p": np.zeros(1),
    }
    p = np.exp(log_value(root, x, None, feed)[:, 0, 0]).reshape(4, 4, 4)
    assert p.sum() == pytest.approx(1)
    assert (p.sum(axis=(1, 2)) > 0).all()
    assert (p.sum(axis=(0, 2)) > 0).sum() == (p.sum(axis=(0, 1)) > 0).sum() == 1


def test_unnormalised_parameters_are_refused() -> None:
    weights = {"emissions": np.full((2, 1, 3), 0.5), "sums": []}
    with pytest.raises(PccError, match="M141"):
        truncated(templates.ff(2, 3, weights=weights).root)


NAMES = ["cp-n4-r4-v16", "hmm-n4-r4-v16", "btree-n4-r4-v16"]


@pytest.mark.parametrize("name", NAMES)
def test_nucleus_of_parameters_as_published(shared: Callable[[str], Path], name: str) -> None:
    """The recorded rule on every parameter, slot 1 included there: so its law is cut here too."""
    data = np.load(shared("oracle/top_p.npz"))
    circuit, e = published(data, name)
    for top_p in (0.9, 0.5, 0.0):
        root = cut_everywhere(circuit)
        tokens = data[f"{name}/top_p{top_p}/tokens"].astype(np.int64)
        feed = {
            "context": e,
            "draft_temperature": np.ones(1),
            "draft_top_p": np.full(1, top_p),
        }
        got = log_value(root, tokens, None, feed)[:, 0, 0]
        want = data[f"{name}/top_p{top_p}/joint_logp_f64"]
        possible = want > -700
        assert np.array_equal(possible, got > -700)
        assert np.abs(got[possible] - want[possible]).max(initial=0) < 1e-6


def published(data: np.lib.npyio.NpzFile, name: str) -> tuple[Circuit, np.ndarray]:
    """Return the recorded head and its feature vector."""
    key = f"{name}/mt_head._categorical_log_probs_heads.0.head.proj"

    def weight(k: str) -> np.ndarray:
        return data[k].astype(np.float32) * data[f"{k}@scale"]

    sums = []
    while (k := f"{name}/mt_head._sum_weights_heads.{len(sums)}.head.proj") in data.files:
        sums.append(weight(k))
    kind = name.split("-")[0]
    emissions = weight(key)
    if kind == "hmm":
        emissions = emissions[::-1]  # published folds run backwards
    n, r, vocab, d = emissions.shape
    weights = {"emissions": emissions, "sums": sums}
    if kind == "ff":
        circuit = templates.ff(n, vocab, context=d, weights=weights)
    else:
        circuit = getattr(templates, kind)(n, r, vocab, context=d, weights=weights)
    return circuit, data[f"{name}/e"]


def cut_everywhere(circuit: Circuit) -> Op:
    """Truncate as drafts do, and slot 1 as well."""
    from pcc.circuit import ops as c
    from pcc.ir.core import rewrite

    top_p = t.Input("draft_top_p", "f32", "b", ())

    def rule(n: Op, _: object) -> Op | None:
        if isinstance(n, t.Softmax):
            return Truncate(n, mk.const(np.int64(0)), top_p)
        return None

    (root,) = rewrite((circuit.root,), rule)
    assert isinstance(root, c.CircuitOp)
    return root
