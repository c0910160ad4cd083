"""Every tensor op through ONNX against its float64 meaning, on edge inputs."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
from graphs import Compiled, agree
from onnx_cases import CASES, Case, feeds, module_of, values

import pcc.tensor
from pcc.backends.onnx.graph import Layout
from pcc.backends.onnx.lower import RULES
from pcc.ir.core import OPS, Op
from pcc.tensor import ops as t

ROOT = Path(__file__).resolve().parents[2]
LEAVES = {t.Input, t.Const}  # graph inputs and initializers
NAMES = [f"{i:03d}-{c.name}" for i, c in enumerate(CASES)]


def tensor_ops() -> set[type[Op]]:
    """All ops of `pcc.tensor`, whether something else has loaded them or not."""
    for found in pkgutil.iter_modules(pcc.tensor.__path__):
        importlib.import_module(f"pcc.tensor.{found.name}")
    return {op for name, op in OPS.items() if name.startswith("t.")}


def test_every_tensor_op_has_a_rule() -> None:
    missing = tensor_ops() - LEAVES - set(RULES)
    assert not missing, f"no ONNX rule: {sorted(op.name for op in missing)}"
    assert set(RULES) <= tensor_ops()


def test_every_tensor_op_has_a_conformance_case() -> None:
    core = {op for op in tensor_ops() if vars(t).get(op.__name__) is op}
    missing = core - LEAVES - {c.op for c in CASES}
    assert not missing, f"no case: {sorted(op.name for op in missing)}"
    # Ops of sequence models have tests of their own, with the models that need them.
    texts = [p.read_text() for p in (ROOT / "tests").rglob("test_*.py")]
    others = {op for op in tensor_ops() - core if op.__module__.startswith("pcc.tensor")}
    unnamed = {op for op in others if not any(re.search(rf"\b{op.__name__}\b", t) for t in texts)}
    assert not unnamed, f"no test: {sorted(op.name for op in unnamed)}"


# Position 1 is chosen only where nothing depends on a context.
PLACES = [(0, "kvcb"), (1, "kvb")]


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize(("position", "batches"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_graph_means_what_the_op_says(
    case: Case, position: int, batches: str, opset: int
) -> None:
    if len(case.operands) == 3:
        batches = batches.replace("v", "")
    module, made = module_of(case, batches)
    compiled = Compiled(module, opset=opset, layout=Layout(position))
    sizes = [(1, 1), (3, 1), (3, 3), (64, 64)] if "c" in batches else [(1, 1), (3, 1), (64, 1)]
    for rows, contexts in sizes:
        feed = feeds(case, made, rows, contexts)
        want, got = compiled.meaning(feed), compiled(feed)
        for name, value in got.items():
            what = f"{name} rows={rows} contexts={contexts}"
            assert value.shape == want[name].shape, what
            agree(want[name], value, tolerance=case.tolerance, what=what)


def test_the_edge_inputs_have_edges() -> None:
    """The generators above make what their names say; otherwise the cases would prove little."""
    log = values("log", 64, (3, 4), 0)
    assert np.isneginf(log).all(axis=-1).any()
    assert (np.isneginf(log).any(axis=-1) & ~np.isneginf(log).all(axis=-1)).any()
    assert not np.isneginf(values("logits", 64, (3, 4), 0)).all(axis=-1).any()
    mass = values("mass", 64, (3, 4), 0)
    assert (mass == 0).all(axis=-1).any()
    assert ((mass > 0).sum(axis=-1) == 1).any()
    assert {0.0, 2.0**-24, 1 - 2.0**-24} <= set(values("uniform", 64, (3,), 0).ravel().tolist())


@pytest.mark.parametrize("op", ["Mul", "Exp"])
def test_a_wrong_node_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test with a wrong lowering fails: it can fail."""

    def wrong(g, n):  # type: ignore[no-untyped-def]
        return g("Add", *(g.values[a] for a in n.args)) if op == "Mul" else g("Sqrt", g.values[n.x])

    monkeypatch.setitem(RULES, {"Mul": t.Mul, "Exp": t.Exp}[op], wrong)
    case = next(c for c in CASES if c.op is {"Mul": t.Mul, "Exp": t.Exp}[op])
    with pytest.raises(AssertionError):
        test_the_graph_means_what_the_op_says(case, 0, "b", 24)
