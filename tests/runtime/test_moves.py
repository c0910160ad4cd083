"""Moves of one kernel: their values in any order of threads, races, and what goes as copies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Cuda

from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Memory, Pinned
from pcc.runtime.device.moves import LARGEST, MOST, Move, Moves, ptx
from pcc.runtime.device.philox import Draws
from pcc.runtime.philox import Uniforms, uniforms

STREAM = 1
SLOTS = [("accept", 1), ("carry", 0), ("token", 77)]
COPIES = ("cuMemcpyDtoDAsync", "cuMemcpyDtoHAsync")
Values = np.ndarray[Any, Any]


class Bytes:
    """Pieces of device memory with known bytes, and what shall lie there."""

    def __init__(self, device: Device) -> None:
        self.device, self.rng = device, np.random.default_rng(5)
        self.memory: list[Memory] = []
        self.want: list[bytes] = []

    def piece(self, size: int) -> int:
        """Return the address of `size` random bytes, and 8 more that nothing may touch."""
        data = self.rng.integers(0, 256, size + 8, np.uint8)
        made = Memory(self.device, data.nbytes)
        self.device.upload(made.address, data.ctypes.data, data.nbytes, STREAM)
        self.device.wait(STREAM)
        self.memory.append(made)
        self.want.append(data.tobytes())
        return made.address

    def expect(self, move: Move) -> None:
        """Do a move on what shall lie there: `kept <- to`, then `to <- source`."""
        for to, source in ((move.kept, move.to), (move.to, move.source)):
            if to:
                a, b = self._at(to), self._at(source)
                data = self.want[b[0]][b[1] : b[1] + move.size]
                whole = self.want[a[0]]
                self.want[a[0]] = whole[: a[1]] + data + whole[a[1] + move.size :]

    def _at(self, address: int) -> tuple[int, int]:
        for i, m in enumerate(self.memory):
            if 0 <= address - m.address < m.bytes:
                return i, address - m.address
        raise AssertionError(address)

    def found(self) -> list[bytes]:
        """Return what lies there."""
        out = []
        for m in self.memory:
            got = np.empty(m.bytes, np.uint8)
            self.device.download(got.ctypes.data, m.address, m.bytes, STREAM)
            self.device.wait(STREAM)
            out.append(got.tobytes())
        return out


def in_order(moves: Moves, order: str) -> None:
    """Run the threads of every launch, all in step or one after the other."""
    for kernel, arguments in moves.launches:
        count = kernel.grid[0] * kernel.block[0]
        each: Sequence[int] | None = None
        if order != "in step":
            each = range(count)[:: -1 if order == "last first" else 1]
        if order == "any":
            each = np.random.default_rng(1).permutation(count).tolist()
        kernel.function.run(arguments, kernel.grid[0], kernel.block[0], each)


@pytest.mark.parametrize("order", ["first first", "last first", "any", "in step"])
def test_a_round_begins_alike_in_any_order_of_threads(order: str) -> None:
    """Before <- past <- present, the inputs, and uniforms at the length that is handed on."""
    device = Device(0, Cuda())
    memory, rows = Bytes(device), 2
    past, present, before = (memory.piece(24) for _ in range(3))
    into, out = memory.piece(4 * 150), memory.piece(4 * 150)
    lengths = np.array([41, 2**31 + 9], np.int64)
    place = out + 4 * 150 - 16
    device.upload(place, lengths.ctypes.data, 16, STREAM)
    device.wait(STREAM)
    memory.want[-1] = memory.found()[-1]
    source = Uniforms(99, SLOTS, [3, 2**32 - 1])
    u = Memory(device, 4 * rows * len(SLOTS))
    listed = [Move(into, out, 4 * 150), Move(past, present, 24, kept=before)]
    moves = Moves(device, listed, Draws(device, source, place, u.address, STREAM))
    assert len(moves.launches) == 1
    assert not moves.copies
    in_order(moves, order)
    for m in listed:
        memory.expect(m)
    assert memory.found() == memory.want
    got = np.empty((rows, len(SLOTS)), np.float32)
    device.download(got.ctypes.data, u.address, got.nbytes, STREAM)
    device.wait(STREAM)
    streams = source.streams[:, None]
    want = uniforms(99, source.roles, source.slots, lengths.astype(np.uint64)[:, None], streams)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("order", ["in step", "first first", "last first"])
@pytest.mark.parametrize("wrong", ["shifted", "source is written", "written twice", "kept"])
def test_moves_that_touch_one_another_are_a_race(wrong: str, order: str) -> None:
    """What the other tests rely on: the threads' memory finds out an order that decides."""
    device = Device(0, Cuda())
    memory = Bytes(device)
    a, b, c = (memory.piece(64) for _ in range(3))
    listed = {
        "shifted": [Move(a + 4, a, 32)],
        "source is written": [Move(a, b, 32), Move(c, a + 4, 28)],
        "written twice": [Move(a, b, 32), Move(a + 8, c, 32)],
        "kept": [Move(a, b, 32, kept=b + 4)],
    }[wrong]
    moves = Moves(device, listed)
    with pytest.raises(AssertionError, match="a race"):
        in_order(moves, order)


