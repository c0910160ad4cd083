"""Strangers' files: no pipes, devices or folders; what they say is printed as plain text."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
from shipped import TINY, Arena, archive, rewrite_manifest, small

import pcc
from pcc.bundle import seal, sha256
from pcc.cli.bundles import describe
from pcc.errors import PccError
from pcc.files import read_bounded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files") / "small.pcc"
    return pcc.compile(small(), out=made, queries=["prefix"]).path


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


def test_an_archive_that_unpacks_to_gigabytes(arena: Arena, bundle: Path) -> None:
    """A directory of two members of 4 GiB in a file of 2 KB: nothing is unpacked."""
    data = bytearray(archive(x=bytes(1 << 20)))
    at, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    entry, tail = bytes(data[at:end]), bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 2, 2, 2 * len(entry))
    (arena.folder / "bomb.npz").write_bytes(bytes(data[:at]) + entry + entry + bytes(tail))
    ask = ("query", bundle, "prefix", "--input", "bomb.npz")
    assert "unpacks to" in arena.refuses("C110", *ask)


def test_control_characters_do_not_reach_the_terminal(arena: Arena) -> None:
    found = arena.refuses("E140", "compile", "a\x1b[31m\nb\rc")
    assert "\x1b" not in found
    assert "\r" not in found


def test_names_in_a_bundle_do_not_reach_the_terminal_raw(arena: Arena, bundle: Path) -> None:
    """Escapes, half characters, and numbers of any size: a table of plain text."""
    copy = Path(shutil.copytree(bundle, arena.folder / "copy.pcc"))
    record = {"name": "\x1b]0;owned\x07", "of": "\ud800", "changed": True, "nodes_before": 1,
              "nodes_after": -(1 << 62), "ms": 1e18, "check_ms": 0, "error": None}  # fmt: skip
    rewrite_manifest(copy, circuit__name="\x1b[31m" * 100, unsupported={"\x9b2J": "a\nb\r\0"},
                     passes=[record])  # fmt: skip
    done = arena.command("inspect", copy)
    assert (done.code, done.err) == (0, "")
    assert done.out.replace("\n", "").isprintable()
    assert max(map(len, done.out.splitlines())) < 1000
    as_json = arena.command("inspect", copy, "--json")
    assert as_json.out.replace("\n", "").isprintable()
    assert as_json.json["passes"] == [record]
    stage = copy / "ir" / "00-circuit.pcir"
    stage.write_bytes(b"// \x1b[2J \xff\n" + stage.read_bytes())
    files = as_json.json["files"] | {"ir/00-circuit.pcir": sha256(stage)}
    rewrite_manifest(copy, files=files)
    shown = arena.command("inspect", copy, "--ir", "circuit")
    assert shown.code == 0
    assert shown.out.replace("\n", "").isprintable()
    assert shown.out.count("\n") == stage.read_bytes().count(b"\n")


# ------------------------------------------------------------------ manifests that are sealed


WRONG: tuple[Any, ...] = (
    None,
    True,
    "x",
    "\x1b",
    -1,
    0,
    1 << 62,
    1 << 70,
    1e300,
    [],
    {},
    [[]],
    [{}],
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry of a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generating")
    engines.llama_folder(folder / "model")
    made = pcc.compile(
        engines.head("cp", 4, 2), verifier=folder / "model", out=folder / "m.pcc",
        queries=["draft"], max_seq=64, chunk=8, validate=False,
    )  # fmt: skip
    return made.path


@pytest.mark.parametrize("which", ["bundle", "generating"])
def test_entries_of_other_types(
    which: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever an honest hash covers: a bundle loads and prints, or is refused with a code."""
    copy = Path(shutil.copytree(request.getfixturevalue(which), tmp_path / "copy.pcc"))
    whole = json.loads((copy / "manifest.json").read_text())
    del whole["sha256"]
    spots = [p for p in places(whole) if p[0] != "files"]
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        spot, wrong = spots[rng.integers(len(spots))], WRONG[rng.integers(len(WRONG))]
        manifest = copy_of(whole)
        inner = manifest
        for key in spot[:-1]:
            inner = inner[key]
        inner[spot[-1]] = wrong
        (copy / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal(manifest)}))
        try:
            engine = pcc.load(copy)
            describe(copy, engine.manifest)
            assert capsys.readouterr().out.replace("\n", "").isprintable()
            if engine.manifest["generation"] is not None:
                engine.session(greedy=True)
        except PccError:
            refused += 1
        except Exception as e:
            raise AssertionError((spot, wrong)) from e
    assert refused > 200
