"""Every rule of the verifier has a module that breaks it, and the findings stand inside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from strategies import random_circuit

import pcc.ir.verify as rules
from pcc.circuit import ops as c
from pcc.circuit.queries import Query
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.ir.types import Tensor, Units
from pcc.ir.verify import InvalidModuleError, verify
from pcc.tensor import ops as t

RNG = np.random.default_rng(0)


def const(*shape: int, fill: float | None = None) -> Op:
    value = RNG.uniform(0.1, 1, shape) if fill is None else np.full(shape, fill)
    return t.Const(Array.of(value))


def leaf(*variables: int, k: int = 2, v: int = 3) -> Op:
    return c.Categorical(variables, const(len(variables), k, v))


def module(root: Op, cards: tuple[int, ...] = (3, 3, 3)) -> Module:
    return Module("m", cards, (("p", root),))


def poke(node: Op, **fields: Any) -> Op:
    """Corrupt a node behind the builder's back, as a faulty pass might."""
    node.__dict__.update(fields)
    return node


def wrong_type() -> Module:
    return module(poke(leaf(0), type=Units(5, (1,))))


def cycle() -> Module:
    x = c.Sum(leaf(0), const(1, 2, 2))
    y = c.Sum(x, const(1, 2, 2))
    return module(poke(y, args=(poke(x, args=(y, x.args[1])), y.args[1])))


def loose_attribute() -> Module:
    return module(poke(leaf(0), vars=[0]))


def other_operands() -> Module:
    x = c.Sum(leaf(0), const(1, 2, 2))
    return module(poke(x, args=(leaf(0), x.args[1])))


def weight_shape() -> Module:
    x, w = c.Sum(leaf(0), const(1, 2, 2)), const(1, 2, 4)
    return module(poke(x, w=w, args=(x.args[0], w)))


def swap(node: Op, x: Op) -> Op:
    """Put `x` in place of the first operand of a layer over a list."""
    return poke(node, xs=(x, *node.args[1:]), args=(x, *node.args[1:]))


def fold_counts() -> Module:
    return module(swap(c.Hadamard((leaf(0), leaf(1))), leaf(0, 2)))


def unit_counts() -> Module:
    return module(swap(c.Hadamard((leaf(0), leaf(1))), leaf(0, k=4)))


def unknown_variable() -> Module:
    return module(leaf(3))


def narrow_table() -> Module:
    return module(leaf(0, v=2))


def table_for_continuous() -> Module:
    return module(leaf(0), cards=(0, 3))


def density_for_finite() -> Module:
    return module(c.Gaussian((1,), const(1, 2), const(1, 2)))


def overlapping_product() -> Module:
    return module(swap(c.Hadamard((leaf(0), leaf(1))), leaf(1)))


def uneven_mixture() -> Module:
    y = c.Mix((leaf(0), leaf(0)), const(1, 2, 2))
    x = leaf(1)
    return module(poke(y, xs=(x, y.args[1]), args=(x, *y.args[1:])))


def missing_fold() -> Module:
    return module(poke(c.Gather(leaf(0, 1), (1, 0)), folds=(2, 0)))


def wild_batch() -> Module:
    return Module("m", (), (("y", poke(t.Exp(const(2)), type=Tensor("f32", (2,), "b"))),))


def infinite_weight() -> Module:
    return module(c.Sum(leaf(0), const(1, 2, 2, fill=np.inf)))


def negative_weight() -> Module:
    return module(c.Sum(leaf(0), const(1, 2, 2, fill=-0.5)))


def infinite_mean() -> Module:
    return module(c.Gaussian((0,), const(1, 2, fill=np.inf), const(1, 2)), cards=(0,))


def two_typed_input() -> Module:
    a, b = (t.Input("x", "f32", batch, (2,)) for batch in "bc")
    return Module("m", (), (("y", t.Add(a, b)),))


def no_outputs() -> Module:
    return Module("m", (2,), ())


def one_name_twice() -> Module:
    return Module("m", (3,), (("p", leaf(0)), ("p", leaf(0, k=3))))


def bad_cardinality() -> Module:
    return module(leaf(0), cards=(-3,))