SIZES = {
    "words": (64, 0, 0, True), "the largest": (LARGEST, 0, 0, True),
    "nothing": (0, 0, 0, True), "more than a block": (4 * 129, 4, 8, True),
    "too large": (LARGEST + 4, 0, 0, False), "half a word": (6, 0, 0, False),
    "bytes": (3, 0, 0, False), "an odd place": (8, 2, 0, False), "an odd source": (8, 0, 1, False),
}  # fmt: skip


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_what_the_kernel_does_not_take_goes_as_copies(kind: str, kept: bool) -> None:
    size, to, source, taken = SIZES[kind]
    device = Device(0, Cuda())
    memory = Bytes(device)
    a, b, c = (memory.piece(size + 8) for _ in range(3))
    move = Move(a + to, b + source, size, kept=c if kept else 0)
    other = Move(memory.piece(40), memory.piece(40), 40)  # stays in the kernel
    before = device.cu.calls["cuMemcpyDtoDAsync"]
    Moves(device, [move, other]).enqueue(STREAM)
    assert device.cu.calls["cuMemcpyDtoDAsync"] - before == (0 if taken else 1 + kept)
    assert len(device.cu.launched) == 1
    device.wait(STREAM)
    memory.expect(move)
    memory.expect(other)
    assert memory.found() == memory.want


def test_more_moves_than_a_kernel_takes() -> None:
    device = Device(0, Cuda())
    memory = Bytes(device)
    listed = [
        Move(memory.piece(4 * k), memory.piece(4 * k), 4 * k, kept=memory.piece(4 * k) * (k % 2))
        for k in range(1, 2 * MOST + 2)
    ]
    u, length = Memory(device, 4 * len(SLOTS)), Memory(device, 8)
    draws = Draws(device, Uniforms(1, SLOTS, [0]), length.address, u.address, STREAM)
    moves = Moves(device, listed, draws)
    assert [len(a) for _, a in moves.launches] == [4 * MOST + 7, 4 * MOST, 4]
    assert not moves.copies
    moves.enqueue(STREAM)
    device.wait(STREAM)
    for m in listed:
        memory.expect(m)
    assert memory.found() == memory.want


@pytest.mark.parametrize("unified", [True, False])
def test_the_hosts_memory_is_written_where_kernels_reach_it(unified: bool) -> None:
    device = Device(0, Cuda(unified=unified))
    memory = Bytes(device)
    mirror, source = Pinned(device, 512), memory.piece(512)
    Moves(device, [Move(mirror.address, source, 512, shown=True)]).enqueue(STREAM)
    assert len(device.cu.launched) == unified
    assert device.cu.calls["cuMemcpyDtoHAsync"] == (not unified)
    assert not mirror.array.any()  # it is on its way
    device.wait(STREAM)
    assert mirror.array.tobytes() == memory.want[0][:512]


def test_nothing_to_do_is_no_launch() -> None:
    device = Device(0, Cuda())
    Moves(device, []).enqueue(STREAM)
    assert not device.cu.launched
    assert not any(device.cu.calls[c] for c in COPIES)


@pytest.mark.skipif(not shutil.which("ptxas", path="/usr/local/cuda/bin"), reason="no ptxas")
@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("kept", [(), (False,), (False, True, True), (True,) * MOST])
def test_the_assembler_takes_the_kernel(tmp_path: Path, kept: tuple[bool], draws: bool) -> None:
    (tmp_path / "m.ptx").write_text(ptx(kept, draws=draws))
    done = subprocess.run(
        ["/usr/local/cuda/bin/ptxas", "-arch=sm_90", "-v", "m.ptx", "-o", "m.cubin"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " 0 bytes spill stores" in done.stderr
