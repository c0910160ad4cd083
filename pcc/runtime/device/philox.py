"""The uniforms of a round, drawn on the device: the same words as `pcc.runtime.philox`.

The kernel is written in PTX here, from the same constants: it has no branch but for the end of the
array, and so an engine needs no compiler when it is loaded.
"""

from __future__ import annotations

import numpy as np

from pcc.runtime.device.driver import Device, Kernel, Memory
from pcc.runtime.philox import Uniforms, split_seed

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
THREADS = 128
# slots, roles u32[K]; streams u32[B]; seed u32[2]; length i64[B]; u f32[B,K]; K, B * K as u32[2].
PARAMETERS = ("slots", "roles", "streams", "seed", "length", "u", "sizes")


def ptx() -> str:
    """Return the kernel `uniforms`: u[b,k] = (word0 >> 8) 2^-24 of Philox4x32-10.

    key = seed; counter = (slots[k], roles[k], low word of length[b], streams[b]).
    """
    head = ",\n".join(f"  .param .u64 p_{name}" for name in PARAMETERS)
    lines = [
        ".version 7.0", ".target sm_70", ".address_size 64",
        f".visible .entry uniforms(\n{head}\n)", "{",
        "  .reg .pred %p<2>;", "  .reg .b32 %r<40>;", "  .reg .b64 %d<24>;", "  .reg .f32 %f<3>;",
    ]  # fmt: skip
    for i, name in enumerate(PARAMETERS):
        lines += [f"  ld.param.u64 %d{i}, [p_{name}];", f"  cvta.to.global.u64 %d{i}, %d{i};"]
    return "\n".join([*lines, *_index(), *_counter(), *_rounds(), *_store(), "}", ""])


def _index() -> list[str]:
    """r0: index of the element; r5: its row; r6: its column."""
    return [
        "  mov.u32 %r1, %ctaid.x;", "  mov.u32 %r2, %ntid.x;", "  mov.u32 %r3, %tid.x;",
        "  mad.lo.u32 %r0, %r1, %r2, %r3;",
        "  ld.global.u32 %r4, [%d6];", "  ld.global.u32 %r7, [%d6+4];",
        "  setp.ge.u32 %p0, %r0, %r7;", "  @%p0 bra DONE;",
        "  div.u32 %r5, %r0, %r4;", "  rem.u32 %r6, %r0, %r4;",
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
        "  mul.wide.u32 %d10, %r0, 4;", "  add.u64 %d11, %d5, %d10;",
        "  st.global.f32 [%d11], %f1;", "DONE:", "  ret;",
    ]  # fmt: skip


class Draws:
    """The uniforms of one graph's calls for fixed slots and streams, from the length it is at."""

    def __init__(self, device: Device, source: Uniforms, stream: int) -> None:
        self.device, rows, slots = device, len(source.streams), len(source.slots)
        function = device.once("philox", lambda: ptx().encode() + b"\0", "uniforms")
        blocks = -(-max(1, rows * slots) // THREADS)
        self.kernel = Kernel(function, (blocks, 1, 1), (THREADS, 1, 1))
        self.tables: list[Memory] = []
        for values in (source.slots, source.roles, source.streams, split_seed(source.seed)):
            self.tables.append(self._table(values, stream))
        self.sizes = self._table((slots, rows * slots), stream)

    def _table(self, values: object, stream: int) -> Memory:
        array = np.ascontiguousarray(np.asarray(values, np.uint64), np.uint32)
        made = Memory(self.device, array.nbytes)
        self.device.upload(made.address, array.ctypes.data, array.nbytes, stream)
        self.device.wait(stream)  # the array is gone after this
        return made

    def enqueue(self, length: int, u: int, stream: int) -> None:
        """Enqueue the drawing of `u f32[B,K]` for calls whose `length i64[B]` lies there."""
        tables = [m.address for m in self.tables]
        self.device.start(self.kernel, [*tables, length, u, self.sizes.address], stream)
