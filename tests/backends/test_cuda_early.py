"""No plan writes, right before a launch, what its kernel reads before it waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_plans import Case, case_of, plan_of

from pcc.backends.cuda.builder import Builder, Drawn
from pcc.backends.cuda.copy import copy
from pcc.backends.cuda.early import check_early
from pcc.backends.cuda.gpu import GPUS
from pcc.conformance.models import WIDE
from pcc.emission import Emission
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, Uses, rewrite
from pcc.tensor import ops as t

CASES: list[Case] = [
    ("llama", {"kind": "cp", "size": WIDE}, "fp16", 1, ()),
    ("evabyte", {"kind": "cp", "size": WIDE}, "bf16+int8", 3, ()),
]


@pytest.fixture(params=CASES, ids=lambda c: c[0])
def step(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Emission:
    return case_of(request.param, tmp_path, monkeypatch).emissions["step"]


def writer(builder: Builder, at: int) -> Drawn:
    """A launch that writes a buffer; it reads the embedding's ids, whatever they are."""
    kernel, b = copy("seeded", "u8", builder.buffers[at].bytes), builder.launches[0]
    return Drawn(kernel, (b.args[0], at), b.op, "", {})


def refused(builder: Builder, launches: list[Drawn]) -> str:
    """Return what is wrong with some launches, or nothing."""
    try:
        check_early(launches, builder.buffers, "g")
    except PccError as e:
        return f"{e.code} {e.what}"
    return ""


def test_a_write_right_before_is_refused_and_an_older_one_is_not(step: Emission) -> None:
    builder = plan_of(step, 1)
    assert not refused(builder, builder.launches)
    names = set()
    idle = writer(builder, len(builder.buffers) - 1)
    for i, x in enumerate(builder.launches[1:], 1):
        before, after = builder.launches[:i], builder.launches[i:]
        for at, a in zip(x.args, x.kernel.args, strict=True):
            fault = writer(builder, at)
            found = refused(builder, [*before, fault, *after])
            assert (f"'{a.name}'" in found and "E191" in found) is a.early, (i, a.name, found)
            assert not refused(builder, [*before, fault, idle, *after]), (i, a.name)
            names |= {a.name} if a.early else set()
    assert {"w", "start", "key", "value"} <= names


def test_what_was_written_between_rounds_is_not_read_early_by_the_first_launch(
    step: Emission,
) -> None:
    builder = plan_of(step, 1)
    names = [{a.name for a in x.kernel.args} for x in builder.launches]
    attention = next(i for i, own in enumerate(names) if "start" in own)
    assert refused(builder, builder.launches[attention:]).startswith("E191")
    product = next(i for i, own in enumerate(names) if "w" in own)
    assert not refused(builder, [builder.launches[product]])  # weights are never written


def test_a_graph_that_computes_where_it_writes(step: Emission) -> None:
    """The sum is a launch of its own, right before the first attention."""

    def later(n: Op, _uses: Uses) -> Op | None:
        own = isinstance(n, t.Input) and n.key == "length"
        return t.Add(n, t.Const(Array.of(np.array(0)))) if own else None

    names = [name for name, _ in step.module.outputs]
    outputs = tuple(zip(names, rewrite(step.module.roots, later), strict=True))
    computed = replace(step, module=replace(step.module, outputs=outputs))
    with pytest.raises(PccError, match=r"E191.*attention.*'start'"):
        plan_of(computed, 1)
    assert plan_of(computed, 1, GPUS["sm_80"]).launches  # all launches there are one by one
