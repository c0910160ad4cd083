"""Generated kernels: what they cost, what is refused, halves, writes in place, barriers, nvcc."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from generated import Kernels, garbage

from pcc.backends.cuda import nvcc
from pcc.backends.cuda.codegen import Generated, generate
from pcc.backends.cuda.codegen.body import Body, alive
from pcc.backends.cuda.codegen.host import Host
from pcc.backends.cuda.codegen.program import Program
from pcc.backends.cuda.codegen.views import regroup
from pcc.backends.cuda.codegen.words import table_of
from pcc.backends.cuda.codegen.work import Work
from pcc.errors import PccError
from pcc.frontends import templates
from pcc.ir.array import Array
from pcc.ir.core import Op
from pcc.ir.module import Module
from pcc.models import proposal as pr
from pcc.passes.manager import Manager
from pcc.tensor import ops as t
from pcc.tensor.eva import RingWrite
from pcc.tensor.nn import CacheWrite

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HEADS = {"cp": (9, 2), "hmm": (35, 2), "btree": (18, 4)}  # phases, barriers: at most


def draft(kind: str, n: int, r: int, vocab: int) -> tuple[Module, list[Op]]:
    """Return a draft, and what it reads: the head's logits instead of the context."""
    circuit = getattr(templates, kind)(n, r, vocab, context=4, seed=1)
    module = pr.sampled(circuit, Manager(validate=False), "full", truncation=True).module
    heavy = [x for x in module.nodes() if isinstance(x, t.Contract) and x.eq == "d,abcd->abc"]
    plain = [x for x in module.nodes() if isinstance(x, t.Input) and x.key != "context"]
    return module, [*plain, *heavy]


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_draft_of_real_size_takes_few_phases(kind: str) -> None:
    module, inputs = draft(kind, 16, 32, 320)
    kernel = generate("draft", list(module.nodes()), inputs, module.roots, 1)
    phases, barriers = HEADS[kind]
    assert kernel.phases <= phases
    assert kernel.barriers <= barriers
    assert kernel.cooperative
    assert kernel.estimate < 75


@pytest.mark.skipif(
    shutil.which("nvcc", path="/usr/local/cuda/bin") is None and shutil.which("nvcc") is None,
    reason="needs nvcc",
)
def test_the_same_source_is_cuda() -> None:
    module, inputs = draft("btree", 4, 8, 320)
    one = generate("draft", list(module.nodes()), inputs, module.roots, 1)
    x = t.Input("x", "f32", "b", (2, 3, 8))
    cache, start = t.Input("c", "bf16", "b", (2, 9, 8)), t.Input("s", "i64", "b", ())
    write = CacheWrite(cache, x, start)
    two = generate("put", [write], [cache, x, start], [write], 2, in_place=[write])
    code = nvcc.compile_all({"both": one.source + two.source}, "sm_90")["both"]
    assert b"draft" in code
    assert b"put" in code


# ---------------------------------------------------------------- what is refused


def test_what_is_no_input_is_named() -> None:
    x = t.Input("x", "f32", "b", (3,))
    with pytest.raises(PccError, match="E185"):
        generate("k", [t.Exp(x)], [], [t.Exp(x)], 1)


def test_arrays_beyond_32_bits_are_refused() -> None:
    x = t.Input("x", "f32", "b", (1 << 20,))
    with pytest.raises(PccError, match="E187"):
        generate("k", [t.Exp(x)], [x], [t.Exp(x)], 4096)


def test_a_row_longer_than_registers_is_refused() -> None:
    x = t.Input("x", "f32", "b", (1 << 17,))
    with pytest.raises(PccError, match="E183"):
        generate("k", [t.Softmax(x)], [x], [t.Softmax(x)], 1)


def test_a_cache_that_is_read_as_it_was_is_not_overwritten() -> None:
    cache, x = t.Input("c", "f32", "b", (1, 4, 2)), t.Input("x", "f32", "b", (1, 1, 2))
    write = CacheWrite(cache, x, t.Input("s", "i64", "b", ()))
    other = t.Exp(cache)
    inputs = [cache, x, write.args[2]]
    with pytest.raises(PccError, match="E186"):
        generate("k", [write, other], inputs, [write, other], 1, in_place=[write])


# ---------------------------------------------------------------- memory


