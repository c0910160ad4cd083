"""What ships in `examples`, bundles of it, and the command line called in this process."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcc
from pcc.bundle import seal
from pcc.cli import main
from pcc.errors import PccError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "tiny"
HEADS = ("ff-n-8-r-1", "cp-n-8-r-4", "btree-n-8-r-4")
PCIR = """circuit @two {cards=[2 3]} {
  %0 = t.const {value=f32[1,2,2](0.25 0.75 0.5 0.5)} : f32[1,2,2]
  %1 = c.categorical %0 {vars=[0]} : units<1x2>[{0}]
  %2 = t.const {value=f32[1,2,3](0.25 0.25 0.5 0.125 0.125 0.75)} : f32[1,2,3]
  %3 = c.categorical %2 {vars=[1]} : units<1x2>[{1}]
  %4 = c.hadamard [%1, %3] : units<1x2>[{0-1}]
  %5 = t.const {value=f32[1,1,2](0.5 0.5)} : f32[1,1,2]
  %6 = c.sum %4, %5 : units<1x1>[{0-1}]
  return p = %6
}
"""
# p(x, y) of the circuit above, by hand: 0.5 f0(x) g0(y) + 0.5 f1(x) g1(y).
JOINT = 0.5 * np.outer([0.25, 0.75], [0.25, 0.25, 0.5]) + 0.5 * np.outer(
    [0.5, 0.5], [0.125, 0.125, 0.75]
)


def small() -> pcc.Circuit:
    """Return a circuit of 3 variables with a context of width 5."""
    return pcc.templates.cp(3, 2, 4, context=5, seed=3)


def refused(code: str, call: Callable[[], Any]) -> PccError:
    """Return the error that a call must end in."""
    with pytest.raises(PccError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, which must be JSON alone."""
        return json.loads(self.out)


class Command:
    """Calls `pcc` in this process: `command("inspect", path)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capsys, self.patch = capsys, patch

    def __call__(self, *args: object) -> Outcome:
        self.patch.setattr(sys, "argv", ["pcc", *map(str, args)])
        self.capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        out, err = self.capsys.readouterr()
        return Outcome(code or 0, out, err)


class Arena:
    """A folder, and commands that must fail in it without a trace."""

    def __init__(self, folder: Path, command: Command) -> None:
        self.folder, self.command = folder, command

    def tree(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))

    def refuses(self, code: str, *args: object, exit_code: int = 2) -> str:
        before = self.tree()
        done = self.command(*args)
        assert (done.code, done.out) == (exit_code, ""), done
        assert done.err.count("\n") == 1, done.err
        assert f"error[{code}]: " in done.err, done.err
        assert len(done.err) < 1000
        assert self.tree() == before
        return done.err


def rewrite_manifest(bundle: Path, **changes: Any) -> None:
    """Replace entries of a manifest and seal it, `a__b` for the entry b of a; None removes it."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = manifest
        for part in outer:
            place = place[part]
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    path.write_text(json.dumps({"sha256": seal(manifest), **manifest}))


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(shape: str, data: bytes = b"", dtype: str = "<i8") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