MUST_FAIL: list[tuple[str, str, Callable[[], Module]]] = [
    ("V1", "E211", wrong_type),
    ("V2", "E212", cycle),
    ("V3", "E213", loose_attribute),
    ("V4", "E214", other_operands),
    ("V5", "E102", weight_shape),
    ("V6", "E107", fold_counts),
    ("V7", "E108", unit_counts),
    ("V8", "E216", unknown_variable),
    ("V8", "E216", narrow_table),
    ("V8", "E216", table_for_continuous),
    ("V8", "E216", density_for_finite),
    ("V9", "E201", overlapping_product),
    ("V10", "E202", uneven_mixture),
    ("V11", "E109", missing_fold),
    ("V13", "E218", wild_batch),
    ("V14", "E219", infinite_weight),
    ("V14", "E219", negative_weight),
    ("V14", "E219", infinite_mean),
    ("V15", "E220", two_typed_input),
    ("V16", "E221", no_outputs),
    ("V16", "E221", one_name_twice),
    ("V16", "E221", bad_cardinality),
]


@pytest.mark.parametrize(
    ("rule", "code", "build"), MUST_FAIL, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_rule_is_enforced(rule: str, code: str, build: Callable[[], Module]) -> None:
    with pytest.raises(InvalidModuleError) as e:
        verify(build())
    assert code in {e.value.code, *(f[0] for f in e.value.findings)}, str(e.value)
    assert "\n" not in e.value.what


def test_stage_after_lowering() -> None:  # V12
    x = t.Input("x", "i64", "b", (1,))
    query = Query(c.Sum(leaf(0), const(1, 1, 2)), (x,), "loglik", "log_prob", 3)
    for m in (module(leaf(0)), Module("m", (3,), (("log_prob", query),))):
        verify(m, stage="circuit")
        with pytest.raises(InvalidModuleError) as e:
            verify(m, stage="tensor")
        assert {f[0] for f in e.value.findings} == {"E217"}


def test_every_rule_in_the_prose_has_a_case() -> None:
    prose = dict(re.findall(r"^(V\d+) (.*?)\((?=E\d)", rules.__doc__ or "", re.M | re.S))
    assert list(prose) == [f"V{i}" for i in range(1, 17)]
    assert {rule for rule, _, _ in MUST_FAIL} | {"V12"} == set(prose)
    for rule, code, _ in MUST_FAIL:
        body = re.search(rf"^{rule} .*?(?=^V\d|\n\n)", rules.__doc__ or "", re.M | re.S)
        assert body is not None
        assert code in body[0]


def test_findings_stand_below_their_nodes() -> None:
    with pytest.raises(InvalidModuleError) as e:
        verify(module(poke(leaf(0, k=7), type=Units(5, (1,)))))
    lines = [s.strip() for s in str(e.value).splitlines()]
    at = next(i for i, s in enumerate(lines) if s.startswith("^ error[E211]"))
    assert lines[at - 1].startswith("%1 = c.categorical %0 {vars=[0]} : units<1x5>[{0}]")
    assert "units<1x7>[{0}]" in lines[at]


def test_all_are_found_and_ten_are_printed() -> None:
    bad = [leaf(3 + i, v=2) for i in range(14)]
    m = Module("m", (3,), tuple((f"p{i}", x) for i, x in enumerate(bad)))
    with pytest.raises(InvalidModuleError) as e:
        verify(m)
    assert len(e.value.findings) == 14
    assert str(e.value).count("^ error[E216]") == 10
    assert str(e.value).endswith("4 more findings")
    assert "(and 13 more)" in e.value.what


def test_a_node_that_cannot_be_printed_or_typed_is_a_finding() -> None:
    with pytest.raises(InvalidModuleError) as e:
        verify(module(poke(leaf(0), vars=7)))
    assert {"E211", "E213"} <= {f[0] for f in e.value.findings}
    assert "cannot be printed" in str(e.value)


@pytest.mark.parametrize("seed", range(30))
def test_sound_circuits_pass(seed: int) -> None:
    verify(random_circuit(seed, continuous=True).module(), stage="circuit")


def test_builders_refuse_at_once() -> None:
    with pytest.raises(PccError, match="E201") as e:
        c.Hadamard((leaf(0), leaf(0, k=2, v=4)))
    assert e.value.hint