@compiled
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("ring", [False, True])
def test_writes_in_place_round_and_leave_other_rows(dtype: str, ring: bool) -> None:
    import ml_dtypes

    kind = np.float16 if dtype == "f16" else ml_dtypes.bfloat16
    cache, x = t.Input("c", dtype, "b", (1, 5, 64)), t.Input("x", "f32", "b", (1, 2, 64))
    start = t.Input("s", "i64", "b", ())
    write = (RingWrite if ring else CacheWrite)(cache, x, start)
    kernel = generate("k", [write], [cache, x, start], [write], 2, in_place=[write])
    assert [a.role for a in kernel.args] == ["update", "read", "read"]
    bits = np.random.default_rng(0).integers(0, 1 << 32, (2, 1, 2, 64), dtype=np.uint32)
    new = bits.view(np.float32)
    new[np.isnan(new)] = 65519.99
    new[0, 0, 0, :6] = [65520.0, 2.0**-25, 1.5 * 2.0**-24, 2.0**-14 - 2.0**-25, -0.0, -np.inf]
    old = np.arange(640).reshape(2, 1, 5, 64).astype(kind)
    got, at = old.copy(), np.array([0, 9 if ring else 3])
    Host([kernel], threads=32)("k", [got, new, at])
    want = old.copy()
    with np.errstate(over="ignore"):
        for b in range(2):
            want[b, :, (at[b] + np.arange(2)) % 5] = new[b].astype(kind).transpose(1, 0, 2)
    assert np.array_equal(got.view(np.uint16), want.view(np.uint16))


@compiled
def test_a_missing_barrier_is_seen() -> None:
    """The order of threads between barriers tells; else no test above would notice one missing."""
    x = t.Input("x", "f32", "b", (64, 3))
    y = t.Contract(t.Softmax(x), t.Softmax(x), "ij,kj->ik")
    module = Module("m", (), (("y", y),))
    feed = {"x": np.random.default_rng(0).normal(size=(1, 64, 3)).astype(np.float32)}

    class Broken(Kernels):
        def __init__(self) -> None:
            super().__init__([module], 1)
            made: Generated = self.made["k0"]
            assert made.source.count("__syncthreads();") == 1
            source = made.source.replace("__syncthreads();", "")
            self.host = Host([replace(made, source=source)], threads=64)

    right, wrong = Kernels([module], 1), Broken()
    want = right.meaning(0, feed)["y"]
    assert all(np.allclose(right(0, feed, s)["y"], want, atol=1e-5) for s in range(4))
    assert not all(np.allclose(wrong(0, feed, s)["y"], want, atol=1e-5) for s in range(4))


# ---------------------------------------------------------------- parts


def test_reshapes_keep_the_axes_that_agree() -> None:
    work = Work(Program("k", 1), lanes=False)
    assert regroup(work, ("i1", "i2"), (4, 6), (4, 2, 3))[0] == "i1"
    assert regroup(work, (0, "i1", "i2"), (1, 4, 6), (4, 6)) == ("i1", "i2")
    assert regroup(work, (3, 5), (4, 6), (24,)) == (23,)
    assert regroup(work, (23,), (24,), (4, 1, 6)) == (3, 0, 5)
    assert regroup(work, (), (), (1, 1)) == (0, 0)
    assert regroup(work, (0, 2), (1, 3), (3, 1)) == (2, 0)


def test_values_are_computed_once_and_never_outside_a_branch() -> None:
    b = Body()
    i, loop = b.loop(4)
    with b.block("loop", loop, (i,)):
        outer, inner = b.let("int", "a[7]"), b.let("int", f"a[{i}]")
        assert b.let("int", "a[7]") == outer
        with b.block("branch", "if (x) {"):
            guarded = b.let("int", "a[8]")
            b.emit(f"y = {guarded} + {inner};")
    text = b.stack[0].lines
    assert text[0] == f"const int {outer} = a[7];"
    assert text.index(loop) < next(k for k, s in enumerate(text) if "a[8]" in s)
    assert not any(outer in s for s in alive(text))


def test_a_dictionary_finds_its_keys() -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 50, (400, 2)), axis=0)
    table = table_of(Array.of(keys), Array.of(np.arange(len(keys))))
    slots = table.slots.value
    assert (slots[:, 0] >= 0).sum() == len(keys)
    assert table.probes < 40
    assert {tuple(s[:2]): s[2] for s in slots.tolist() if s[0] >= 0} == {
        tuple(k): v for v, k in enumerate(keys.tolist())
    }
    assert garbage((2,), np.float32).view(np.uint8).min() == 0xA5
