"""The kernel `narrow` on a CPU: its own source as C++, over replacements of what a GPU has.

`narrow.cuh`, `epilogue.cuh`, `pieces.cuh` and the ring of `stream.cuh` are those of the checkout,
the constants and arguments those of `library.linear`. `narrow_host/` stands for the rest of
`common.cuh` and `stream.cuh`, so what is not shown here is that the inline PTX there does what its
names say.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from generated import dtype_of

from pcc.backends.cuda import library
from pcc.backends.cuda.gpu import GPUS
from pcc.backends.cuda.kernel import READ, Kernel
from pcc.backends.cuda.nvcc import KERNELS
from pcc.backends.cuda.pack import pack_linear, strips_of
from pcc.backends.cuda.standins import traits

HOST = Path(__file__).parent / "narrow_host"
FLAGS = ("-x", "c++", "-std=c++17", "-w", "-fno-strict-aliasing", "-ffp-contract=off",
         "-U_FORTIFY_SOURCE")  # fmt: skip
CUT = {  # what is taken as it is out of headers that are replaced
    "stream.cuh": ("constexpr int PIECE = ", "template <int STAGES> struct Ring {"),
    "common.cuh": ("template <typename T> __device__ __forceinline__ u32 pair(",
                   "__device__ __forceinline__ float warp_sum("),
}  # fmt: skip
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Form:
    """Sizes and options of `library.linear`; `columns`: clusters that share the strips, at most.

    `idle`: clusters more than there are strips for, which the division never makes. `warps`: of a
    block, by default those that the division takes.
    """

    rows: int
    k: int
    n: int
    columns: int = 1
    cluster: int = 2
    arch: str = "sm_90"
    idle: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    warps: int | None = None

    def kernel(self, name: str) -> Kernel:
        """Return the kernel, as a plan for a GPU of few multiprocessors has it. Errors: E180."""
        gpu = replace(GPUS[self.arch], processors=self.columns * self.cluster)
        options = {"dtype": "f16", "eps": 1e-5, "gpu": gpu} | self.options
        made = library.linear(
            name,
            rows=self.rows,
            k=self.k,
            n=self.n,
            warps=self.warps,
            cluster=self.cluster,
            **options,
        )
        assert made.source.startswith('#include "narrow.cuh"')
        constants = traits(made.source)
        assert constants["CLUSTER"] == self.cluster
        assert self.warps in (None, constants["WARPS"])
        assert made.grid[0] == constants["COLUMNS"] * self.cluster
        return self._with_idle(made, constants["COLUMNS"]) if self.idle else made

    def _with_idle(self, made: Kernel, columns: int) -> Kernel:
        more = strips_of(self.n) + self.idle
        source = once(made.source, f" COLUMNS = {columns};", f" COLUMNS = {more};")
        return replace(made, source=source, grid=(more * self.cluster, 1, 1))


def once(text: str, old: str, new: str) -> str:
    """Replace what stands in a text once."""
    assert text.count(old) == 1, f"{text.count(old)} times: {old}"
    return text.replace(old, new)


def cut(text: str, begin: str) -> str:
    """A definition of a header, from its beginning to the end of its last line."""
    assert text.count(begin) == 1, begin
    rest = text[text.index(begin) :]
    line = rest[: rest.index("\n") + 1]
    if line.endswith(";\n"):
        return line
    return rest[: rest.index("\n}") + 2] + ";\n"


def write_sources(
    folder: Path, kernels: Sequence[Kernel], faults: Sequence[tuple[str, str, str]] = ()
) -> Path:
    """Write the program of these kernels and its headers; returns its source.

    `faults`: (header, text, another text) each.
    """
    real = {p.name: p.read_text() for p in Path(KERNELS).glob("*.cuh")}
    for header, old, new in faults:
        assert old in real[header], f"{header}: nothing to replace: {old}"
        real[header] = real[header].replace(old, new)
    parts = {h: "".join(cut(real[h], begin) for begin in begins) for h, begins in CUT.items()}
    for name, first in (("common.cuh", "device.cuh"), ("stream.cuh", "common.cuh")):
        text = f'#pragma once\n#include "{first}"\nnamespace pcc {{\n{parts[name]}}}\n'
        (folder / name).write_text(text)
    for name in ("narrow.cuh", "epilogue.cuh", "pieces.cuh"):
        (folder / name).write_text(real[name])
    lines = ['#include "launch.cuh"\n']
    for k in kernels:
        # Dynamic shared memory is one array by its name; here each block has its own.
        run = f"pcc::Narrow<{k.name}_traits>(a, pcc_host::own()).run();"
        lines.append(once(k.source, f"pcc::narrow<{k.name}_traits>(a);", run))
    calls = ", ".join(f"[](auto& g) {{ pcc_host::spread({k.name}, g); }}" for k in kernels)
    lines.append(f"int main(int n, char** v) {{ return pcc_host::launches({{{calls}}}, n, v); }}\n")
    source = folder / "kernels.cu"
    source.write_text("\n".join(lines))
    return source


class Program:
    """Kernels in a program of their own: what a wrong one breaks is not this process."""

    def __init__(
        self, folder: Path, kernels: Sequence[Kernel],
        faults: Sequence[tuple[str, str, str]] = (),
    ) -> None:  # fmt: skip
        source = write_sources(folder, kernels, faults)
        self.kernels, self.made = kernels, folder / "kernels"
        paths = [f"-I{p}" for p in (folder, HOST, KERNELS)]
        call = ["g++", *FLAGS, "-O1", *paths, str(source), "-o", str(self.made)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[:4000]

    def __call__(
        self, i: int, arrays: Mapping[str, Values], schedules: range
    ) -> list[dict[str, Values]]:
        """What kernel i leaves in the arrays that it writes, for each schedule.

        Errors: RefusedError.
        """
        k = self.kernels[i]
        given = [arrays[a.name] for a in k.args]
        for a, x in zip(k.args, given, strict=True):
            assert (x.nbytes, x.dtype, x.shape) == (a.bytes, dtype_of(a.dtype), a.shape), a.name
        cluster = traits(k.source)["CLUSTER"]
        numbers = (i, k.grid[0], cluster, k.block[0], k.shared, schedules.start, len(schedules))
        words = [f"{a.bytes},{a.early:d},{a.role != READ:d}" for a in k.args]
        done = subprocess.run(
            [str(self.made), *map(str, numbers), *words],
            input=b"".join(x.tobytes() for x in given),
            capture_output=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise RefusedError(f"{done.returncode}: {done.stderr.decode()[:400].strip()}")
        written = [a for a in k.args if a.role != READ]
        size = sum(a.bytes for a in written)
        assert len(done.stdout) == size * len(schedules)
        return [
            _split(done.stdout[at * size : (at + 1) * size], written)
            for at in range(len(schedules))
        ]


class RefusedError(Exception):
    """A program ended by itself or by a signal: the kernel did what none may rest on."""


def _split(data: bytes, args: Sequence[Any]) -> dict[str, Values]:
    out, at = {}, 0
    for a in args:
        out[a.name] = np.frombuffer(data[at : at + a.bytes], dtype_of(a.dtype)).reshape(a.shape)
        at += a.bytes
    return out


# ---- arrays, and what is expected of them


@dataclass(frozen=True)
class Case:
    """A form with its kernel, its arrays, the matrix [k,n] before packing, and the constants."""

    kernel: Kernel
    arrays: dict[str, Values]
    w: Values
    constants: Mapping[str, Any]


def case(form: Form, name: str, seed: int = 0) -> Case:
    """Random arrays for a form; what is only written is full of NaN."""
    kernel, rng = form.kernel(name), np.random.default_rng(seed)
    c = traits(kernel.source)
    if c["SCALED"]:
        w: Values = rng.integers(-128, 128, (form.k, form.n)).astype(np.int8)
    else:
        w = rng.standard_normal((form.k, form.n)).astype(dtype_of(c["T"]))
    arrays: dict[str, Values] = {}
    for a in kernel.args:
        arrays[a.name] = rng.standard_normal(a.shape).astype(dtype_of(a.dtype))
        if a.name.endswith("squares_out") or (a.name == "y" and c["EPILOGUE"] != 1):
            arrays[a.name] = np.full(a.shape, np.nan, dtype_of(a.dtype))
    arrays["w"] = pack_linear(w)
    if "scales" in arrays:
        arrays["scales"] = np.abs(arrays["scales"]) / 64
    if (
        "squares" in arrays
    ):  # of an x four times as large: nothing here rests on where they are from
        arrays["squares"] = 16 * _squares(arrays["x"])
    return Case(kernel, arrays, w, c)


def expected(case: Case) -> tuple[Values, Values]:
    """`y` in float64 from the unpacked matrix, and by how much float32 sums may differ from it."""
    c, a, w = case.constants, case.arrays, case.w.astype(np.float64)
    x, flips = _operand(case)
    z, bound = x @ w, 2e-6 * (np.abs(x) @ np.abs(w)) + 1e-6
    if flips:
        bound += flips * np.stack([np.abs(row[:, None] * w).max(axis=0) for row in x])
    if c["SCALED"]:
        z, bound = z * a["scales"], bound * a["scales"]
    if c["BIAS"]:
        z = z + a["bias"]
    if c["EPILOGUE"] == 1:
        z = z + a["y"]
    if c["EPILOGUE"] == 2:
        z, bound = _gated(z, bound, c["GELU"])
    kind = _kind(case)
    if kind != "f32":
        bound = bound + np.abs(z) * (2.0**-11 if kind == "f16" else 2.0**-8)
    return z, bound + 1e-6 * np.abs(z)


def _kind(case: Case) -> str:
    return next(a.dtype for a in case.kernel.args if a.name == "y")


def _operand(case: Case) -> tuple[Values, float]:
    """X as the tensor cores get it, and the part of its largest term that a sum may be off by.

    A norm is computed in float32: where that decides how a value is rounded to half, it may come
    out as its neighbour. Of a row few do.
    """
    c, a = case.constants, case.arrays
    half = dtype_of(c["T"])
    if c["SOURCE"] != 2:
        return a["x"].astype(half).astype(np.float64), 0.0
    mean = a["squares"].astype(np.float64).sum(axis=1, keepdims=True) / c["K"]
    x = a["x"] / np.sqrt(mean + c["EPS"]) * a["gain"]
    step = 2.0**-10 if c["T"] == "f16" else 2.0**-7
    return x.astype(np.float32).astype(half).astype(np.float64), 2 * step


def _gated(z: Values, bound: Values, gelu: bool) -> tuple[Values, Values]:
    from math import erf

    gate, up = z[:, 0::2], z[:, 1::2]
    law = np.vectorize(erf, otypes=[np.float64])
    act = gate * (0.5 + 0.5 * law(gate / np.sqrt(2)) if gelu else 0.5 + 0.5 * np.tanh(gate / 2))
    slope = 1.2  # of both activations at most
    return act * up, slope * bound[:, 0::2] * np.abs(up) + bound[:, 1::2] * (np.abs(act) + 1e-3)


def _squares(x: Values) -> Values:
    padded = np.zeros((len(x), strips_of(x.shape[1]) * 32))
    padded[:, : x.shape[1]] = x.astype(np.float64) ** 2
    return padded.reshape(len(x), -1, 32).sum(axis=-1).astype(np.float32)


def check(case: Case, results: Sequence[Mapping[str, Values]]) -> None:
    """All results are the same to the bit, and what float64 says."""
    first = results[0]
    for r in results[1:]:
        for name, value in first.items():
            assert value.tobytes() == r[name].tobytes(), f"{name} depends on the order of threads"
    want, bound = expected(case)
    error = np.abs(first["y"].astype(np.float64) - want)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound):.3g} of what may be"
    if "squares_out" in first:
        y = first["y"].astype(np.float64)
        exact = _kind(case) == "f32"  # else the squares are of what was not rounded yet
        np.testing.assert_allclose(first["squares_out"], _squares(y), rtol=1e-5 if exact else 3e-2)
