"""The uniforms of a round, drawn on the device: the same words as `pcc.runtime.philox`.

Instructions of PTX, from the same constants, for the kernel of `pcc.runtime.device.moves`: with no
branch but for the end of the array.
"""

from __future__ import annotations

import numpy as np

from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory
from pcc.runtime.philox import Uniforms, split_seed

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
# slots, roles u32[K]; streams u32[B]; seed u32[2]; length i64[B]; u f32[B,K]; K, B * K as u32[2].
PARAMETERS = ("slots", "roles", "streams", "seed", "length", "u", "sizes")


def drawing() -> tuple[list[str], list[str]]:
    """Return the parameters and the instructions of: u[b,k] = (word0 >> 8) 2^-24 of Philox4x32-10.

    key = seed; counter = (slots[k], roles[k], low word of length[b], streams[b]); element b K + k
    is that of the thread whose index is in %i0.
    """
    lines = [
        "  .reg .pred %p<2>;", "  .reg .b32 %r<40>;", "  .reg .b64 %d<24>;", "  .reg .f32 %f<3>;",
    ]  # fmt: skip
    for i, name in enumerate(PARAMETERS):
        lines += [f"  ld.param.u64 %d{i}, [p_{name}];", f"  cvta.to.global.u64 %d{i}, %d{i};"]
    return list(PARAMETERS), [*lines, *_index(), *_counter(), *_rounds(), *_store()]


def _index() -> list[str]:
    """r5: row of the element; r6: its column."""
    return [
        "  ld.global.u32 %r4, [%d6];", "  ld.global.u32 %r7, [%d6+4];",
        "  setp.ge.u32 %p0, %i0, %r7;", "  @%p0 bra DONE;",
        "  div.u32 %r5, %i0, %r4;", "  rem.u32 %r6, %i0, %r4;",
    ]  # fmt: skip


def _counter() -> list[str]:
    """r10..r13: the counter; r14, r15: the key."""
    out = []
    for register, base, index, scale in (
        (10, 0, 6, 4),
        (11, 1, 6, 4),
        (13, 2, 5, 4),
        (12, 4, 5, 8),
    ):
        out += [
            f"  mul.wide.u32 %d10, %r{index}, {scale};", f"  add.u64 %d11, %d{base}, %d10;",
            f"  ld.global.u32 %r{register}, [%d11];",
        ]  # fmt: skip
    return [*out, "  ld.global.u32 %r14, [%d3];", "  ld.global.u32 %r15, [%d3+4];"]


def _rounds() -> list[str]:
    out = []
    for _ in range(10):
        out += [
            f"  mul.lo.u32 %r20, %r10, {M0};", f"  mul.hi.u32 %r21, %r10, {M0};",
            f"  mul.lo.u32 %r22, %r12, {M1};", f"  mul.hi.u32 %r23, %r12, {M1};",
            "  xor.b32 %r24, %r23, %r11;", "  xor.b32 %r10, %r24, %r14;",
            "  xor.b32 %r25, %r21, %r13;", "  xor.b32 %r12, %r25, %r15;",
            "  mov.b32 %r11, %r22;", "  mov.b32 %r13, %r20;",
            f"  add.u32 %r14, %r14, {W0};", f"  add.u32 %r15, %r15, {W1};",
        ]  # fmt: skip
    return out


def _store() -> list[str]:
    return [
        "  shr.u32 %r30, %r10, 8;", "  cvt.rn.f32.u32 %f0, %r30;",
        "  mul.f32 %f1, %f0, 0f33800000;",  # 2^-24
        "  mul.wide.u32 %d10, %i0, 4;", "  add.u64 %d11, %d5, %d10;",
        "  st.global.f32 [%d11], %f1;", "DONE:",
    ]  # fmt: skip


class Draws:
    """The uniforms `u f32[B,K]` of one graph's calls for fixed slots and streams.

    `length i64[B]` and `u` lie at these addresses; `arguments` are those of `PARAMETERS`, `count`
    is how many threads draw: one for each number.
    """

    def __init__(self, device: Device, source: Uniforms, length: int, u: int, stream: int) -> None:
        self.device, rows, slots = device, len(source.streams), len(source.slots)
        self.count = rows * slots
        sizes = (slots, self.count)
        listed = (source.slots, source.roles, source.streams, split_seed(source.seed), sizes)
        self.tables = [self._table(values, stream) for values in listed]
        *first, last = (m.address for m in self.tables)
        self.arguments = [*first, length, u, last]

    def _table(self, values: object, stream: int) -> Memory:
        array = np.ascontiguousarray(np.asarray(values, np.uint64), np.uint32)
        made = Memory(self.device, array.nbytes)
        self.device.upload(made.address, array.ctypes.data, array.nbytes, stream)
        self.device.wait(stream)  # the array is gone after this
        return made
