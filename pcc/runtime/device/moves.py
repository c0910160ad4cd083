"""Small copies, and the uniforms of a round, in one kernel: beside a round few nodes may stand.

A node that copies takes 4 to 8 µs of a CUDA graph however few its bytes, one with a kernel 1.5 to
3 (H200). So whatever goes from one round to the next, or to the host, is one launch. The kernel is
written in PTX here: it is straight, and an engine needs no compiler when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Kernel
from pcc.runtime.device.philox import Draws, drawing

WORD = 4  # bytes that a thread moves, for each move
LARGEST = 1 << 20  # bytes; beyond, the price of a node is no longer what counts
MOST = 16  # moves of one kernel: four parameters and up to two registers each
THREADS = 128


@dataclass(frozen=True)
class Move:
    """`to <- source` of `size` bytes; before it `kept <- to`, where `kept` is not 0.

    Addresses are the device's; with `shown`, `to` is page-locked memory of the host.
    """

    to: int
    source: int
    size: int
    kept: int = 0
    shown: bool = False

    @property
    def words(self) -> bool:
        """Whether the kernel takes it: whole words, and not too many."""
        parts = (self.to, self.source, self.size, self.kept)
        return self.size <= LARGEST and all(p % WORD == 0 for p in parts)

    def copy(self, device: Device, stream: int) -> None:
        """Enqueue it as copies."""
        if self.kept:
            device.copy(self.kept, self.to, self.size, stream)
        (device.download if self.shown else device.copy)(self.to, self.source, self.size, stream)


def reaches_host(device: Device) -> bool:
    """Whether kernels write page-locked memory of the host where the host itself finds it.

    With unified addressing, all that cuMemHostAlloc gives is mapped, at the same address, whatever
    its flags (CUDA driver API, Unified Addressing).
    """
    kind = device.cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING
    return bool(device("cuDeviceGetAttribute", kind, device.handle))


class Moves:
    """Moves that do not touch one another's memory, and the uniforms of a round, enqueued at once.

    Thread i has word i of every move, and reads all of them before it writes one: the old word of
    `to` goes to `kept`, that of `source` to `to`. A word is written by one thread only, and read by
    no other, so the order of threads means nothing. What the uniforms read (tables, lengths) no
    move may write. What the kernel does not take (`Move.words`; the host's memory where kernels do
    not reach it) is enqueued as copies.
    """

    def __init__(self, device: Device, moves: Sequence[Move], draws: Draws | None = None) -> None:
        self.device, self.draws = device, draws  # whose tables the kernel reads
        reached = any(m.shown for m in moves) and reaches_host(device)
        taken = [m for m in moves if m.words and (reached or not m.shown) and m.size]
        self.copies = [m for m in moves if m not in taken]
        self.launches: list[tuple[Kernel, list[int]]] = []
        for at in range(0, len(taken), MOST):
            self.launches.append(self._launch(taken[at : at + MOST], None if at else draws))
        if draws is not None and not taken:
            self.launches.append(self._launch([], draws))

    def _launch(self, moves: Sequence[Move], draws: Draws | None) -> tuple[Kernel, list[int]]:
        kept, given = tuple(bool(m.kept) for m in moves), [] if draws is None else draws.arguments
        drawn = draws is not None
        function = self.device.once(
            f"moves {kept} {drawn}", lambda: ptx(kept, draws=drawn).encode() + b"\0", "moves"
        )
        threads = max([1, *(m.size // WORD for m in moves), draws.count if draws else 0])
        kernel = Kernel(function, (-(-threads // THREADS), 1, 1), (THREADS, 1, 1))
        return kernel, [p for m in moves for p in (m.to, m.source, m.size, m.kept)] + given

    def enqueue(self, stream: int) -> None:
        """Enqueue all of it; the order among moves is not said."""
        for kernel, arguments in self.launches:
            self.device.start(kernel, arguments, stream)
        for m in self.copies:
            m.copy(self.device, stream)


def ptx(kept: Sequence[bool], *, draws: bool = False) -> str:
    """Return the kernel `moves` of so many moves (which of them keep what was there), and draws."""
    parameters = [f"{p}{k}" for k in range(len(kept)) for p in ("to", "source", "size", "kept")]
    more, drawn = drawing() if draws else ([], [])
    head = ",\n".join(f"  .param .u64 p_{name}" for name in [*parameters, *more])
    count = max(1, len(kept))
    lines = [
        ".version 7.0", ".target sm_70", ".address_size 64", f".visible .entry moves(\n{head}\n)",
        "{", f"  .reg .pred %q<{count}>;", f"  .reg .b32 %v<{count}>, %w<{count}>;",
        f"  .reg .b64 %t<{count}>, %s<{count}>, %k<{count}>, %o<2>;", "  .reg .b32 %i<4>;",
        "  mov.u32 %i1, %ctaid.x;", "  mov.u32 %i2, %ntid.x;", "  mov.u32 %i3, %tid.x;",
        "  mad.lo.u32 %i0, %i1, %i2, %i3;", f"  mul.wide.u32 %o0, %i0, {WORD};",
    ]  # fmt: skip
    for k, keeps in enumerate(kept):
        lines += _read(k, keeps=keeps)
    for k, keeps in enumerate(kept):
        lines += _written(k, keeps=keeps)
    return "\n".join([*lines, *drawn, "  ret;", "}", ""])


def _read(k: int, *, keeps: bool) -> list[str]:
    """q: whether the thread has a word of move k; v: that of `source`; w: that of `to`."""
    places = [("t", "to"), ("s", "source")] + ([("k", "kept")] if keeps else [])
    lines = [f"  ld.param.u64 %o1, [p_size{k}];", f"  setp.lt.u64 %q{k}, %o0, %o1;"]
    for register, name in places:
        lines += [
            f"  ld.param.u64 %{register}{k}, [p_{name}{k}];",
            f"  cvta.to.global.u64 %{register}{k}, %{register}{k};",
            f"  add.u64 %{register}{k}, %{register}{k}, %o0;",
        ]
    old = [f"  @%q{k} ld.global.u32 %w{k}, [%t{k}];"] if keeps else []
    return [*lines, f"  @%q{k} ld.global.u32 %v{k}, [%s{k}];", *old]


def _written(k: int, *, keeps: bool) -> list[str]:
    old = [f"  @%q{k} st.global.u32 [%k{k}], %w{k};"] if keeps else []
    return [*old, f"  @%q{k} st.global.u32 [%t{k}], %v{k};"]
