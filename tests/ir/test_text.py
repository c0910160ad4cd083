"""The text form: printed text parses back to the same objects, and prints as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import circuits

from pcc.circuit import ops as c
from pcc.circuit.text import load, parse, resources, save, show
from pcc.errors import PccError
from pcc.ir import text as form
from pcc.ir.array import Array
from pcc.ir.core import OPS, Op
from pcc.ir.module import Module
from pcc.ir.verify import verify
from pcc.tensor import ops as t

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.pcir"))


def same(a: Module, b: Module) -> bool:
    """Equal names and cardinalities, and the very same nodes."""
    return a == b and all(x is y for x, y in zip(a.roots, b.roots, strict=True))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_a_golden_prints_as_it_was(path: Path) -> None:
    text = path.read_text()
    m = parse(text, str(path))
    verify(m)
    assert show(m) == text
    assert same(parse(show(m)), m)
    located = show(m, loc=True)
    assert (
        located.count(f'loc("{path}":') == text.count(" = ") - text.count("cards=") * 0
        or "loc(" in located
    )
    assert same(parse(located), m)


def test_goldens_hold_every_circuit_op() -> None:
    text = "\n".join(p.read_text() for p in GOLDEN)
    assert {op for op in OPS if op.startswith("c.")} <= set(text.split())


@given(circuits(continuous=True))
@settings(max_examples=60, deadline=None)
def test_circuits_come_back_as_the_same_objects(circuit: object) -> None:
    m = circuit.module()  # type: ignore[attr-defined]
    text = show(m)
    assert same(parse(text, resources=resources(m)), m)
    assert same(parse(show(m, loc=True), resources=resources(m)), m)


@given(circuits())
@settings(max_examples=20, deadline=None)
def test_text_alone_is_enough(circuit: object) -> None:
    """The printed text names all there is: parse it when no node of it is alive."""
    m = circuit.module()  # type: ignore[attr-defined]
    text, arrays = show(m), {k: v.copy() for k, v in resources(m).items()}
    del m, circuit
    gc.collect()
    assert show(parse(text, resources=arrays)) == text


FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([-0.0, 0.0, np.inf, -np.inf])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.one_of(
    hnp.arrays(np.float32, SHAPES, elements=FLOATS),
    hnp.arrays(np.int64, SHAPES),
    hnp.arrays(np.bool_, SHAPES),
)
TEXTS = st.text(st.characters(codec="utf-16", categories=None), max_size=12) | st.just("\ud800")


@st.composite
def tensors(draw: st.DrawFn) -> Module:
    """Modules of tensor values: constants of every dtype, inputs of any name, chains of ops."""
    outs: list[Op] = []
    for _ in range(draw(st.integers(1, 3))):
        value = Array.of(draw(ARRAYS))
        x: Op = t.Const(value)
        if draw(st.booleans()):
            batch = draw(st.sampled_from(["", "c", "b"]))
            y = t.Input(draw(TEXTS), value.dtype, batch, value.shape)
            x = t.Equal(x, y)
        for dtype in draw(st.lists(st.sampled_from(["f32", "i64", "bool"]), max_size=3)):
            x = t.Cast(x, dtype)
        if (rank := len(x.type.shape)) > 1:  # type: ignore[union-attr]
            x = t.Transpose(x, tuple(draw(st.permutations(range(rank)))))
        outs.append(x)
    names = draw(st.lists(TEXTS, min_size=len(outs), max_size=len(outs), unique=True))
    cards = draw(st.lists(st.integers(0, 2**31 - 1), max_size=9))
    return Module(draw(TEXTS), tuple(cards), tuple(zip(names, outs, strict=True)))


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_tensors_come_back_as_the_same_objects(m: Module) -> None:
    text = show(m)
    assert text.isascii()
    assert same(parse(text, resources=resources(m)), m)


def bits(values: list[float]) -> list[int]:
    return [int(v) for v in np.array(values, np.float32).view(np.uint32)]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=16))
@settings(max_examples=200, deadline=None)
def test_inline_numbers_keep_every_bit(values: list[float]) -> None:
    """The array is dropped before the text is read, so the bits come from the digits."""
    text = show(Module("m", (), (("y", t.Const(Array.of(np.array(values, np.float32)))),)))
    node = parse(text).roots[0]
    assert isinstance(node, t.Const)
    assert bits(list(node.value.value)) == bits(values)


@pytest.mark.wheel
def test_equal_values_of_other_kinds_stay_apart() -> None:
    zero, minus = (t.Const(Array.of(np.array([v], np.float32))) for v in (0.0, -0.0))
    one, yes, real = (t.Const(Array.of(np.array([v]))) for v in (1, True, 1.0))
    assert len({zero, minus, one, yes, real}) == 5
    outs = tuple((f"v{i}", v) for i, v in enumerate((zero, minus, one, yes, real)))
    m = Module("m", (), outs)
    assert same(parse(show(m)), m)


def test_places_survive() -> None:
    leaf = c.Categorical(
        (0,), t.Const(Array.of(np.full((1, 1, 2), 0.125))), loc='d\u00e9 "x".py:41'
    )
    text = show(Module("m", (2,), (("p", leaf),)), loc=True)
    assert text.isascii()
    assert r'loc("d\u00e9 \"x\".py":41)' in text
    del leaf
    gc.collect()
    assert parse(text, "other.pcir").roots[0].loc == 'd\u00e9 "x".py:41'


def test_comments_blank_lines_and_crlf_are_read() -> None:
    text = GOLDEN[0].read_text()
    lines = [f"  {s}  // note" if "%" in s and '"' not in s else s for s in text.split("\n")]
    noisy = "# a comment\r\n\r\n" + "\r\n".join(lines)
    assert show(parse(noisy)) == text


def test_equal_modules_print_equally_whatever_built_them() -> None:
    def build(order: tuple[int, int]) -> str:
        made = {
            v: c.Categorical((v,), t.Const(Array.of(np.full((1, 1, 2), v + 0.5)))) for v in order
        }
        return show(Module("m", (2, 2), (("p", c.Hadamard((made[0], made[1]))),)))

    assert build((0, 1)) == build((1, 0))


def big(rows: int = 40) -> Module:
    rng = np.random.default_rng(rows)
    table = t.Const(Array.of(rng.uniform(size=(1, 3, rows))))
    return Module("m", (rows,), (("p", c.Categorical((0,), table)),))


def test_files_with_their_arrays(tmp_path: Path) -> None:
    m = big()
    save(m, tmp_path / "m.pcir")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pcir", "m.safetensors"]
    assert same(load(tmp_path / "m.pcir"), m)


def refused(path: Path) -> PccError:
    with pytest.raises(PccError) as e:
        load(path)
    assert e.value.at
    assert "\n" not in e.value.what
    return e.value


def test_array_files_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    m, path = big(), tmp_path / "m.pcir"
    save(m, path)
    beside = tmp_path / "m.safetensors"
    good, (ref,) = beside.read_bytes(), resources(m)
    value = resources(m)[ref]
    flipped = bytearray(good)
    flipped[-1] ^= 1
    doubled = {ref: value.astype(np.float64)}
    nan = {ref: np.full(value.shape, np.nan, np.float32)}
    cases: dict[str, tuple[bytes | dict[str, np.ndarray], str]] = {  # type: ignore[type-arg]
        "flipped": (bytes(flipped), "E008"),
        "cut": (good[:-7], "E008"),
        "huge header": (b"\xff" * 8 + good[8:], "E008"),
        "empty": (b"", "E008"),
        "other name": ({"w": value}, "E008"),
        "other shape": ({ref: value.reshape(-1)}, "E008"),
        "other dtype": (doubled, "E008"),
        "other kind": ({ref: value.astype(np.int16)}, "E008"),
        "complex": ({ref: value.astype(np.complex64)}, "E104"),
        "nan": (nan, "E105"),
    }
    for name, (data, code) in cases.items():
        beside.write_bytes(data) if isinstance(data, bytes) else save_file(data, beside)
        assert refused(path).code == code, name
    beside.unlink()
    assert refused(path).code == "E008"
    assert "beside" in refused(path).hint


def test_text_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.pcir").code == "E011"
    assert refused(tmp_path).code == "E011"
    assert refused(tmp_path / "a\0b.pcir").code == "E011"
    (tmp_path / "bytes.pcir").write_bytes(b"circuit @m {cards=[]} {\n\xff\xfe")
    e = refused(tmp_path / "bytes.pcir")
    assert (e.code, e.at) == ("E001", f"{tmp_path / 'bytes.pcir'}:2")
    with pytest.raises(PccError, match="E011"):
        save(big(), tmp_path / "m.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.pcir").mkdir()
    with pytest.raises(OSError, match="directory"):
        save(big(), tmp_path / "m.pcir")
    assert not list(tmp_path.glob(".*"))


def test_resources_may_be_a_function() -> None:
    m = big(41)
    arrays = resources(m)
    assert same(form.parse(show(m), resources=arrays.get), m)
