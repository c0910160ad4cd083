"""The hand-written kernels compile where there is nvcc, and spill nothing."""

import re
import subprocess

import pytest
from ptx_waits import kernels

from pcc.backends.cuda import library, nvcc
from pcc.errors import PccError

HEADS = {
    "batch": 1, "count": 16, "width": 128, "angles": 64, "positions": 4096, "scale": 0.088,
    "dtype": "bf16",
}  # fmt: skip
SIZES = {"rows": 16, "dtype": "f16"}
KERNELS = [
    library.linear("normed", k=4096, n=12288, source="norm", eps=1e-5, **SIZES),
    library.linear("summed", k=4096, n=4096, source="half", epilogue="residual", **SIZES),
    library.linear("ragged", rows=5, k=100, n=259, dtype="bf16", bias=True, squares=True),
    library.linear(
        "many", rows=64, k=11008, n=4096, dtype="bf16", source="half", out="half", epilogue="gated"
    ),
    *(
        library.linear(f"integers_{name}_{dtype}", dtype=dtype, integers=True, **sizes)
        for dtype in ("f16", "bf16")
        for name, sizes in {
            "normed": {"rows": 16, "k": 4096, "n": 12288, "source": "norm", "eps": 1e-5},
            "ragged": {"rows": 5, "k": 100, "n": 259, "bias": True, "squares": True},
            "many": {
                "rows": 64,
                "k": 11008,
                "n": 4096,
                "source": "half",
                "out": "half",
                "epilogue": "gated",
            },
        }.items()
    ),
    *(
        library.linear(
            f"few_{name}_{rows}_{integers}", rows=rows, dtype="bf16", integers=integers, **sizes
        )
        for rows in (1, 8, 16)
        for integers in (False, True)
        for name, sizes in {
            "normed": {
                "k": 4096,
                "n": 22016,
                "source": "norm",
                "eps": 1e-5,
                "out": "half",
                "epilogue": "gated",
            },
            "long": {"k": 11008, "n": 4096, "source": "half", "epilogue": "residual"},
            "wide": {"k": 3072, "n": 5120},
        }.items()
    ),
    library.linear("single", rows=3, k=100, n=259, dtype="f32", epilogue="residual"),
    library.rms_norm("rms", rows=16, width=4096, eps=1e-5, dtype="bf16", wide=True),
    library.embedding("looked_up", rows=16, vocab=320, width=4000, dtype="f16", squares=True),
    library.attend("llama", heads=24, key_heads=8, rows=2064, window=512, **HEADS),
    library.eva_attend("eva", heads=32, ring=2304, older=257, window=2048, chunk=16, **HEADS),
]


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_kernels_compile_without_spilling(arch, tmp_path):
    try:
        compiler = nvcc.find()
    except PccError as error:
        pytest.skip(f"{error.code}: no nvcc here")
    source = tmp_path / "kernels.cu"
    source.write_text("\n".join(k.source for k in KERNELS))
    command = [
        compiler, "-O3", "-std=c++17", "--cubin", f"-arch={arch}", "-Xptxas=-v",
        "-Werror=all-warnings", "-I", nvcc.KERNELS, "-o", tmp_path / "kernels.cubin", source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("Used ") == len(KERNELS)
    spilled = [x for x in done.stderr.splitlines() if "spill" in x]
    assert len(spilled) == len(KERNELS)
    assert all("0 bytes spill stores, 0 bytes spill loads" in x for x in spilled)


def test_every_instance_names_its_arguments_once():
    for kernel in KERNELS:
        names = [a.name for a in kernel.args]
        assert len(set(names)) == len(names)
        assert all(f"a.{name} = {name};" in kernel.source for name in names)
        assert kernel.block[0] % 32 == 0
        assert kernel.shared <= 227 << 10


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    try:
        compiler = nvcc.find()
    except PccError as error:
        pytest.skip(f"{error.code}: no nvcc here")
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "k.cu").write_text("\n".join(k.source for k in KERNELS))
    call = [compiler, "-O3", "-std=c++17", "--ptx", "-arch=sm_90", "-I", nvcc.KERNELS, "k.cu"]
    subprocess.run(call, cwd=folder, check=True, timeout=600)
    return (folder / "k.ptx").read_text()


def test_what_is_read_before_the_wait_is_said(ptx):
    """In the compiled code, on every path: the order in the source promises nothing."""
    found = kernels(ptx)
    for kernel in KERNELS:
        read = {kernel.args[i].name for i in found[kernel.name].early()}
        assert read == {a.name for a in kernel.args if a.early}, kernel.name


def test_without_waits_all_is_read_early(ptx):
    found = kernels(re.sub(r"griddepcontrol.wait;", "", ptx))
    for kernel in KERNELS:
        read = {kernel.args[i].name for i in found[kernel.name].early()}
        unused = {"partial", "done"} if kernel.name in ("llama", "eva") else set()
        assert read == {a.name for a in kernel.args} - unused, kernel.name
