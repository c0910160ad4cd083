"""Ops of sequence models: against torch's functions, through both opsets, and what they reject."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Compiled, agree
from onnx_cases import Case, feeds, module_of
from torch.nn import functional

from pcc.backends.onnx.lower import lower
from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.semiring import LogReal
from pcc.targets import TARGETS
from pcc.tensor import nn
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)


def const(*shape: int) -> t.Const:
    return t.Const(Array.of(RNG.normal(size=shape).astype(np.float32)))


def table(rows: int, width: int) -> t.Const:
    return t.Const(Array.of(RNG.uniform(-1, 1, (rows, width)).astype(np.float32)))


W5, B5, TABLE = const(5), const(5), const(7, 3)
COS, SIN = table(11, 2), table(11, 2)
CASES = [
    Case(nn.RmsNorm, (("finite", (3, 5)),), lambda x: nn.RmsNorm(x, W5, 1e-5)),
    Case(nn.RmsNorm, (("finite", (2, 3, 5)),), lambda x: nn.RmsNorm(x, W5, 1e-2)),
    Case(nn.RmsNorm, (("finite", (5,)),), lambda x: nn.RmsNorm(x, W5, 1e-5)),
    Case(nn.LayerNorm, (("finite", (3, 5)),), lambda x: nn.LayerNorm(x, W5, B5, 1e-5)),
    Case(nn.Silu, (("finite", (3, 5)),), nn.Silu),
    Case(nn.Gelu, (("finite", (3, 5)),), nn.Gelu),
    Case(nn.Relu, (("finite", (3, 5)),), nn.Relu),
    Case(nn.Embedding, (("index:7", (4,)),), lambda i: nn.Embedding(TABLE, i)),
    Case(nn.Embedding, (("index:7", ()),), lambda i: nn.Embedding(TABLE, i)),
    Case(nn.Embedding, (("index:7", (2, 3)),), lambda i: nn.Embedding(TABLE, i)),
    Case(
        nn.Rotary,
        (("finite", (3, 2, 4)), ("index:11", (2,))),
        lambda x, p: nn.Rotary(x, p, COS, SIN),
    ),
    Case(
        nn.Rotary,
        (("finite", (1, 2, 7)), ("index:11", (2,))),
        lambda x, p: nn.Rotary(x, p, COS, SIN),
    ),
    Case(
        nn.CacheWrite,
        (("finite", (2, 9, 3)), ("finite", (2, 4, 3)), ("index:6", ())),
        nn.CacheWrite,
    ),
    Case(
        nn.CacheWrite,
        (("finite", (1, 2, 3)), ("finite", (1, 2, 3)), ("index:1", ())),
        nn.CacheWrite,
    ),
    Case(nn.SortRank, (("finite", (3, 6)),), nn.SortRank),
    Case(nn.SortRank, (("mass", (2, 9)),), nn.SortRank),
    Case(nn.SortRank, (("logits", (1,)),), nn.SortRank),
]


def attention_cases() -> list[Case]:
    """Heads alone and shared, widths of keys and values apart, windows, one position and many."""
    out = []
    for heads, shared, count, rows, window in (
        (2, 2, 3, 9, 0), (4, 2, 3, 9, 0), (6, 2, 1, 5, 0), (3, 1, 4, 4, 0),
        (4, 2, 3, 9, 2), (1, 1, 3, 8, 1), (2, 1, 2, 9, 30),
    ):  # fmt: skip
        operands = (
            ("finite", (heads, count, 4)),
            ("finite", (shared, rows, 4)),
            ("finite", (shared, rows, 3)),
        )

        def make(q: Op, k: Op, v: Op, count: int = count, window: int = window) -> Op:
            last = tensor_rows(k) - count
            start = t.Input("start", "i64", "b", ())
            return nn.CachedAttention(q, k, v, t.Remainder(start, last + 1), 0.4, window)

        out.append(Case(nn.CachedAttention, operands, make))
    return out


def tensor_rows(k: Op) -> int:
    return int(k.type.shape[1])  # type: ignore[union-attr]


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_graph_means_what_the_op_says(case: Case, opset: int) -> None:
    batches = "kvcb" if len(case.operands) < 3 else "vcb"
    module, made = module_of(case, batches)
    compiled = Compiled(module, opset=opset)
    for rows, contexts in ((1, 1), (3, 1), (3, 3)):
        feed = feeds(case, made, rows, contexts)
        want, got = compiled.meaning(feed), compiled(feed)
        for name, value in got.items():
            assert value.shape == want[name].shape
            agree(want[name], value, tolerance=4e-6, what=f"{name} {rows} {contexts}")


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("case", attention_cases(), ids=lambda c: c.name)
def test_attention_means_the_same_in_every_form(case: Case, opset: int) -> None:
    module, made = module_of(case, "vb")
    compiled = Compiled(module, opset=opset)
    for rows in (1, 4):
        feed = feeds(case, made, rows, 1) | {"start": RNG.integers(0, 50, rows)}
        want, got = compiled.meaning(feed), compiled(feed)
        for name, value in got.items():
            agree(want[name], value, tolerance=4e-6, what=f"{name} {rows}")


def evaluated(op: Op, **feed: Values) -> Values:
    return run((op,), feed, LogReal())[0]


def noise(*shape: int) -> Values:
    return RNG.normal(size=shape)


def test_norms_and_activations_are_those_of_torch() -> None:
    x, w, b = noise(2, 3, 5), const(5), const(5)
    arg, data = t.Input("x", "f32", "b", (3, 5)), torch.tensor(x)
    weight, bias = (torch.tensor(c.value.value, dtype=torch.float64) for c in (w, b))
    pairs = {
        nn.RmsNorm(arg, w, 0.01): functional.rms_norm(data, (5,), weight, 0.01),
        nn.LayerNorm(arg, w, b, 0.01): functional.layer_norm(data, (5,), weight, bias, 0.01),
        nn.Silu(arg): functional.silu(data),
        nn.Gelu(arg): functional.gelu(data),
        nn.Relu(arg): functional.relu(data),
    }
    for op, want in pairs.items():
        np.testing.assert_allclose(evaluated(op, x=x), want.numpy(), atol=1e-14, err_msg=op.name)


def test_silu_survives_large_numbers() -> None:
    x = np.array([[-1e4, -80.0, 0.0, 80.0, 1e4]])
    op = nn.Silu(t.Input("x", "f32", "b", (5,)))
    want = [[0.0, -80.0 / (1 + math.exp(80.0)), 0.0, 80.0, 1e4]]
    np.testing.assert_allclose(evaluated(op, x=x), want, rtol=1e-12)
    got = Compiled(Module("m", (), (("y", op),)))({"x": x.astype(np.float32)})["y"]
    np.testing.assert_allclose(got, want, atol=1e-30, rtol=1e-5)


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    angle = RNG.uniform(0, 6, (9, 3)).astype(np.float32)
    cos, sin = (t.Const(Array.of(f(angle).astype(np.float32))) for f in (np.cos, np.sin))
    x, at = noise(2, 4, 5, 7), RNG.integers(0, 9, (2, 5))
    op = nn.Rotary(t.Input("x", "f32", "b", (4, 5, 7)), t.Input("p", "i64", "b", (5,)), cos, sin)
    turned = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * angle[at].astype(np.float64))[:, None]
    want = np.concatenate([turned.real, turned.imag, x[..., 6:]], -1)
    np.testing.assert_allclose(evaluated(op, x=x, p=at), want, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_attention_is_torch_attention_under_a_mask(window: int) -> None:
    q, k, v = noise(3, 4, 2, 5), noise(3, 2, 9, 5), noise(3, 2, 9, 6)
    start = np.array([0, 3, 7])
    inputs = [t.Input(n, "f32", "b", a.shape[1:]) for n, a in (("q", q), ("k", k), ("v", v))]
    op = nn.CachedAttention(*inputs, t.Input("s", "i64", "b", ()), 0.3, window)
    last, row = start[:, None] + np.arange(2), np.arange(9)
    seen = row <= last[..., None]
    if window:
        seen &= row > last[..., None] - window
    data = (torch.tensor(a).repeat_interleave(4 // a.shape[1], 1) for a in (q, k, v))
    mask = torch.tensor(seen)[:, None]
    want = functional.scaled_dot_product_attention(*data, attn_mask=mask, scale=0.3).numpy()
    np.testing.assert_allclose(evaluated(op, q=q, k=k, v=v, s=start), want, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("opset", [24, 17])
def test_rows_beyond_the_length_are_never_read(opset: int, fused: bool) -> None:
    import onnx_ir as ir
    from graphs import session_of

    q, k, v = (noise(2, 4, 3, 8), noise(2, 2, 40, 8), noise(2, 2, 40, 8))
    start = np.array([5, 20])
    inputs = [t.Input(n, "f32", "b", a.shape[1:]) for n, a in (("q", q), ("k", k), ("v", v))]
    op = nn.CachedAttention(*inputs, t.Input("s", "i64", "b", ()), 0.3, 0)
    module = Module("m", (), (("y", op),))
    target = replace(TARGETS["onnx"], attention="mask" if fused else "parts")
    model = lower(module, target, opset=opset, inputs=inputs)
    session = session_of(ir.to_proto(model))
    feed = {n: a.astype(np.float32) for n, a in (("q", q), ("k", k), ("v", v))} | {"s": start}
    before = session.run(None, feed)[0]
    for row, first in enumerate(start + 3):
        for name in ("k", "v"):
            feed[name][row, :, first:] = RNG.choice([-1e30, 1e30, 7.0], (2, 40 - first, 8))
    np.testing.assert_array_equal(session.run(None, feed)[0], before)
    np.testing.assert_allclose(evaluated(op, **feed), before, atol=1e-5)


def test_ranks_are_stable() -> None:
    x = np.array([[1.0, 3.0, 1.0, 3.0, -np.inf, 2.0]])
    op = nn.SortRank(t.Input("x", "f32", "b", (6,)))
    want = [[3, 0, 4, 1, 5, 2]]
    assert evaluated(op, x=x).tolist() == want
    for opset in (17, 24):
        got = Compiled(Module("m", (), (("y", op),)), opset=opset)({"x": x.astype(np.float32)})
        assert got["y"].tolist() == want


@pytest.mark.parametrize("opset", [24, 17])
@pytest.mark.parametrize("rows", ["kd", "dk"])
def test_a_dense_layer_is_one_matrix_product(rows: str, opset: int) -> None:
    """Stored either way: the constant is turned when the graph is made, not when it runs."""
    sizes = {"k": 300, "d": 5}
    w = const(*(sizes[c] for c in rows))
    x = t.Input("x", "f32", "b", (3, 5))
    module = Module("m", (), (("y", nn.Relu(t.Contract(x, w, f"nd,{rows}->nk"))),))
    compiled = Compiled(module, opset=opset)
    assert [n.op_type for n in compiled.proto.graph.node] == ["MatMul", "Relu"]
    data = noise(2, 3, 5)
    turned = w.value.value if rows == "dk" else w.value.value.T
    want = np.maximum(data @ turned.astype(np.float64), 0)
    np.testing.assert_allclose(compiled({"x": data.astype(np.float32)})["y"], want, atol=1e-5)


def test_an_adopted_array_is_not_copied() -> None:
    a = noise(3, 4).astype(np.float32)
    kept = Array.adopt(a)
    assert kept.value is a
    assert not a.flags.writeable
    assert Array.of(a.copy()) is kept  # equal content is still one object
    assert Array.of(a.astype(np.float64)) is kept
    nan = np.array([np.nan], np.float32)
    for wrong, code in ((noise(2), "E104"), (noise(2, 3).astype("f4").T, "E104"), (nan, "E105")):
        with pytest.raises(PccError, match=code):
            Array.adopt(wrong)


def x_of(dtype: str, *shape: int, batch: str = "b") -> Op:
    return t.Input(f"{dtype}{shape}{batch}", dtype, batch, shape)


BAD = {
    "norm weights of another width": lambda: nn.RmsNorm(x_of("f32", 3, 4), W5, 1e-5),
    "norm weights per row": lambda: nn.RmsNorm(x_of("f32", 3, 5), x_of("f32", 5), 1e-5),
    "negative eps": lambda: nn.RmsNorm(x_of("f32", 3, 5), W5, -1.0),
    "layer norm bias": lambda: nn.LayerNorm(x_of("f32", 3, 5), W5, const(4), 1e-5),
    "activation of integers": lambda: nn.Silu(x_of("i64", 3)),
    "ranks of integers": lambda: nn.SortRank(x_of("i64", 3)),
    "rank of a scalar": lambda: nn.SortRank(x_of("f32")),
    "ids that are floats": lambda: nn.Embedding(TABLE, x_of("f32", 3)),
    "table of rank 1": lambda: nn.Embedding(W5, x_of("i64", 3)),
    "positions of another count": lambda: nn.Rotary(x_of("f32", 2, 3, 4), x_of("i64", 2), COS, SIN),
    "rotation wider than x": lambda: nn.Rotary(x_of("f32", 2, 3, 3), x_of("i64", 3), COS, SIN),
    "update longer than the cache": lambda: nn.CacheWrite(
        x_of("f32", 2, 3, 4), x_of("f32", 2, 5, 4), x_of("i64")
    ),
    "update of other heads": lambda: nn.CacheWrite(
        x_of("f32", 2, 3, 4), x_of("f32", 1, 2, 4), x_of("i64")
    ),
    "start of rank 1": lambda: nn.CacheWrite(
        x_of("f32", 2, 3, 4), x_of("f32", 2, 2, 4), x_of("i64", 1)
    ),
    "heads that do not divide": lambda: nn.CachedAttention(
        x_of("f32", 3, 2, 4), x_of("f32", 2, 5, 4), x_of("f32", 2, 5, 4), x_of("i64"), 1.0, 0
    ),
    "values of other rows": lambda: nn.CachedAttention(
        x_of("f32", 2, 2, 4), x_of("f32", 2, 5, 4), x_of("f32", 2, 6, 4), x_of("i64"), 1.0, 0
    ),
    "negative window": lambda: nn.CachedAttention(
        x_of("f32", 2, 2, 4), x_of("f32", 2, 5, 4), x_of("f32", 2, 5, 4), x_of("i64"), 1.0, -1
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_ill_typed_nodes_are_rejected(name: str) -> None:
    with pytest.raises(PccError) as caught:
        BAD[name]()
    assert caught.value.code in ("E110", "E111", "E112")


def test_the_evaluator_refuses_what_leaves_a_table_or_a_cache() -> None:
    ids = nn.Embedding(TABLE, x_of("i64", 2))
    write = nn.CacheWrite(x_of("f32", 1, 4, 2), x_of("f32", 1, 3, 2), x_of("i64"))
    for op, feed in (
        (ids, {"i64(2,)b": np.array([[0, 7]])}),
        (ids, {"i64(2,)b": np.array([[-1, 0]])}),
        (
            write,
            {
                "f32(1, 4, 2)b": noise(1, 1, 4, 2),
                "f32(1, 3, 2)b": noise(1, 1, 3, 2),
                "i64()b": np.array([2]),
            },
        ),
    ):
        with pytest.raises(PccError, match="E403"):
            evaluated(op, **feed)


def test_the_text_form_holds_every_op() -> None:
    x, ids, start = x_of("f32", 2, 3, 4), x_of("i64", 3), x_of("i64")
    cache = x_of("f32", 2, 9, 4)
    y = nn.Rotary(nn.RmsNorm(x, const(4), 1e-6), ids, COS, SIN)
    kept = nn.CacheWrite(cache, y, start)
    out = nn.CachedAttention(nn.Gelu(nn.Relu(nn.Silu(y))), kept, cache, start, 0.5, 3)
    roots = (
        ("a", nn.LayerNorm(out, const(4), const(4), 1e-3)),
        ("b", nn.SortRank(x)),
        ("c", nn.Embedding(TABLE, ids)),
    )
    m = Module("m", (), roots)
    again = parse(show(m), resources=resources(m))
    assert all(a is b for a, b in zip(again.roots, m.roots, strict=True))


def test_a_cache_is_written_in_place_where_it_is_the_callers() -> None:
    """Where in place is by inputs and outputs alone, other writes are scattered."""
    cache, x, start = x_of("f32", 2, 9, 4), x_of("f32", 2, 3, 4), x_of("i64")
    shared = t.Input("shared", "f32", "", (2, 9, 4))
    write = nn.CacheWrite(cache, x, start)
    attend = nn.CachedAttention(x, write, write, start, 0.5, 0)
    cases = {
        "TensorScatter": [(write, attend)],
        "ScatterND": [
            (attend,),  # what becomes of it is no output
            (write, t.Exp(cache)),  # the old rows are read too
            (nn.CacheWrite(shared, x, start),),  # one cache for all rows
            (nn.CacheWrite(t.Exp(cache), x, start),),
        ],
    }
    for kind, modules in cases.items():
        for roots in modules:
            outs = tuple((f"y{i}", y) for i, y in enumerate(roots))
            made = lower(Module("m", (), outs), TARGETS["tensorrt-rtx"], batch=1)
            kinds = [n.op_type for n in made.graph]
            assert [k for k in kinds if "Scatter" in k] == [kind]
            free = lower(Module("m", (), outs), TARGETS["onnx"])
            assert "ScatterND" not in [n.op_type for n in free.graph]
