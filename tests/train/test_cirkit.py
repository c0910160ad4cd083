"""Gradients of the torch circuits against libcirkit's autograd, for structures that it has.

libcirkit is GPL-3.0 and no dependency: `pip install libcirkit==0.3.0` beside the dev extra.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cirkit", reason="libcirkit is not installed: docs/training.md")

from pcc.frontends.mtpc_wiring import LEAVES  # noqa: E402
from pcc.train import config as cfg  # noqa: E402
from pcc.train.head import CircuitHead  # noqa: E402
from pcc.train.nodes import FACTORS, Node  # noqa: E402

N, V, R = 4, 5, 3
KINDS: dict[str, dict[str, Any]] = {
    "ff": {},
    "cp": {},
    "hmm": {},
    "btree": {},
    "interleaved": {"kind": "tree", "regions": "[[0,2],[3,1]]"},
    "caterpillar": {"kind": "tree", "regions": "[[[1,0],3],2]"},
    "repetitions": {"kind": "btree", "repetitions": 2, "shuffle": True},
}


def structure(name: str) -> CircuitHead:
    return CircuitHead(cfg.Head(**({"kind": name, "n": N, "r": R} | KINDS[name])), V, 2)


class Symbolic:
    """The same circuit in libcirkit, layer by layer, its logits given as constants."""

    def __init__(self, head: CircuitHead, emissions: Any, sums: list[Any]) -> None:
        self.head, self.emissions, self.sums = head, emissions, sums
        self.layers: list[Any] = []
        self.inputs: dict[Any, list[Any]] = {}
        self.made: dict[Node, Any] = {}

    def circuit(self) -> Any:
        from cirkit.symbolic.circuit import Circuit

        for v in self.head.circuit.nodes:
            self.made[v] = self._node(v)
        return Circuit(self.layers, self.inputs, [self.made[self.head.circuit.root]])

    def _put(self, layer: Any, children: list[Any]) -> Any:
        self.layers.append(layer)
        if children:
            self.inputs[layer] = children
        return layer

    def _parameter(self, logits: Any) -> Any:
        from cirkit.symbolic.initializers import ConstantTensorInitializer
        from cirkit.symbolic.parameters import Parameter, SoftmaxParameter, TensorParameter

        start = ConstantTensorInitializer(logits)
        tensor = TensorParameter(*logits.shape, initializer=start, learnable=True)
        return Parameter.from_unary(SoftmaxParameter(logits.shape), tensor)

    def _node(self, v: Node) -> Any:
        from cirkit.symbolic.layers import CategoricalLayer, HadamardLayer, SumLayer
        from cirkit.utils.scope import Scope

        if v.layer == LEAVES:
            logits = self.emissions[v.fold]
            scope = Scope([self.head.scope[v.fold]])
            probs = self._parameter(logits)
            layer = CategoricalLayer(scope, len(logits), num_categories=V, probs=probs)
            return self._put(layer, [])
        below = [self.made[p] for p in v.parts]
        units = below[0].num_output_units
        if v.mix:
            w = self._parameter(self.sums[v.layer][v.fold])
            return self._put(SumLayer(units, 1, arity=len(below), weight=w), below)
        if len(below) > 1:
            below = [self._put(HadamardLayer(units, arity=len(below)), below)]
        if v.layer == FACTORS:
            return below[0]
        logits = self.sums[v.layer][v.fold]
        return self._put(SumLayer(units, len(logits), weight=self._parameter(logits)), below)


def gradients(found: list[Any], arrays: list[Any], loss: Callable[[], Any]) -> list[Any]:
    """Return the gradient of the parameter that holds each array, matched by its values."""
    loss().backward()
    out = []
    for a in arrays:
        same = [
            p
            for p in found
            if p.numel() == a.size and np.array_equal(p.detach().reshape(-1), a.reshape(-1))
        ]
        assert len(same) == 1
        assert same[0].grad is not None
        out.append(same[0].grad.numpy().reshape(a.shape))
    return out


@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_those_of_libcirkit(name: str) -> None:
    from cirkit.pipeline import PipelineContext

    head, rng = structure(name), np.random.default_rng(5)
    emissions = rng.normal(size=(len(head.scope), head.r, V)).astype(np.float32)
    sums = [rng.normal(size=s).astype(np.float32) for s in head.shapes]
    x = torch.from_numpy(rng.integers(V, size=(6, N)))
    table = torch.tensor(emissions, requires_grad=True)
    weights = [torch.tensor(w, requires_grad=True) for w in sums]

    def loss() -> Any:
        rows = [torch.log_softmax(w, -1).expand(len(x), *w.shape) for w in weights]
        leaf = head.leaf(table.expand(len(x), *table.shape), x)
        return head.circuit.log_conditionals(leaf, rows).sum()

    loss().backward()
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=False, optimize=False)
    theirs = context.compile(Symbolic(head, emissions, sums).circuit())
    parameters = list(theirs.parameters())
    total = theirs(x).sum()
    assert total.item() == pytest.approx(loss().item(), rel=1e-5)
    arrays = [*emissions, *(fold for w in sums for fold in w)]
    want = gradients(parameters, arrays, lambda: total)
    assert table.grad is not None
    mine = [*table.grad.numpy(), *(f for w in weights for f in w.grad.numpy())]  # type: ignore[union-attr]
    for got, expected in zip(mine, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
        assert np.abs(expected).max() > 1e-3
