"""Packed weights, read as the tensor cores do, and what products refuse."""

import re

import ml_dtypes
import numpy as np
import pytest

from pcc.backends.cuda import library
from pcc.backends.cuda.nvcc import KERNELS
from pcc.backends.cuda.pack import (
    BLOCK,
    blocks_of,
    interleave,
    pack_linear,
    packed_size,
    strips_of,
    unpack_linear,
)
from pcc.backends.cuda.split import STAGES, WARPS
from pcc.errors import PccError


def mma(a, b):
    """Return [16,8] of mma.m16n8k16 from the registers of its 32 lanes, as PTX lays them out."""
    rows, columns = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        g, c = divmod(lane, 4)
        for i in range(8):  # a0..a7: row g, or g + 8 for i in 2, 3, 6, 7; k from 8 on for i >= 4
            rows[g + 8 * (i // 2 % 2), 2 * c + i % 2 + 8 * (i // 4)] = a[lane][i]
        for i in range(4):
            columns[2 * c + i % 2 + 8 * (i // 2), g] = b[lane][i]
    return rows @ columns


def through_tensor_cores(packed, x, n):
    """Return x W as `linear.cuh` computes it: 8 rows of x, lane by lane."""
    strips, blocks = strips_of(n), blocks_of(x.shape[1])
    wide = np.zeros((8, blocks * BLOCK))
    wide[: len(x), : x.shape[1]] = x
    pieces = packed.reshape(strips, blocks, 4, 32, 8)
    y = np.zeros((8, strips * 32))
    for s in range(strips):
        sums = np.zeros((2, 16, 8))
        for block in range(blocks):
            at = block * BLOCK
            group = [wide[lane // 4, at + lane % 4 * 8 :][:8] for lane in range(32)]
            for step in range(2):
                b = [g[step * 4 : step * 4 + 4] for g in group]
                for tile in range(2):
                    sums[tile] += mma(pieces[s, block, 2 * step + tile], b)
        for lane in range(32):
            g, c = divmod(lane, 4)
            for e in range(2):
                column = [sums[t, g + 8 * h, 2 * c + e] for t in range(2) for h in range(2)]
                y[2 * c + e, s * 32 + 4 * g : s * 32 + 4 * g + 4] = column
    return y[: len(x), :n]


@pytest.mark.parametrize(("rows", "k", "n"), [(8, 64, 96), (3, 40, 43), (1, 7, 5)])
def test_tensor_cores_multiply_by_a_packed_matrix(rows, k, n):
    rng = np.random.default_rng(0)
    w = rng.integers(-8, 9, (k, n)).astype(np.float16)
    x = rng.integers(-8, 9, (rows, k))
    packed = pack_linear(w)
    assert packed.shape == (packed_size(k, n),)
    np.testing.assert_array_equal(through_tensor_cores(packed, x, n), x @ w.astype(int))
    np.testing.assert_array_equal(unpack_linear(packed, k, n), w)


# ---------------------------------------------------------------- integers


def lop3(table, *words):
    """Each bit of three words looked up in a table of eight bits, as the instruction does."""
    index = [np.stack([w >> i & 1 for i in range(32)], -1) for w in np.broadcast_arrays(*words)]
    bits = table >> (4 * index[0] + 2 * index[1] + index[2]) & 1
    return (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


def steps():
    """The tables and constants of the two `lop3` in `common.cuh` that widen bf16."""
    line = r'asm\("lop3\.b32 %0, %1, %2, %3, (\w+);" : "=r"\((\w+)\)\s*: "r"\(bytes\), '
    line += r'"r"\((\w+)\), "r"\((\w+)\)\);'
    found = re.findall(line, (KERNELS / "common.cuh").read_text())
    return {to: (int(table, 16), int(a, 16), int(b, 16)) for table, to, a, b in found}


def widened(words, dtype):
    """Return (even, odd) pairs of halves from words of four bytes, bit by bit as `common.cuh`."""
    words = words.astype(np.uint32)
    if dtype == "f16":

        def half(first):
            low, high = words >> 8 * first & 0xFF, words >> 8 * (first + 2) & 0xFF
            magic = np.stack([low | 0x6400, high | 0x6400], -1).astype(np.uint16).view(np.float16)
            return magic - np.float16(1152)
    else:

        def half(first):
            w = words >> 8 * first
            low, high = (lop3(table, w, np.uint32(a), np.uint32(b))
                         for table, a, b in (steps()["low"], steps()["high"]))  # fmt: skip
            pair = [np.stack([x & 0xFFFF, x >> 16], -1).astype(np.uint16).view(ml_dtypes.bfloat16)
                    for x in (low, high)]  # fmt: skip
            return pair[0] + pair[1]

    return half(0), half(1)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_byte_becomes_its_integer(dtype):
    bytes_ = np.arange(256, dtype=np.uint8).reshape(64, 4)
    even, odd = widened(bytes_.view(np.uint32)[:, 0], dtype)
    want = bytes_.astype(int) - 128
    np.testing.assert_array_equal(even.astype(int), want[:, 0::2])
    np.testing.assert_array_equal(odd.astype(int), want[:, 1::2])


def as_halves(packed, k, n, dtype):
    """Return packed integers as the packed halves that a thread makes of them in registers."""
    pieces = packed.reshape(strips_of(n), blocks_of(k, "u8"), 2, 2, 32, 16)  # b, j, lane
    words = np.ascontiguousarray(pieces).view(np.uint32)  # of a lane: t p
    even, odd = widened(words, dtype)  # pairs along k: columns of tile t, and 8 further
    halves = np.stack([even, odd], -2)  # strip block b j lane (t p) h e
    split_ = halves.reshape(*halves.shape[:5], 2, 2, 2, 2)  # strip block b j lane t p h e
    return split_.transpose(0, 1, 2, 3, 5, 4, 6, 7, 8).reshape(-1)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(("rows", "k", "n"), [(8, 128, 96), (3, 40, 43), (1, 65, 5), (5, 200, 33)])
def test_tensor_cores_multiply_by_packed_integers(rows, k, n, dtype):
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (k, n)).astype(np.int8)
    x = rng.integers(-8, 9, (rows, k))
    packed = pack_linear(w)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_size(k, n, "u8"),)
    np.testing.assert_array_equal(unpack_linear(packed, k, n), w)
    halves = as_halves(packed, k, n, dtype).astype(np.float64)
    wide = np.zeros((rows, -(-k // 64) * 64), int)
    wide[:, :k] = x
    np.testing.assert_array_equal(through_tensor_cores(halves, wide, n), x @ w.astype(int))


def test_single_precision_is_packed_by_rows_of_a_strip():
    w = np.arange(70 * 40, dtype=np.float32).reshape(70, 40)
    packed = pack_linear(w)
    np.testing.assert_array_equal(packed.reshape(2, 96, 32)[1, :70, :8], w[:, 32:])
    np.testing.assert_array_equal(unpack_linear(packed, 70, 40), w)


def test_gates_lie_beside_what_they_gate():
    np.testing.assert_array_equal(interleave(np.arange(6)), [0, 3, 1, 4, 2, 5])


def test_integers_are_half_the_bytes():
    sizes = {"rows": 16, "k": 4096, "n": 4096, "dtype": "bf16"}
    half, integers = (library.linear("p", integers=i, **sizes) for i in (False, True))
    bytes_ = [{a.name: a.bytes for a in k.args} for k in (half, integers)]
    assert bytes_[0]["w"] == 2 * bytes_[1]["w"] == 2 * 4096 * 4096
    assert bytes_[1]["scales"] == 4 * 4096
    assert "scales" not in bytes_[0]


def test_scratch_holds_what_a_product_writes():
    kernel = library.linear("p", rows=32, k=4096, n=4096, dtype="bf16")
    args = {a.name: a for a in kernel.args}
    slabs = kernel.grid[1]
    assert args["partial"].bytes == slabs * 32 * 4096 * 4
    assert args["count"].zero
    assert kernel.block == (32 * WARPS, 1, 1)
    assert kernel.shared > WARPS * STAGES * 2048


@pytest.mark.parametrize(
    "wrong",
    [
        {"epilogue": "gated", "n": 5},
        {"epilogue": "residual", "out": "half"},
        {"dtype": "f64"},
        {"source": "norm", "dtype": "f32"},
        {"rows": 0},
        {"integers": True, "dtype": "f32"},
    ],
)
def test_what_no_kernel_does_is_refused(wrong):
    with pytest.raises(PccError) as error:
        library.linear("p", **{"rows": 1, "k": 8, "n": 8, "dtype": "f16", **wrong})
    assert error.value.code == "E180"


def test_sizes_that_attention_cannot_hold_are_refused():
    sizes = {
        "batch": 1, "count": 1, "heads": 4, "key_heads": 2, "width": 64, "rows": 32, "angles": 8,
        "positions": 32, "scale": 1.0, "dtype": "f16",
    }  # fmt: skip
    assert library.attend("a", **sizes).grid == (2, 1, 2)
    for wrong in ({"width": 60}, {"count": 33}, {"key_heads": 3}, {"angles": 40}, {"dtype": "f32"}):
        with pytest.raises(PccError):
            library.attend("a", **sizes | wrong)
