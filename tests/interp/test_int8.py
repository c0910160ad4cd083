"""Matrices as 8-bit integers with scales: the op, the integers themselves, their text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcc.circuit.text import load, parse, resources, save, show
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import Array, dtype_of, kind_of
from pcc.ir.core import Op, Values
from pcc.ir.module import Module
from pcc.ir.noise import Noise
from pcc.ir.quantise import by_columns, by_rows
from pcc.ir.recipe import Recipe
from pcc.ir.semiring import Field, Semiring
from pcc.models.matrix import Matrix
from pcc.tensor import eva, nn
from pcc.tensor import ops as t

RNG = np.random.default_rng(5)


def integers(*shape: int) -> t.Const:
    return t.Const(Array.of(RNG.integers(-127, 128, shape), "i8"))


def numbers(*shape: int) -> t.Const:
    return t.Const(Array.of(RNG.uniform(0.01, 0.02, shape)))


def value(root: Op, **inputs: Values) -> Values:
    return run((root,), inputs, Semiring())[0]


FORMS = [  # equation, x, q, scales: sizes unequal, so that a swapped axis shows
    ("nd,dk->nk", (2, 3), (3, 5), (5,)),
    ("d,abcd->abc", (3,), (2, 4, 5, 3), (2, 4, 5)),
    ("fd,fkd->fk", (2, 3), (2, 4, 3), (2, 4)),
    ("d,abd->ba", (3,), (2, 4, 3), (2, 4)),
]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("eq", "a", "b", "s"), FORMS)
def test_a_product_is_that_of_the_matrix_itself(
    eq: str, a: tuple[int, ...], b: tuple[int, ...], s: tuple[int, ...], dtype: str
) -> None:
    q, scale = integers(*b), numbers(*s)
    n = t.ScaledContract(t.Input("x", "f32", "b", a), q, scale, eq, dtype)
    x = RNG.normal(size=(6, *a)).astype(np.float32)
    axis = eq.split("->")[0].split(",")[1].index("d")
    matrix = q.value.value.astype(np.float64) * np.expand_dims(scale.value.value, axis)
    near = x.astype(dtype_of(dtype)).astype(np.float64)
    left, rest = eq.split(",")
    want = np.einsum(f"z{left},{rest.replace('->', '->z')}", near, matrix)
    np.testing.assert_allclose(value(n, x=x), want, rtol=1e-12, atol=1e-12)
    assert Module("m", (), (("y", n),)).stored == dtype


def test_exact_carriers_see_a_polynomial() -> None:
    q, scale = integers(3, 5), numbers(5)
    x = t.Input("x", "f32", "b", (2, 3))
    given = {"x": RNG.integers(0, 1 << 20, (4, 2, 3))}
    half, wide = (t.ScaledContract(x, q, scale, "nd,dk->nk", k) for k in ("f16", "f32"))
    product = t.Mul(t.Contract(x, t.Const(Array.of(q.value.value * 1.0)), "nd,dk->nk"),
                    t.Const(scale.value.reshaped((1, 5))))  # fmt: skip
    one, two, three = run((half, wide, product), given, Field())
    np.testing.assert_array_equal(one, two)  # rounding is no part of it
    np.testing.assert_array_equal(one, three)


Q = integers(2, 3)
REFUSED: list[Callable[[], Op]] = [
    lambda: t.Add(Q, Q),
    lambda: t.Reshape(Q, (6,)),
    lambda: t.Cast(Q, "f32"),
    lambda: t.Contract(t.Input("x", "f32", "b", (2,)), Q, "d,dk->k"),
    lambda: t.Input("x", "i8", "b", (2,)),
    lambda: t.SelectRow(integers(2, 3, 4), t.Input("i", "i64", "b", (2,))),
    lambda: nn.Embedding(Q, t.Input("i", "i64", "b", (2,))),
    lambda: nn.CacheWrite(integers(1, 4, 2), t.Input("u", "f32", "b", (1, 1, 2)),
                          t.Input("s", "i64", "b", ())),
    lambda: eva.RingChunks(integers(1, 4, 2), t.Input("s", "i64", "b", ()), 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("build", REFUSED)
def test_other_ops_and_inputs_refuse_integers_of_8_bits(build: Callable[[], Op]) -> None:
    with pytest.raises(PccError) as e:
        build()
    assert e.value.code in ("E110", "E112")


# ---------------------------------------------------------------- arrays and text


def test_integers_must_fit() -> None:
    a = Array.of(np.array([[-128, 127]]), "i8")
    assert (a.dtype, kind_of(a.value), a.nbytes) == ("i8", "i8", 2)
    assert Array.of(a.value).dtype == "i64"  # asked for by name, as halves are
    with pytest.raises(PccError, match=r"E107.*128"):
        Array.of(np.array([128]), "i8")
    with pytest.raises(PccError, match="E104"):
        Array.of(np.array([1.5]), "i8")


@pytest.mark.parametrize("size", [3, 40])
def test_text_and_files_give_the_same_integers(size: int, tmp_path: Path) -> None:
    x = t.Input("x", "f32", "b", (4, size))
    n = t.ScaledContract(x, integers(size, 2), numbers(2), "nd,dk->nk", "bf16")
    m = Module("m", (2,), (("y", n),))
    assert parse(show(m), resources=resources(m)).roots[0] is n
    save(m, tmp_path / "m.pcir")
    assert load(tmp_path / "m.pcir").roots[0] is n


@pytest.mark.parametrize(
    "text", ["i8[1](128)", "i8[1](-129)", "i8[1](1.5)", "i8[1](true)", "i8[2](1)", "i8[1](1_0)"]
)
def test_literals_that_do_not_fit(text: str) -> None:
    body = f"circuit @m {{cards=[2]}} {{\n  %0 = t.const {{value={text}}} : i8[1]\n"
    with pytest.raises(PccError, match="E007"):
        parse(body + "  return y = %0\n}\n")


def test_hostile_text_cannot_make_states_or_results_of_integers() -> None:
    for line in (
        '%0 = t.input {key="x", dtype="i8", batch="b", shape=[2]} : i8[b|2]',
        "%1 = t.const {value=i8[1](-128)} : i8[1]\n  %0 = t.add %1, %1 : i8[1]",
    ):
        with pytest.raises(PccError, match="E112"):
            parse(f"circuit @m {{cards=[2]}} {{\n  {line}\n  return y = %0\n}}\n")


# ---------------------------------------------------------------- from weights to integers


def lazily(w: Values) -> Array:
    flat = w.reshape(-1)
    return Array.lazy("f32", w.shape, Recipe(f"test {id(w)}", lambda i, j: flat[i:j].copy()))


def matrix(w: Values, name: str) -> Matrix:
    return Matrix(name, w.shape, lambda i, j: w[i:j])  # type: ignore[arg-type]


def expected(w: Values) -> tuple[Values, Values]:
    """Rows, one at a time, in float64."""
    scale = np.array([np.float32(np.abs(r).max()) / np.float32(127) for r in w], np.float32)
    rows = [
        [round(float(x) / float(s)) if s else 0 for x in r] for r, s in zip(w, scale, strict=True)
    ]
    return np.array(rows), scale


def test_integers_and_scales_are_those_of_each_output() -> None:
    w = (RNG.normal(size=(300, 70)) * RNG.uniform(0.01, 5, (300, 1))).astype(np.float32)
    w[7] = 0
    q, s = expected(w)
    rows = [by_rows(Array.of(w)), by_rows(lazily(w))]
    columns = [by_columns(Array.of(w.T)), by_columns(matrix(w, "w").beside([], "f32"))]
    for got, scale in rows:
        assert np.abs(got.value - q).max() <= 1  # a quotient near a half may round either way
        assert (got.value != q).mean() < 1e-3
        np.testing.assert_array_equal(scale.value, s)
    np.testing.assert_array_equal(rows[0][0].value, rows[1][0].value)
    for got, scale in columns:
        np.testing.assert_array_equal(got.value, rows[0][0].value.T)
        np.testing.assert_array_equal(scale.value, s)
    off = np.abs(rows[0][0].value * s[:, None] - w)
    assert (off <= s[:, None] * 0.5001).all()
    assert np.abs(rows[0][0].value).max(axis=1).tolist() == [
        0 if i == 7 else 127 for i in range(300)
    ]


def test_matrices_side_by_side_are_made_part_by_part() -> None:
    one, two = RNG.normal(size=(5, 8)).astype("f4"), RNG.normal(size=(3, 8)).astype("f4")
    q, s = by_columns(matrix(one, "one").beside([matrix(two, "two")], "f32"))
    want, scale = by_columns(Array.of(np.concatenate([one, two]).T))
    np.testing.assert_array_equal(q.value, want.value)
    np.testing.assert_array_equal(s.value, scale.value)
    flat = np.concatenate(list(q.parts()))
    np.testing.assert_array_equal(flat, want.value.reshape(-1))


def test_random_weights_have_one_scale_and_are_not_read() -> None:
    noise = Noise(3, "w", 0.5)
    array = Array.lazy("f32", (50, 400), noise.recipe("f32"))
    for q, s in (by_rows(array), by_columns(array)):
        assert len(set(s.value.tolist())) == 1
        off = np.abs(q.value * s.value.reshape(-1)[0] - array.value)
        assert off.max() <= s.value.reshape(-1)[0] * 0.5001
        assert q.recipe is not None
    assert by_columns(array)[1].shape == (400,)
    assert by_rows(array)[1].shape == (50,)


def test_an_infinite_weight_is_refused() -> None:
    w = np.ones((2, 3), np.float32)
    w[1, 2] = -np.inf
    for make in (by_rows, by_columns):
        with pytest.raises(PccError, match="E107"):
            make(Array.of(w))
