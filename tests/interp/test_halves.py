"""Stored values in half precision: which ops take them, and how they round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pcc.circuit.text import load, parse, resources, save, show
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import Array, dtype_of, kind_of
from pcc.ir.core import Op, Values, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Field, Semiring
from pcc.ir.types import HALVES
from pcc.tensor import eva, nn
from pcc.tensor import ops as t

RNG = np.random.default_rng(3)
X = t.Input("x", "f32", "b", (2, 3))
START = t.Input("s", "i64", "b", ())


def half(kind: str, *shape: int) -> t.Const:
    return t.Const(Array.of(RNG.normal(size=shape), kind))


def value(root: Op, **inputs: Values) -> Values:
    return run((root,), inputs, Semiring())[0]


def near(x: Values, kind: str) -> Values:
    """Round by another road than the evaluator: float32 first, then the half type."""
    return np.asarray(x, np.float32).astype(dtype_of(kind)).astype(np.float64)


@pytest.mark.parametrize("kind", HALVES)
def test_a_contraction_rounds_its_operand_and_sums_wide(kind: str) -> None:
    w = half(kind, 3, 5)
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    n = t.Contract(X, w, "nd,dk->nk")
    assert str(n.type) == "f32[b|2,5]"
    want = near(x, kind) @ w.value.value.astype(np.float64)
    np.testing.assert_allclose(value(n, x=x), want, rtol=1e-13)
    assert abs(want - x @ w.value.value.astype(np.float64)).max() > 1e-5  # rounding shows


def test_exact_carriers_do_not_round() -> None:
    w = half("f16", 3, 5)
    n = t.Contract(X, w, "nd,dk->nk")
    got = run((n,), {"x": np.full((1, 2, 3), 7, np.int64)}, Field())[0]
    assert got.shape == (1, 2, 5)


@pytest.mark.parametrize("kind", HALVES)
def test_tables_widen_their_rows(kind: str) -> None:
    table, ids = half(kind, 7, 3), np.array([[6, 0]])
    rows = nn.Embedding(table, t.Input("i", "i64", "b", (2,)))
    assert tensor(rows).dtype == "f32"
    np.testing.assert_array_equal(value(rows, i=ids)[0], table.value.value[[6, 0]])
    cube = half(kind, 2, 4, 3)
    picked = t.SelectRow(cube, t.Input("i", "i64", "b", (2,)))
    assert str(picked.type) == "f32[b|2,3]"
    got = value(picked, i=np.array([[3, 1]]))[0]
    np.testing.assert_array_equal(got, cube.value.value[[0, 1], [3, 1]])


@pytest.mark.parametrize("op", [nn.CacheWrite, eva.RingWrite])
@pytest.mark.parametrize("kind", HALVES)
def test_caches_round_what_is_written_and_keep_the_rest(op: type[nn.RowWrite], kind: str) -> None:
    old = RNG.normal(size=(1, 2, 5, 3)).astype(dtype_of(kind))
    new = RNG.normal(size=(1, 2, 2, 3)).astype(np.float32)
    cache, update = t.Input("c", kind, "b", (2, 5, 3)), t.Input("u", "f32", "b", (2, 2, 3))
    n = op(cache, update, START)
    assert str(n.type) == f"{kind}[b|2,5,3]"
    got = value(n, c=old, u=new, s=np.array([2]))
    want = old.astype(np.float64)
    want[:, :, 2:4] = near(new, kind)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", HALVES)
def test_attention_rounds_queries_only(kind: str) -> None:
    q = RNG.normal(size=(1, 4, 2, 8)).astype(np.float32)
    k, v = (RNG.normal(size=(1, 2, 6, 8)).astype(dtype_of(kind)) for _ in "kv")
    at = [t.Input("q", "f32", "b", (4, 2, 8))]
    at += [t.Input(x, kind, "b", (2, 6, 8)) for x in "kv"]
    n = nn.CachedAttention(*at, START, 0.5, 0)
    assert tensor(n).dtype == "f32"
    wide = [t.Input(x.key, "f32", "b", x.shape) for x in at if isinstance(x, t.Input)]
    same = nn.CachedAttention(*wide, START, 0.5, 0)
    got = value(n, q=q, k=k, v=v, s=np.array([3]))
    plain = {"k": k.astype(np.float32), "v": v.astype(np.float32), "s": np.array([3])}
    np.testing.assert_allclose(got, value(same, q=near(q, kind), **plain), rtol=1e-13)
    assert abs(got - value(same, q=q, **plain)).max() > 1e-5


@pytest.mark.parametrize("kind", HALVES)
def test_rings_and_eva_attention(kind: str) -> None:
    ring = RNG.normal(size=(1, 2, 8, 4)).astype(dtype_of(kind))
    state = t.Input("r", kind, "b", (2, 8, 4))
    chunks = eva.RingChunks(state, START, 2, 2)
    assert tensor(chunks).dtype == "f32"
    np.testing.assert_array_equal(
        value(chunks, r=ring, s=np.array([2])), ring[:, :, 2:6].reshape(1, 2, 2, 2, 4)
    )
    q, older = t.Input("q", "f32", "b", (2, 1, 4)), t.Input("o", kind, "b", (2, 4, 4))
    n = eva.EvaAttention(q, state, state, older, older, START, 1.0, 4, 2)
    many = {"r": ring, "o": ring[:, :, :4], "s": np.array([5])}
    x = RNG.normal(size=(1, 2, 1, 4)).astype(np.float32)
    np.testing.assert_array_equal(value(n, q=x, **many), value(n, q=near(x, kind), **many))


H = t.Input("h", "f16", "b", (2, 3))
C, U = t.Input("c", "f16", "b", (2, 5, 3)), t.Input("u", "f16", "b", (2, 2, 3))
REFUSED: list[Callable[[], Op]] = [
    lambda: t.Add(H, H),
    lambda: t.Exp(H),
    lambda: t.Reshape(H, (6,)),
    lambda: t.Take(H, 0, (0,)),
    lambda: t.Equal(H, H),
    lambda: t.Where(t.Less(X, X), H, H),
    lambda: t.Contract(H, X, "ab,ab->a"),
    lambda: t.Contract(t.Input("i", "i64", "b", (2, 3)), H, "ab,ab->a"),
    lambda: t.LogContract(X, H, "ab,ab->a"),
    lambda: nn.RmsNorm(X, half("f16", 3), 0.1),
    lambda: nn.CacheWrite(C, U, START),
    lambda: nn.CachedAttention(U, C, C, START, 1.0, 0),
    lambda: t.Cast(X, "f16"),
]


@pytest.mark.parametrize("build", REFUSED)
def test_other_ops_refuse_halves(build: Callable[[], Op]) -> None:
    with pytest.raises(PccError) as e:
        build()
    assert e.value.code in ("E110", "E112")


def test_keys_and_values_have_one_dtype() -> None:
    wide = t.Input("w", "f32", "b", (2, 5, 3))
    q = t.Input("q", "f32", "b", (2, 2, 3))
    with pytest.raises(PccError, match="E110"):
        nn.CachedAttention(q, C, wide, START, 1.0, 0)


# ---------------------------------------------------------------- arrays and text


@pytest.mark.parametrize("kind", HALVES)
def test_arrays_round_to_nearest_and_are_interned_by_dtype(kind: str) -> None:
    x = np.array([[0.1, -2.5], [-np.inf, 1e-3]])
    a = Array.of(x, kind)
    assert a.dtype == kind_of(a.value) == kind
    np.testing.assert_array_equal(a.value, x.astype(dtype_of(kind)))
    assert Array.of(x.astype(dtype_of(kind)), kind) is a
    assert Array.of(x) is not a
    assert Array.of(a.value).dtype == "f32"  # halves are asked for by name


def test_numbers_too_large_for_half_are_refused() -> None:
    with pytest.raises(PccError, match=r"E107.*70000.*f16"):
        Array.of(np.array([1.0, -70000.0]), "f16")
    assert Array.of(np.array([-70000.0]), "bf16").value[0] == ml_dtypes.bfloat16(-70000)
    with pytest.raises(PccError, match="E104"):
        Array.of(np.arange(3), "f16")


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("size", [3, 40])
def test_text_and_files_give_the_same_constants(kind: str, size: int, tmp_path: Path) -> None:
    w = half(kind, size, 2)
    n = t.Contract(t.Input("x", "f32", "b", (4, size)), w, "nd,dk->nk")
    m = Module("m", (2,), (("y", n),))
    again = parse(show(m), resources=resources(m))
    assert again == m
    assert again.roots[0] is n
    save(m, tmp_path / "m.pcir")
    assert load(tmp_path / "m.pcir").roots[0] is n


@pytest.mark.parametrize("text", ["f16[1](65520)", "bf16[1](3.4e38)", "f16[1](true)", "f8[1](1)"])
def test_literals_that_do_not_fit(text: str) -> None:
    body = f"circuit @m {{cards=[2]}} {{\n  %0 = t.const {{value={text}}} : f16[1]\n"
    with pytest.raises(PccError, match="E007"):
        parse(body + "  return y = %0\n}\n")


def test_literals_at_the_edges() -> None:
    for kind, word in (("f16", "65519.9"), ("bf16", "3.38e38"), ("f16", "-inf"), ("bf16", "-0.0")):
        body = f"circuit @m {{cards=[2]}} {{\n  %0 = t.const {{value={kind}[1]({word})}}"
        (root,) = parse(f"{body} : {kind}[1]\n  return y = %0\n}}\n").roots
        assert isinstance(root, t.Const)
        assert parse(show(Module("m", (2,), (("y", root),)))).roots[0] is root
