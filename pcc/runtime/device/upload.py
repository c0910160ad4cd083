"""Large files onto the device: one piece is read while another is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pcc.errors import PccError
from pcc.runtime.device.driver import Device, shown
from pcc.runtime.device.handles import Pinned

PIECE = 32 << 20  # bytes read at once: long enough for a disk and for the bus
TELLS = 20  # messages of one upload

Say = Callable[[str], None]


def upload(
    device: Device,
    path: Path,
    parts: Iterable[tuple[int, int, int]],
    stream: int,
    say: Say | None = None,
) -> None:
    """Copy parts (offset in the file, bytes, address) of a file to the device; wait for them.

    Errors: B212 where the file ends before a part does.
    """  # fmt: skip
    listed = list(parts)
    total, done = sum(size for _, size, _ in listed), 0
    if not total:
        return
    piece = min(PIECE, max(size for _, size, _ in listed))
    stages = [(Pinned(device, piece), device.event()) for _ in range(2)]
    turn = 0
    with path.open("rb", buffering=0) as f:
        for offset, size, address in listed:
            f.seek(offset)
            for at in range(0, size, piece):
                stage, free = stages[turn]
                turn = 1 - turn
                device.wait_event(free)  # of an event that was never recorded: at once
                want = min(piece, size - at)
                _read(f, memoryview(stage.array.data)[:want], path)
                device.upload(address + at, stage.address, want, stream)
                device.record(free, stream)
                if say is not None and (done + want) * TELLS // total > done * TELLS // total:
                    say(f"weights: {shown(done + want)} of {shown(total)}")
                done += want
    device.wait(stream)


def _read(f: object, into: memoryview, path: Path) -> None:
    got = 0
    while got < len(into):
        n = f.readinto(into[got:])  # type: ignore[attr-defined]
        if not n:
            raise PccError("B212", "the weight file ends too early", at=str(path))
        got += n
