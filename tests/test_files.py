"""Strangers' files that are no files: every reader refuses pipes, devices and folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from shipped import TINY, Arena, Command, small

import pcc
from pcc.files import read_bounded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files") / "small.pcc"
    return pcc.compile(small(), out=made, queries=["prefix"]).path


@pytest.fixture
def arena(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Arena:
    monkeypatch.chdir(tmp_path)
    return Arena(tmp_path, Command(capsys, monkeypatch))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    ("code", "name", "ask"),
    [
        ("F102", "head/config.yaml", ("compile", "head")),
        ("F101", "head/model@999999999.safetensors", ("compile", "head")),
        ("M102", "model/config.json", ("compile", "head", "--verifier", "model")),
        ("E011", "c.pcir", ("opt", "c.pcir")),
        ("C111", "in.npz", ("query", "BUNDLE", "prefix", "--input", "in.npz")),
        ("C131", "text", ("run", "BUNDLE", "--prompt-file", "text")),
        ("B210", "m.pcc/manifest.json", ("inspect", "m.pcc")),
    ],
)
def test_special_files(
    arena: Arena, bundle: Path, code: str, name: str, ask: tuple[str, ...], kind: str
) -> None:
    """A pipe without a writer, and a device without an end: neither is waited for or read."""
    shutil.copytree(TINY / "cp-n-8-r-4", arena.folder / "head")
    path = arena.folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    arena.refuses(code, *(str(bundle) if a == "BUNDLE" else a for a in ask))


def test_a_file_that_says_it_is_empty() -> None:
    """Files of the kernel have size 0 and contents: the limit holds for what is read."""
    with pytest.raises(pcc.PccError) as found:
        read_bounded(Path("/proc/self/maps"), 100, "C111", large="C110")
    assert found.value.code == "C110"
    assert read_bounded(Path("/proc/self/comm"), 100, "C111")
