"""Work is divided for the GPU that a plan is built for: it fits; on sm_90 nothing has changed."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cuda_plans import CASES, Case, case_of, check, plan_of

from pcc.backends.cuda import gpu as gpus
from pcc.backends.cuda import library, nvcc
from pcc.backends.cuda.codegen import generate
from pcc.backends.cuda.codegen.source import THREADS
from pcc.backends.cuda.gpu import GPUS, KB, TUNED, Gpu, gpu_of
from pcc.backends.cuda.kernel import Kernel
from pcc.backends.cuda.narrow import narrow
from pcc.backends.cuda.pack import blocks_of
from pcc.backends.cuda.split import SLAB, split
from pcc.conformance.models import WIDE
from pcc.errors import PccError
from pcc.tensor import ops as t

REGISTERS = 1 << 16  # of a multiprocessor, in every architecture of the table
NVCC = Path("/usr/local/cuda/bin/nvcc")
PRODUCTS = {
    "evabyte qkv": (4096, 12288), "evabyte out": (4096, 4096), "evabyte gate/up": (4096, 22016),
    "evabyte down": (11008, 4096), "evabyte logits": (4096, 320), "llama qkv": (3072, 5120),
    "llama out": (3072, 3072), "llama gate/up": (3072, 16384), "llama down": (8192, 3072),
    "llama logits": (3072, 320),
}  # fmt: skip
HEADS: dict[str, Any] = {
    "batch": 1, "width": 128, "angles": 64, "positions": 4096, "scale": 0.088, "dtype": "bf16",
}  # fmt: skip
EVA = {"heads": 32, "ring": 2304, "older": 257, "window": 2048, "chunk": 16}


# ---------------------------------------------------------------- sm_90 is what was measured

# (rows, product): columns, slabs, bytes of shared memory, as they were when they were measured.
MEASURED = {
    (64, "evabyte qkv"): (26, 5, 209544), (64, "evabyte gate/up"): (22, 6, 193160),
    (64, "evabyte down"): (8, 15, 193160), (64, "llama gate/up"): (33, 4, 201352),
    (64, "llama down"): (12, 11, 201352),
}  # fmt: skip
# The same of few rows: blocks in all, blocks of a cluster, bytes.
FEW = {
    (16, "evabyte qkv"): (132, 2, 139840), (16, "evabyte out"): (132, 2, 139840),
    (16, "evabyte gate/up"): (132, 2, 139840), (16, "evabyte down"): (132, 2, 139840),
    (16, "evabyte logits"): (20, 2, 139840), (8, "llama qkv"): (132, 2, 119328),
    (8, "llama gate/up"): (132, 2, 119328), (8, "llama down"): (132, 2, 119328),
    (1, "evabyte qkv"): (132, 1, 118784), (1, "evabyte out"): (128, 1, 118784),
    (1, "evabyte down"): (128, 1, 118784), (1, "llama out"): (96, 1, 118784),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "name"), [*MEASURED, *FEW])
def test_products_on_sm_90_are_those_that_were_measured(rows: int, name: str) -> None:
    k, n = PRODUCTS[name]
    kernel = library.linear(
        "p", rows=rows, k=k, n=n, dtype="bf16", source="half", gpu=GPUS["sm_90"]
    )
    if (rows, name) in FEW:
        blocks, cluster, shared = FEW[rows, name]
        assert (kernel.grid, kernel.shared) == ((blocks, 1, 1), shared)
        assert f"CLUSTER = {cluster};" in kernel.source
    else:
        columns, slabs, shared = MEASURED[rows, name]
        assert (kernel.grid, kernel.shared) == ((columns, slabs, 1), shared)
    assert "STAGES = 6;" in kernel.source
    assert kernel.overlap


def test_attention_on_sm_90_is_that_which_was_measured() -> None:
    eva = library.eva_attend("e", count=16, **EVA, **HEADS)
    llama = library.attend("a", count=8, heads=24, key_heads=8, rows=2064, **HEADS)
    assert (eva.grid, eva.shared) == ((8, 1, 32), 71168)
    assert (llama.grid, llama.shared) == ((8, 2, 8), 103936)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_two_blocks_do_not_share_a_multiprocessor(gpu: Gpu) -> None:
    """By the rule of the guide: each block takes 1 KB more than it asks for."""
    assert 2 * (gpu.alone + KB) > gpu.shared >= gpu.alone + KB
    assert gpu.block_shared in (99 * KB, 163 * KB, 227 * KB)
    assert gpu.overlaps == (gpu.number >= 90)


@pytest.mark.skipif(not NVCC.exists(), reason="no nvcc is here")
def test_what_nvcc_lists_is_described_or_refused() -> None:
    done = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    listed = [x for x in done.stdout.split() if int(x[3:].rstrip("af")) >= 80]
    assert listed
    for arch in listed:
        if arch in GPUS:
            assert gpu_of(arch).arch == arch
            continue
        with pytest.raises(PccError, match=rf"E180.*{arch}") as caught:
            gpu_of(arch)
        assert "sm_90" in caught.value.hint


def _here(monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...] | None) -> None:
    monkeypatch.setattr(gpus, "attributes", lambda *_: found)


@pytest.mark.parametrize(
    "bad",
    ["sm_70", "hopper", "90; rm", "sm_9", "", "sm_89:", "sm_89:0", "sm_89:1025", "sm_89:-1",
     "sm_89:1e2", "sm_89:142:1", "sm_89 :142", "sm_89:\u0661", "sm_99", "sm_89:9999999999",
     "sm_99a", "sm_80a", "86a", "sm_89a:142", "sm_90f", "sm_90aa"],
)  # fmt: skip
def test_architectures_that_are_none(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _here(monkeypatch, None)
    with pytest.raises(PccError) as caught:
        gpu_of(bad)
    assert caught.value.code == "E180"
    assert caught.value.hint


@pytest.mark.skipif(not NVCC.exists(), reason="no nvcc is here")
@pytest.mark.parametrize("arch", GPUS)
def test_letters_are_taken_where_nvcc_has_them(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _here(monkeypatch, None)
    (tmp_path / "a.cu").write_text("__global__ void empty() {}\n")

    def has(name: str) -> bool:
        call = [NVCC, f"-arch={name}", "--dryrun", "--cubin", "a.cu"]
        return not subprocess.run(call, cwd=tmp_path, capture_output=True, check=False).returncode

    if not has(arch):
        pytest.skip(f"this nvcc has no {arch}")
    if has(f"{arch}a"):
        assert gpu_of(f"{arch}a").arch == f"{arch}a"
    else:
        with pytest.raises(PccError, match=r"E180.*no letter") as caught:
            gpu_of(f"{arch}a")
        assert caught.value.hint == f"--gpu {arch}"


def test_architectures_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _here(monkeypatch, None)
    assert gpu_of(None) is TUNED
    assert gpu_of("90") == gpu_of("sm_90") == TUNED
    assert gpu_of("sm_90a") == replace(TUNED, arch="sm_90a")
    assert gpu_of("sm_89:142") == replace(GPUS["sm_89"], processors=142)


def test_the_gpu_that_is_present_gives_its_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _here(monkeypatch, (8, 9, 58))
    assert gpu_of(None) == gpu_of("sm_89") == replace(GPUS["sm_89"], processors=58)
    assert gpu_of("sm_89:142").processors == 142
    assert gpu_of("sm_90") == TUNED
    _here(monkeypatch, (7, 5, 40))  # none that the kernels run on
    assert gpu_of(None) is TUNED
    _here(monkeypatch, (8, 8, 40))  # one that nothing is known of
    with pytest.raises(PccError, match="E180"):
        gpu_of(None)
    assert gpu_of("sm_80").processors == 108


# ---------------------------------------------------------------- what is launched fits


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_a_product_of_few_rows_fits_the_machine(rows: int, gpu: Gpu) -> None:
    """From sm_90 on; each warp has a part of K, and no strip is left out."""
    found = 0
    for k, n in (*PRODUCTS.values(), (104, 259), (8, 8), (20000, 64)):
        for dtype in ("f16", "u8"):
            for source in ("f32", "half", "norm"):
                how = narrow(rows, k, n, gpu, dtype, source)
                if how is None:
                    continue
                found += 1
                assert how.warps == 8 or dtype == "u8"
                blocks, warps = blocks_of(k, dtype), how.warps * how.cluster
                assert blocks >= warps, "no warp is without a part"
                assert how.parts >= -(-blocks // warps) * (2 if dtype == "u8" else 1)
                assert how.tiles * 8 >= rows
                assert 0 < how.columns * how.cluster <= gpu.processors
                assert gpu.alone <= how.shared <= gpu.block_shared
                registers = 176 if how.warps == 8 else 64
                assert 4 * how.tiles * how.parts <= registers, "of a thread, for x"
    assert bool(found) == gpu.overlaps


def test_a_division_that_there_is_not_is_refused() -> None:
    asked = {"rows": 8, "k": 256, "n": 64, "dtype": "f16", "gpu": GPUS["sm_90"]}
    assert "CLUSTER = 1;" in library.linear("p", cluster=1, **asked).source
    for wrong in (
        {"cluster": 2},
        {"cluster": 4},
        {"warps": 16},
        {"warps": 12, "integers": True},
        {"cluster": 1, "slabs": 2},
        {"cluster": 2, "rows": 17},
    ):
        with pytest.raises(PccError, match="E180"):
            library.linear("p", **(asked | wrong))


def test_more_rows_or_a_ragged_k_are_divided_otherwise() -> None:
    sm_90 = GPUS["sm_90"]
    assert narrow(16, 4096, 64, sm_90, "f16", "f32") is not None
    assert narrow(17, 4096, 64, sm_90, "f16", "f32") is None
    assert narrow(16, 4100, 64, sm_90, "f16", "f32") is None
    assert narrow(16, 64, 64, sm_90, "f16", "f32") is None, "fewer blocks than warps"
    assert narrow(16, 4096, 64, GPUS["sm_89"], "f16", "f32") is None


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 300])
def test_a_division_fits_the_machine(rows: int, gpu: Gpu) -> None:
    for k, n in (*PRODUCTS.values(), (100, 259), (8, 8)):
        for dtype in ("f16", "u8"):
            _fits(rows, k, n, gpu, dtype)


def _fits(rows: int, k: int, n: int, gpu: Gpu, dtype: str) -> None:
    s = split(rows, k, n, gpu, dtype=dtype)
    blocks = blocks_of(k, dtype)
    assert s.parts * 64 >= rows
    assert 8 * s.tiles >= min(rows, 64)
    assert 1 <= s.slabs <= blocks
    edges = [blocks * i // s.slabs for i in range(s.slabs + 1)]  # as the kernel has them
    assert max(b - a for a, b in itertools.pairwise(edges)) <= s.slab_blocks
    assert s.pitch >= 2 * s.slab_blocks * s.depth, "a row's part of x has room"
    assert s.pitch % 128 == 64
    assert s.stages >= 2, "a copy is under way while another is used"
    assert s.shared <= gpu.block_shared
    assert 2 * (s.shared + KB) > gpu.shared, "two blocks on one multiprocessor leave one without"
    assert 8 * s.tiles * s.pitch <= SLAB[s.tiles] + 8 * s.tiles * 64
    assert s.columns == 1 or s.columns * s.slabs <= gpu.processors


def test_another_gpu_is_divided_otherwise() -> None:
    """The same product over 16, 128 and 132 multiprocessors; less memory: shorter slabs."""
    grids = {a: split(64, 11008, 4096, GPUS[a]) for a in ("sm_87", "sm_89", "sm_90")}
    assert len({(s.columns, s.slabs) for s in grids.values()}) == 3
    assert grids["sm_89"].slab_blocks < grids["sm_90"].slab_blocks
    assert (grids["sm_89"].stages, grids["sm_90"].stages) == (3, 6)
    fewer = split(16, 4096, 12288, replace(GPUS["sm_89"], processors=58))
    assert 29 < fewer.columns * fewer.slabs <= 58, "most multiprocessors have a block, one each"


def _launched(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Yield the kernels of whole plans, and of the large shapes."""
    for i, case in enumerate(CASES[:4]):
        order = case_of(case, tmp_path / str(i), monkeypatch)
        for e in order.emissions.values():
            made = plan_of(e, case[3], gpu)
            assert made.plan("c").multiprocessors == gpu.processors
            yield from (x.kernel for x in made.launches)
    for k, n in PRODUCTS.values():
        for rows in (1, 16, 64):
            for integers in (False, True):
                yield library.linear(
                    "p", rows=rows, k=k, n=n, dtype="bf16", integers=integers, gpu=gpu
                )
    for count in (1, 16, 64):
        yield library.eva_attend("e", count=count, gpu=gpu, **EVA, **HEADS)
        yield library.attend("a", count=count, heads=24, key_heads=8, rows=2064, gpu=gpu, **HEADS)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_launch_fits(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cooperative = 0
    for kernel in _launched(gpu, tmp_path, monkeypatch):
        assert kernel.shared <= gpu.block_shared
        assert gpu.overlaps or not kernel.overlap, "before sm_90 no kernel waits by itself"
        if kernel.cooperative:
            cooperative += 1
            assert math.prod(kernel.grid) <= gpu.processors
    assert cooperative, "drafts have barriers of the grid"


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one GPU takes is put into a plan for another."""
    case: Case = ("llama", {"size": WIDE}, "fp16", 1, ())
    made = plan_of(case_of(case, tmp_path, monkeypatch).emissions["decode"], 1, GPUS["sm_89"])
    launch = next(x for x in made.launches if x.kernel.shared)
    given = {a.name: i for a, i in zip(launch.kernel.args, launch.args, strict=True)}
    for wrong in (
        replace(launch.kernel, shared=100 * KB),
        replace(launch.kernel, cooperative=True, grid=(129, 1, 1)),
    ):
        with pytest.raises(PccError, match="E190"):
            made.launch(wrong, given, launch.op)


def test_summaries_that_no_block_holds_are_computed_otherwise() -> None:
    """128 positions with their chunks take 149 KB: attention is generated where a block has 99."""
    many = {**EVA, **HEADS, "count": 128}
    assert library.eva_attend("e", gpu=GPUS["sm_80"], **many).shared > 99 * KB
    with pytest.raises(PccError, match="E180"):
        library.eva_attend("e", gpu=GPUS["sm_89"], **many)


def test_eva_with_wide_passes_has_a_plan_on_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = ("evabyte", {"size": WIDE}, "fp16", 1, ())
    pattern = importlib.import_module("pcc.backends.cuda.patterns.eva")
    monkeypatch.setattr(pattern, "fits", lambda *_, **__: False)
    e = case_of(case, tmp_path, monkeypatch).emissions["decode"]
    made = plan_of(e, 1, GPUS["sm_89"])
    assert not any('"attend.cuh"' in x.kernel.source for x in made.launches)
    check(e, case, GPUS["sm_89"])


@pytest.mark.skipif(nvcc.shutil.which("g++") is None, reason="no g++ is here")
@pytest.mark.parametrize("arch", [pytest.param("sm_87", marks=pytest.mark.slow), "sm_89"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=lambda c: f"{c[0]}-{c[2]}")
def test_another_division_computes_the_same(
    case: Case, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = case_of(case, tmp_path, monkeypatch)
    for query in case[-1]:
        e = order.emissions[query]
        assert plan_of(e, case[3], GPUS[arch]).source() != plan_of(e, case[3]).source()
        check(e, case, GPUS[arch])


# ---------------------------------------------------------------- machine code


def _kernels(gpu: Gpu) -> list[Kernel]:
    """One of each hand-written template with tensor cores, and a generated one with barriers."""
    x = t.Input("x", "f32", "b", (64, 1024))
    mean = t.ReduceSum(t.Exp(x), 0)
    wide = t.ReduceSum(t.Mul(t.Exp(x), t.Reshape(t.Exp(mean), (1, 1024))), 1)
    draft = generate("generated", [mean, wide], [x], [mean, wide], 8, gpu=gpu)
    assert draft.cooperative
    norm: dict[str, Any] = {"source": "norm", "eps": 1e-5}
    sizes: dict[str, Any] = {"dtype": "bf16", "gpu": gpu}
    return [
        library.linear("normed", rows=16, k=4096, n=12288, **norm, **sizes),
        library.linear("many", rows=64, k=11008, n=4096, source="half", **sizes),
        library.linear("bytes", rows=8, k=8192, n=3072, integers=True, **sizes),
        library.attend("llama", count=16, heads=24, key_heads=8, rows=2064, gpu=gpu, **HEADS),
        library.eva_attend("eva", count=16, gpu=gpu, **EVA, **HEADS),
        draft,
    ]


@pytest.mark.skipif(not NVCC.exists(), reason="no nvcc is here")
@pytest.mark.parametrize(
    "arch",
    [
        "sm_80",
        "sm_120",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sm_89", "sm_90", "sm_100")),
    ],
)
def test_machine_code_fits_the_gpu(arch: str, tmp_path: Path) -> None:
    """Registers and memory as ptxas counts them: a block of each kernel fits, nothing spills."""
    gpu = GPUS[arch]
    made = {k.name: k for k in _kernels(gpu)}
    (tmp_path / "k.cu").write_text("\n".join(k.source for k in made.values()))
    command = [
        NVCC, "-O3", "-std=c++17", "--cubin", f"-arch={arch}", "-Xptxas=-v", "-I", nvcc.KERNELS,
        "-o", tmp_path / "k.cubin", tmp_path / "k.cu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) (.*?)\n",
        done.stderr, re.DOTALL,
    )  # fmt: skip
    assert {name for name, *_ in found} == set(made)
    for name, spilled, registers, rest in found:
        kernel, static = made[name], re.search(r"(\d+) bytes smem", rest)
        taken = kernel.shared + (int(static[1]) if static else 0)
        assert taken <= gpu.block_shared, name
        each = -(-int(registers) // 8) * 8  # given to warps in eights
        assert each * math.prod(kernel.block) <= REGISTERS, name
        assert int(spilled) == 0, name
    assert THREADS * 128 == REGISTERS
